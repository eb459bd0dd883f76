# SPDX-License-Identifier: Apache-2.0
"""What stands behind a verb: flags, ``key=value`` and YAML, and what of it is refused in a line."""

from __future__ import annotations

import dataclasses
from typing import TYPE_CHECKING, Any

import pytest

from offsite_ray import config as configs
from offsite_ray.cli.arguments import POSITIONALS, Request, help_text, parse
from offsite_ray.cli.fields import fields_of
from offsite_ray.cli.verbs import VERBS
from offsite_ray.errors import ConfigError, OffsiteError, StorageError
from offsite_ray.selection import SELECTION_METHODS

if TYPE_CHECKING:
    from pathlib import Path

COMPRESS = ("--model", "m", "--plan", "2-2-2", "--out", "o")
DISTILL = ("--model", "m", "--bundle", "b", "--data", "d", "--out", "o")


def asked(verb: str, *words: str) -> Request:
    return parse(VERBS[verb], words, VERBS)


def refusal(verb: str, *words: str) -> str:
    with pytest.raises(OffsiteError) as caught:
        asked(verb, *words)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def yaml_file(directory: Path, text: str) -> str:
    path = directory / "recipe.yaml"
    path.write_text(text, encoding="utf-8")
    return str(path)


# What help says


@pytest.mark.parametrize("name", VERBS)
def test_help_names_every_field_with_its_text_and_default(name: str) -> None:
    text = help_text(VERBS[name])
    for field in fields_of(VERBS[name].config).values():
        assert field.help, f"{field.name} has no text below it"
        is_flag = field.name not in POSITIONALS and not field.given
        assert (field.flag if is_flag else field.given or field.name.upper()) in text
        if isinstance(field.default, int | str) and not isinstance(field.default, bool):
            assert f"(default: {field.default})" in " ".join(text.split())


@pytest.mark.parametrize("verb", VERBS.values(), ids=lambda verb: verb.name)
def test_no_field_hides_a_flag_of_every_verb(verb: Any) -> None:
    assert not {"config", "json", "help", "h"} & set(fields_of(verb.config))


# What is taken


def test_flags_become_the_configuration() -> None:
    words = ("--max-steps", "7", "--learning-rate=3e-4", "--resume", "--no-use-gpu", "--json")
    request = asked("distill", *DISTILL, *words, "--dtype", "bf16", "--data", "e", "f")
    assert request.json
    assert request.config == configs.DistillConfig(
        model="m", bundle="b", data=("d", "e", "f"), out="o", max_steps=7, learning_rate=3e-4,
        resume=True, use_gpu=False, dtype="bf16",
    )  # fmt: skip


def test_defaults_are_those_of_the_class() -> None:
    assert asked("compress", *COMPRESS) == Request(
        config=configs.CompressConfig(model="m", plan="2-2-2", out="o"), json=False
    )


def test_tasks_may_be_listed_with_commas() -> None:
    words = ("--tasks", "a,b", "c", "--task-data", "a=1.jsonl,b=2.jsonl", "--text", "x,y.txt")
    config = asked("evaluate", "--model", "m", *words).config
    assert config.tasks == ("a", "b", "c")
    assert config.task_data == ("a=1.jsonl", "b=2.jsonl")
    assert config.text == ("x,y.txt",)


def test_path_stands_without_a_flag() -> None:
    assert asked("inspect", "dir").config.path == "dir"
    assert asked("verify", "--model", "m", "dir").config == configs.VerifyConfig(
        path="dir", model="m"
    )
    assert asked("inspect", "--", "-dir").config.path == "-dir"


@pytest.mark.parametrize("word", ["max_steps=5", "distill.max_steps=5", "max_steps=0x5"])
def test_overrides_are_typed_as_in_yaml(word: str) -> None:
    assert asked("distill", *DISTILL, word).config.max_steps == 5


def test_an_override_behind_a_list_is_no_file() -> None:
    words = ("--model", "m", "--bundle", "b", "--out", "o", "--data", "d", "seed=3", "./seed=4")
    config = asked("distill", *words).config
    assert (config.data, config.seed) == (("d", "./seed=4"), 3)


def test_an_override_of_a_text_is_that_text() -> None:
    words = ("out=2024", "model='null'", "blocks=null", "plan=2-2-2")
    config = asked("compress", *words).config
    assert (config.out, config.model, config.blocks) == ("2024", "null", None)


def test_lists_can_be_overridden() -> None:
    words = ("--model", "m", "text=[a, b]", "tasks=c,d")
    config = asked("evaluate", *words).config
    assert (config.text, config.tasks) == (("a", "b"), ("c", "d"))


@pytest.mark.parametrize("verb", ["distill:\n  ", ""])
def test_yaml_is_flat_or_below_the_verb(tmp_path: Path, verb: str) -> None:
    path = yaml_file(tmp_path, f"{verb}learning_rate: 1e-4\n")
    assert asked("distill", *DISTILL, "--config", path).config.learning_rate == 1e-4


def test_flags_win_over_overrides_and_these_over_yaml(tmp_path: Path) -> None:
    text = "distill:\n  seed: 1\n  epochs: 1\n  batch_size: 1\nseed: 9\nlm_weight: 2\n"
    words = ("--config", yaml_file(tmp_path, text), "seed=2", "epochs=2", "--seed", "3")
    config = asked("distill", *DISTILL, *words).config
    assert (config.seed, config.epochs, config.batch_size) == (3, 2.0, 1)
    assert config.lm_weight == 2.0
    assert isinstance(config.lm_weight, float)


def test_one_file_holds_the_whole_loop(tmp_path: Path) -> None:
    text = """
compress: {model: m, plan: 2-2-2, out: o, compress: none, seed: 4}
plug_in: {model: m, adapter: a, out: p}
plug-in: {verbose: true}
"""
    path = yaml_file(tmp_path, text)
    assert asked("compress", "--config", path).config.seed == 4
    assert asked("plug-in", "--config", path).config == configs.PlugInConfig(
        model="m", adapter="a", out="p", verbose=True
    )


def test_compress_is_a_field_too(tmp_path: Path) -> None:
    path = yaml_file(tmp_path, "compress: low-rank")
    assert asked("compress", *COMPRESS, "--config", path).config.compress == "low-rank"


def test_an_empty_file_sets_nothing(tmp_path: Path) -> None:
    path = yaml_file(tmp_path, "# nothing\n")
    assert asked("compress", *COMPRESS, "--config", path) == asked("compress", *COMPRESS)


# What is refused


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (("--max-step", "3"), "unknown flag '--max-step'; did you mean '--max-steps'?"),
        (("--max_steps=3",), "unknown flag '--max_steps'; did you mean '--max-steps'?"),
        (("max_step=3",), "unknown key 'max_step'; did you mean 'max_steps'?"),
        (("finetune.seed=3",), "unknown key 'finetune.seed'"),
        (("stray",), "distill has no use for 'stray'"),
        (("--max-steps", "3.5"), "--max-steps='3.5' must be a whole number"),
        (("--max-steps", ""), "--max-steps='' must be a whole number"),
        (("--learning-rate", "nan"), "--learning-rate='nan' must be a finite number"),
        (("--hidden-weight", "inf"), "--hidden-weight='inf' must be a finite number"),
        (("lm_weight=.nan",), "lm_weight=nan must be a finite number"),
        (("max_steps=true",), "max_steps=True must be a whole number, or null"),
        (("resume=1",), "resume=1 must be true or false"),
        (("resume=",), "resume=None must be true or false"),
        (("--dtype", "fp16"), "--dtype='fp16' must be one of fp32, bf16; did you mean 'bf16'?"),
        (("--out", ""), "--out='' must be a text that is not empty"),
        (("--seed",), "argument --seed: expected one argument"),
        (("data=[]",), "data needs at least one value"),
        (("seed=[",), "seed=[ is no valid YAML"),
        (("--num-workers", "3"), "batch_size=8 cannot be shared equally by 3 workers"),
    ],
)
def test_what_is_wrong_is_said_in_one_line(words: tuple[str, ...], said: str) -> None:
    flags = DISTILL if not words[0].startswith("data=") else (*DISTILL[:4], *DISTILL[6:])
    assert said in refusal("distill", *flags, *words)


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("max_step: 3", "unknown key 'max_step'; did you mean 'max_steps'?"),
        ("distill: {max-steps: 3}", "unknown key 'max-steps'; did you mean 'max_steps'?"),
        ("distil: {max_steps: 3}", "unknown key 'distil'"),
        ("max_steps: many", "max_steps='many' must be a whole number, or null"),
        ("max_steps: 10.0", "max_steps=10.0 must be a whole number, or null"),
        ("learning_rate: [1]", "learning_rate=[1] must be a finite number"),
        ("learning_rate: .inf", "learning_rate=inf must be a finite number"),
        ("seed: null", "seed=None must be a whole number in"),
        ("lm_weight: " + "9" * 400, "must be a finite number"),
        ("dtype: 16", "dtype=16 must be one of fp32, bf16"),
        ("data: [1]", "data=1 must be a text or a list of texts"),
        ("model: 12:30:00", "model=45000 must be text (in YAML, quote what reads as"),
        ("data: {a: b}", "data={'a': 'b'} must be a text or a list of texts"),
        ("- a", "expected keys with values, not ['a']"),
        ("distill: 3", "expected keys with values, not 3"),
        ("1: 2", "unknown key '1'"),
        ("a: [", "is no valid YAML: expected the node content"),
        ("a: 2024-99-99", "is no valid YAML: month must be in 1..12"),
        ("a: !!python/object/apply:os.system [x]", "is no valid YAML: could not determine a"),
        ("a: 1\n---\nb: 2", "is no valid YAML"),
    ],
)
def test_what_is_wrong_in_yaml_names_key_value_and_file(
    tmp_path: Path, text: str, said: str
) -> None:
    path = yaml_file(tmp_path, text)
    message = refusal("distill", "--config", path)
    assert said in message
    assert path in message
    assert len(message) < 500 + len(path)


def test_a_missing_file_is_named() -> None:
    with pytest.raises(StorageError, match=r"cannot read --config no\.yaml: No such file"):
        asked("distill", "--config", "no.yaml")


def test_everything_that_is_missing_is_named() -> None:
    assert refusal("compress", "--plan", "2-2-2").startswith("compress needs --model and --out")
    assert refusal("inspect").startswith("inspect needs PATH")


def test_a_file_that_is_for_other_verbs_is_named_as_such(tmp_path: Path) -> None:
    path = yaml_file(tmp_path, "compress: {plan: 2-2-2}\nfinetune: {max_steps: 1}\n")
    message = refusal("distill", "--config", path)
    assert message.endswith("the file has nothing for it, only for compress, finetune")
    assert refusal("compress", "--config", path).endswith("see 'offsite-ray compress --help'")


def test_help_shows_several_defaults_as_they_are_given() -> None:
    assert "(default: plug_in emulator bytes)" in " ".join(help_text(VERBS["sweep"]).split())


def test_help_names_every_selection_method() -> None:
    text = help_text(VERBS["compress"])
    assert all(f"'{name}'" in text for name in SELECTION_METHODS if name != "explicit")


def test_no_flag_may_be_shortened() -> None:
    assert "unknown flag '--learning'" in refusal("distill", *DISTILL, "--learning", "1")


def test_a_field_that_no_flag_can_hold_is_refused() -> None:
    @dataclasses.dataclass
    class Odd:
        values: dict[str, int]

    Odd.__annotations__["values"] = dict[str, int]
    with pytest.raises(TypeError, match="no flag can be made"):
        fields_of(Odd)


def test_config_errors_of_a_class_reach_the_user() -> None:
    with pytest.raises(ConfigError, match="give either --bundle"):
        asked("finetune", "--data", "d", "--out", "o")
