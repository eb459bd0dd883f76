# SPDX-License-Identifier: Apache-2.0
"""The command line: what it takes, what it refuses in one line, and what stdout gets."""

from __future__ import annotations

import dataclasses
import json
import os
import subprocess
import sys
import types
from typing import TYPE_CHECKING, Any

import pytest

from offsite_ray import config as configs
from offsite_ray.cli import main
from offsite_ray.cli.arguments import Request, help_text, parse
from offsite_ray.cli.fields import fields_of
from offsite_ray.cli.output import summary
from offsite_ray.cli.progress import Lines
from offsite_ray.cli.verbs import VERBS
from offsite_ray.errors import ConfigError, OffsiteError, StorageError, TrainingError
from offsite_ray.results import EvalRecord, RunStart, StepRecord

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


def offsite_ray(*words: str, **env: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "offsite_ray", *words]
    environ = {**os.environ, **env}
    return subprocess.run(command, capture_output=True, text=True, check=False, env=environ)


def stand_in(monkeypatch: pytest.MonkeyPatch, module: str, name: str, value: Any) -> None:
    """Replace a module that a verb imports, for one test."""
    fake = types.ModuleType(module)
    setattr(fake, name, value)
    monkeypatch.setitem(sys.modules, module, fake)


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    from tests.tiny_models import save_tiny

    return save_tiny("gpt2", tmp_path_factory.mktemp("cli") / "model")


# Help and start-up


def test_help_loads_nothing_heavy() -> None:
    code = (
        "import sys; from offsite_ray.cli import main; main(['--help']); main(['distill', '-h']);"
        "heavy = {'torch', 'ray', 'transformers', 'numpy', 'rich', 'yaml', 'pyarrow'};"
        "sys.exit(' '.join(heavy & set(sys.modules)) or 0)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stderr) == (0, "")


def test_without_a_verb_the_verbs_are_listed_in_the_order_of_the_loop(
    capsys: pytest.CaptureFixture[str],
) -> None:
    assert main([]) == 0
    lines = capsys.readouterr().out.splitlines()
    listed = [line.split()[0] for line in lines if line.startswith("  ") and "--" not in line]
    order = "compress prepare distill finetune plug-in evaluate inspect verify demo"
    assert " ".join(listed) == " ".join(VERBS) == order


def test_the_version_is_that_of_the_package() -> None:
    from offsite_ray import __version__

    done = offsite_ray("--version")
    assert (done.returncode, done.stdout) == (0, f"offsite-ray {__version__}\n")


@pytest.mark.parametrize("name", VERBS)
def test_help_names_every_field_with_its_text_and_default(name: str) -> None:
    text = help_text(VERBS[name])
    for field in fields_of(VERBS[name].config).values():
        assert field.help, f"{field.name} has no text below it"
        assert (field.name.upper() if field.name == "path" else field.flag) in text
        if isinstance(field.default, int | str) and not isinstance(field.default, bool):
            assert f"(default: {field.default})" in " ".join(text.split())


@pytest.mark.parametrize("verb", VERBS.values(), ids=lambda verb: verb.name)
def test_no_field_hides_a_flag_of_every_verb(verb: Any) -> None:
    assert not {"config", "json", "help", "h"} & set(fields_of(verb.config))


def test_help_wins_over_what_is_missing(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["compress", "--nonsense", "--help"]) == 0
    assert "usage: offsite-ray compress --model MODEL" in capsys.readouterr().out


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


def test_no_flag_may_be_shortened() -> None:
    assert "unknown flag '--learning'" in refusal("distill", *DISTILL, "--learning", "1")


# Exit status


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["destill"], "error: unknown verb 'destill'; did you mean 'distill'? (known: "),
        (["--json", "inspect"], "error: flag '--json' stands before the verb"),
        (["compress", "--frobnicate"], "error: unknown flag '--frobnicate'"),
        (["evaluate", "--model", "m"], "error: nothing to measure"),
    ],
)
def test_a_mistake_is_one_line_and_status_2(
    capsys: pytest.CaptureFixture[str], words: list[str], said: str
) -> None:
    assert main(words) == 2
    captured = capsys.readouterr()
    assert captured.out == ""
    assert captured.err.startswith(f"offsite-ray: {said}")
    assert captured.err.count("\n") == 1


@pytest.mark.parametrize(
    ("error", "status", "said"),
    [
        (StorageError("no\nspace"), 2, "offsite-ray: error: no space\n"),
        (TrainingError("loss is nan"), 1, "offsite-ray: error: loss is nan\n"),
        (KeyboardInterrupt(), 130, "offsite-ray: interrupted\n"),
        (
            KeyError("x"),
            1,
            "offsite-ray: error: KeyError: 'x' (set OFFSITE_RAY_TRACEBACK=1 for the traceback)\n",
        ),
    ],
)
def test_errors_have_one_line_and_a_status(
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    error: BaseException,
    status: int,
    said: str,
) -> None:
    def fail(path: str) -> None:
        raise error

    stand_in(monkeypatch, "offsite_ray.inspection", "inspect_path", fail)
    assert main(["inspect", "p", "--json"]) == status
    assert capsys.readouterr() == ("", said)


def test_the_traceback_is_shown_on_request(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def fail(path: str) -> None:
        raise KeyError(path)

    stand_in(monkeypatch, "offsite_ray.inspection", "inspect_path", fail)
    monkeypatch.setenv("OFFSITE_RAY_TRACEBACK", "1")
    assert main(["inspect", "p"]) == 1
    lines = capsys.readouterr().err.splitlines()
    assert lines[0].startswith("Traceback")
    assert lines[-1] == "offsite-ray: error: KeyError: 'p'"


def test_a_reader_that_has_gone_is_no_error() -> None:
    command = f"{sys.executable} -m offsite_ray --help | true"
    piped = ["bash", "-o", "pipefail", "-c", command]
    done = subprocess.run(piped, capture_output=True, text=True, check=False)
    assert (done.returncode, done.stderr) == (0, "")


# What stdout gets


def test_json_is_all_that_stdout_gets(model: Path, tmp_path: Path) -> None:
    out = tmp_path / "bundle"
    flags = ("--model", str(model), "--plan", "1-2-1", "--out", str(out), "--json")
    done = offsite_ray("compress", *flags)
    assert done.returncode == 0, done.stderr
    result = json.loads(done.stdout)
    assert result["out"] == str(out)
    assert result["plan"] == "1-2-1"
    assert result["adapter"] == [0, 5]
    assert len(result["emulator"]) == 2
    assert (out / "offsite.json").is_file()


def test_a_summary_is_aligned_and_a_second_run_refused(
    model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    flags = ["--model", str(model), "--plan", "1-2-1", "--out", str(tmp_path / "b")]
    assert main(["compress", *flags]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert "plan              1-2-1" in lines
    assert "adapter           0, 5" in lines
    assert all(line[16:18] == "  " and line[18] != " " for line in lines)
    assert main(["compress", *flags]) == 2
    assert str(tmp_path / "b") in capsys.readouterr().err


def test_inspect_prints_what_is_in_a_bundle(
    model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    pytest.importorskip("offsite_ray.inspection", reason="offsite_ray.inspection is not there")
    out = str(tmp_path / "b")
    assert main(["compress", "--model", str(model), "--plan", "1-2-1", "--out", out]) == 0
    capsys.readouterr()
    assert main(["inspect", out, "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["kind"] == "emulator_bundle"
    assert main(["verify", out]) == 0
    assert "emulator_bundle" in capsys.readouterr().out
    (tmp_path / "b" / "config.json").write_text("{}", encoding="utf-8")
    assert main(["verify", out]) == 2
    assert "config.json" in capsys.readouterr().err


def test_what_others_print_goes_to_stderr(
    monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    def noisy(path: str) -> dict[str, Any]:
        print("from Python")
        os.write(1, b"from C\n")
        subprocess.run(["echo", "from a child"], check=True)
        return {"path": path}

    stand_in(monkeypatch, "offsite_ray.inspection", "inspect_path", noisy)
    assert main(["inspect", "p", "--json"]) == 0
    captured = capfd.readouterr()
    assert json.loads(captured.out) == {"path": "p"}
    assert sorted(captured.err.splitlines()) == ["from C", "from Python", "from a child"]
    print("as before")
    os.write(1, b"as before\n")
    assert capfd.readouterr().out == "as before\n" * 2


def test_what_is_printed_after_the_result_goes_to_stderr() -> None:
    code = (
        "import atexit, os, sys, types; fake = types.ModuleType('offsite_ray.inspection');"
        "fake.inspect_path = lambda path: {'path': path};"
        "sys.modules['offsite_ray.inspection'] = fake; sys.argv = ['', 'inspect', 'p', '--json'];"
        "atexit.register(lambda: (print('late'), os.write(1, b'later')));"
        "from offsite_ray.cli import main; sys.exit(main())"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0
    assert json.loads(done.stdout) == {"path": "p"}
    assert "late" in done.stderr


def test_a_summary_shows_units_and_no_control_characters() -> None:
    plain = {
        "bundle_bytes": 3 * 2**20, "seconds": 1.25, "peak_bytes": None, "ok": True, "ids": (0, 5),
        "name": "a\x1b[2Jb\nc", "deep": {"x": 0.123456789, "many": list(range(40))},
        "records": [{"a": 1}], "names": ["n" * 30] * 9,
    }  # fmt: skip
    assert summary(plain).splitlines() == [
        "bundle bytes  3.0 MiB",
        "seconds       1.2 s",
        "peak bytes    not measured",
        "ok            yes",
        "ids           0, 5",
        "name          a\\x1b[2Jb\\nc",
        "deep",
        "  x     0.12346",
        f"  many  {', '.join(map(str, range(20)))}, ... (40 in all)",
        "records       1 entries; --json has them",
        f"names         {', '.join(['n' * 30] * 3)}, ... (9 in all)",
    ]


def test_evaluate_prints_a_table_or_its_json(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    from tests.test_report import an_evaluation

    def evaluate(config: configs.EvaluateConfig, notice: Any) -> Any:
        notice("measuring")
        return an_evaluation()

    stand_in(monkeypatch, "offsite_ray.evaluation", "evaluate", evaluate)
    words = ["evaluate", "--model", "m", "--text", "t", "--report", str(tmp_path / "r")]
    assert main(words) == 0
    captured = capsys.readouterr()
    assert "Emulator fine-tuned" in captured.out
    assert captured.err.startswith("measuring\n")
    assert (tmp_path / "r" / "report.html").is_file()
    assert main([*words, "--json"]) == 0
    result = json.loads(capsys.readouterr().out)
    assert result["gaps"]["utility"] == 0.132
    assert result["settings"]["plug_in"]["perplexity"] > 1


# Training


@dataclasses.dataclass
class Trained:
    out: str
    fit: str


@pytest.mark.parametrize(("workers", "fit"), [(0, "here"), (2, "on ray")])
def test_training_verbs_get_what_runs_them(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], workers: int, fit: str
) -> None:
    def distill(config: Any, fit: Any, report: Any, notice: Any) -> Trained:
        notice("hello")
        report(RunStart(total_steps=2, first_step=0, num_train=5, num_held_out=1))
        report(StepRecord(step=2, losses={"loss": 1.5, "lm": 2.0}, learning_rate=0.1))
        return Trained(out=config.out, fit=fit())

    stand_in(monkeypatch, "offsite_ray.distillation", "distill", distill)
    stand_in(monkeypatch, "offsite_ray.training", "run_here", lambda: "here")
    stand_in(monkeypatch, "offsite_ray.train", "run_on_ray", lambda: "on ray")
    assert main(["distill", *DISTILL, "--num-workers", str(workers), "--json"]) == 0
    captured = capsys.readouterr()
    assert json.loads(captured.out) == {"out": "o", "fit": fit}
    assert captured.err.splitlines() == [
        "hello",
        "2 steps; 5 sequences to train on, 1 held out",
        "step 2/2  loss 1.5 (lm 2)",
    ]


def test_lines_come_every_ten_seconds_and_at_each_evaluation(
    capsys: pytest.CaptureFixture[str],
) -> None:
    now = 0.0
    lines = Lines(clock=lambda: now)
    lines(RunStart(total_steps=9, first_step=3, num_train=5, num_held_out=1))
    for step in range(4, 10):
        now += 4.0
        lines(StepRecord(step=step, losses={"loss": 2.0}, learning_rate=0.1, tokens_per_s=1234.5))
        if step == 7:
            lines(EvalRecord(step=step, losses={"loss": 3.0}))
    assert capsys.readouterr().err.splitlines() == [
        "9 steps, from step 3; 5 sequences to train on, 1 held out",
        "step 6/9  loss 2  1,234 tokens/s",
        "step 7/9  held-out loss 3",
        "step 9/9  loss 2  1,234 tokens/s",
    ]


def test_a_terminal_gets_a_bar(capsys: pytest.CaptureFixture[str]) -> None:
    import io

    from rich.console import Console
    from rich.progress import Progress

    from offsite_ray.cli.progress import Bar

    progress = Progress("{task.fields[loss]} {task.fields[held_out]}", console=Console(
        file=io.StringIO(), width=200
    ))  # fmt: skip
    bar = Bar(progress, "distill")
    bar(RunStart(total_steps=9, first_step=3, num_train=5, num_held_out=1))
    assert (progress.tasks[0].total, progress.tasks[0].completed) == (9, 3)
    bar(StepRecord(step=4, losses={"loss": 2.0}, learning_rate=0.1))
    bar(EvalRecord(step=4, losses={"loss": 3.0}))
    assert progress.tasks[0].completed == 4
    assert progress.tasks[0].fields == {"loss": "loss 2", "held_out": "held-out 3"}


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
