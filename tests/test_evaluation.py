# SPDX-License-Identifier: Apache-2.0
"""Evaluation: each number against a plain reference, each model against the trained one."""

from __future__ import annotations

import json
import math
import weakref
from typing import TYPE_CHECKING, Any

import pytest
import torch
from blake3 import blake3
from torch.nn import functional

from offsite_ray.architectures import load_model, load_tokenizer
from offsite_ray.config import CompressConfig, EvaluateConfig, FinetuneConfig, PlugInConfig
from offsite_ray.data import split_blocks, write_blocks
from offsite_ray.emulator import compress
from offsite_ray.errors import DataError, PlugInError, TrainingError
from offsite_ray.evaluation import evaluate
from offsite_ray.evaluation.gaps import compare
from offsite_ray.evaluation.perplexity import context_length, encode, perplexity
from offsite_ray.evaluation.settings import models, open_artefacts
from offsite_ray.evaluation.task_loading import load_tasks
from offsite_ray.evaluation.tasks import run_tasks
from offsite_ray.finetuning import finetune
from offsite_ray.plug_in import plug_in
from offsite_ray.results import SETTINGS, Perplexity, SettingResult
from offsite_ray.training import LanguageModelLoss, run_here
from offsite_ray.training.batches import collate, num_targets
from tests.adapters import METHODS, make_adapter
from tests.loops import Loop, ignore
from tests.questions import GENERATING, QUESTIONS, own_task, write_questions
from tests.tiny_models import save_tiny, tiny_model, tiny_tokenizer

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

    from transformers import PreTrainedModel

    from offsite_ray.results import EvaluationResult
    from offsite_ray.training import TrainingOutcome

TEXTS = ["Caf\u00e9 au lait", "ab", "", "a", "The cat sat on the mat and slept. " * 3]


@pytest.fixture(autouse=True)
def dataset_cache(
    tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Keep what datasets makes of local files out of the user's own cache."""
    cache = tmp_path_factory.mktemp("cache")
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", cache)


# Perplexity


def measured(model: PreTrainedModel, texts: list[str], seq_len: int, batch_size: int) -> Perplexity:
    documents = encode(tiny_tokenizer(), texts)
    return perplexity(model, documents, seq_len=seq_len, batch_size=batch_size)


@torch.no_grad()
def plain_losses(model: PreTrainedModel, text: str, seq_len: int) -> list[float]:
    """Return the loss of each token but the first, one forward pass for each."""
    tokens = tiny_tokenizer()(text)["input_ids"]
    losses = []
    for index in range(1, len(tokens)):
        begin = (index - 1) // (seq_len - 1) * (seq_len - 1)
        logits = model(torch.tensor([tokens[begin:index]])).logits[0, -1]
        losses.append(float(functional.cross_entropy(logits, torch.tensor(tokens[index]))))
    return losses


@pytest.mark.parametrize("family", ["gpt2", "llama"])
@pytest.mark.parametrize("seq_len", [2, 7, 64])
def test_perplexity_is_that_of_a_plain_loop_at_any_batch_size(family: str, seq_len: int) -> None:
    model = tiny_model(family)
    losses = [loss for text in TEXTS for loss in plain_losses(model, text, seq_len)]
    for batch_size in (1, 3, 100):
        result = measured(model, TEXTS, seq_len, batch_size)
        assert result.num_tokens == len(losses)
        assert result.nats_per_token == pytest.approx(sum(losses) / len(losses), rel=1e-5)
        # Documents without a token to predict hold no byte that is counted.
        assert result.num_bytes == len((TEXTS[0] + TEXTS[1] + TEXTS[4]).encode())
        assert result.nats_per_byte == pytest.approx(sum(losses) / result.num_bytes, rel=1e-5)
        assert result.perplexity == pytest.approx(math.exp(sum(losses) / len(losses)), rel=1e-4)


@pytest.mark.parametrize("length", [6, 7, 8, 13, 14])
def test_every_token_is_predicted_once_around_the_window(length: int) -> None:
    model = tiny_model("gpt2")
    text = "The cat sat on the mat"[:length]
    result = measured(model, [text], 7, 8)
    losses = plain_losses(model, text, 7)
    assert result.num_tokens == length - 1
    assert result.nats_per_token == pytest.approx(sum(losses) / len(losses), rel=1e-5)


def test_a_window_fits_the_model() -> None:
    config = tiny_model("gpt2").config
    assert context_length(config, None) == context_length(config, 64) == 64
    assert context_length(tiny_model("bloom").config, None) == 1024


def test_nothing_to_predict_is_refused() -> None:
    with pytest.raises(DataError, match="2 documents and none of them has 2 tokens"):
        encode(tiny_tokenizer(), ["", "a"])


# lm-eval tasks


def scores(model: Path, tasks: list[str], **options: Any) -> dict[str, dict[str, float]]:
    return run_tasks(
        load_model(model), load_tokenizer(model), load_tasks(tasks, **options), batch_size=4
    )


@pytest.mark.parametrize("num_fewshot", [0, 1])
def test_a_task_in_memory_scores_as_lm_eval_does_on_the_directory(
    loop: Loop, tmp_path: Path, num_fewshot: int
) -> None:
    import lm_eval
    from lm_eval.tasks import TaskManager

    own_task(tmp_path / "own")
    own = scores(loop.model, ["sums"], task_path=[str(tmp_path / "own")], num_fewshot=num_fewshot)
    own_task(tmp_path / "stock", file=str(tmp_path / "own/sums.jsonl"))
    stock = lm_eval.simple_evaluate(
        model="hf",
        model_args={"pretrained": str(loop.model), "dtype": "float32"},
        tasks=["sums"],
        task_manager=TaskManager(include_path=str(tmp_path / "stock"), include_defaults=False),
        num_fewshot=num_fewshot,
        batch_size=4,
        device="cpu",
        bootstrap_iters=0,
    )["results"]["sums"]
    assert own["sums"].pop("num_documents") == len(QUESTIONS)
    for metric in ("acc", "acc_norm"):
        assert own["sums"][metric] == stock[f"{metric},none"]
    assert 0 < own["sums"]["acc"] < 1


def test_a_stock_task_reads_a_local_file(loop: Loop, tmp_path: Path) -> None:
    def arc(rows: list[dict[str, Any]], **options: Any) -> dict[str, float]:
        file = write_questions(tmp_path / "arc.jsonl", rows)
        entry = {"task_data": [f"arc_easy={file}"]}
        return scores(loop.model, ["arc_easy"], **{**entry, **options})["arc_easy"]

    own_task(tmp_path)
    (expected,) = scores(loop.model, ["sums"], task_path=[str(tmp_path / "sums.yaml")]).values()
    assert arc(QUESTIONS) == expected
    labels = ["A", "B"]
    native = [
        {
            "question": row["question"],
            "choices": {"text": row["choices"], "label": labels},
            "answerKey": labels[row["answer"]],
        }
        for row in QUESTIONS
    ]
    assert arc(native) == expected
    flipped = arc([{**row, "answer": 1 - row["answer"]} for row in QUESTIONS])
    assert flipped["acc"] == pytest.approx(1 - expected["acc"])
    assert arc(QUESTIONS, limit=4)["num_documents"] == 4
    examples = write_questions(tmp_path / "examples.jsonl", QUESTIONS[:3])
    files = [f"arc_easy={tmp_path / 'arc.jsonl'}", f"arc_easy:fewshot={examples}"]
    assert arc(QUESTIONS, task_data=files, num_fewshot=3)["num_documents"] == len(QUESTIONS)


def test_loading_tasks_is_silent_and_leaves_no_setting_changed(
    tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    import datasets

    own_task(tmp_path)
    datasets.enable_progress_bars()
    load_tasks(["sums"], task_path=[str(tmp_path)])
    assert capfd.readouterr() == ("", "")
    assert datasets.is_progress_bar_enabled()
    datasets.disable_progress_bars()
    try:
        load_tasks(["sums"], task_path=[str(tmp_path)])
        assert not datasets.is_progress_bar_enabled()
    finally:
        datasets.enable_progress_bars()


@pytest.mark.parametrize("kind", ["text", "choice", "generating"])
def test_a_loss_that_is_not_a_number_is_an_error(tmp_path: Path, kind: str) -> None:
    model = tiny_model("gpt2")
    model.get_parameter("transformer.h.3.ln_2.weight").data.fill_(math.nan)
    if kind == "text":
        with pytest.raises(TrainingError, match="is nan"):
            measured(model, TEXTS, 16, 2)
        return
    own_task(tmp_path, **(GENERATING if kind == "generating" else {}))
    tasks = load_tasks(["sums"], task_path=[str(tmp_path)], limit=2)
    with pytest.raises(TrainingError, match=r"not (a number|numbers)"):
        run_tasks(model, tiny_tokenizer(), tasks, batch_size=2)


# The five settings


@pytest.fixture(scope="module")
def artefacts(loop: Loop, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a folder with everything that an evaluation takes."""
    root = tmp_path_factory.mktemp("artefacts")
    for method in METHODS:
        make_adapter(loop.bundle, root / method, method=method, noise=0.05)
    make_adapter(loop.keep_all, root / "bound", noise=0.02)
    save_tiny("gpt2", root / "finetuned", seed=3)
    own_task(root)
    for name in (*METHODS, "bound"):
        adapter, out = str(root / name), str(root / f"plugged-{name}")
        plug_in(PlugInConfig(model=str(loop.model), adapter=adapter, out=out))
    return root


def evaluated(loop: Loop, **given: Any) -> EvaluationResult:
    config = EvaluateConfig(
        model=str(loop.model), text=(str(loop.text),), seq_len=32, batch_size=16, **given
    )
    return evaluate(config)


def test_five_settings_the_bound_and_the_gaps_in_one_run(
    loop: Loop, artefacts: Path, tmp_path: Path
) -> None:
    result = evaluated(
        loop,
        finetuned=str(artefacts / "finetuned"),
        bundle=str(loop.bundle),
        adapter=str(artefacts / "full"),
        bound=str(artefacts / "bound"),
        tasks=("sums",),
        task_path=(str(artefacts / "sums.yaml"),),
        out=str(tmp_path / "result.json"),
    )
    directories = {
        "full_zero_shot": loop.model,
        "emulator_zero_shot": loop.bundle,
        "full_fine_tuned": artefacts / "finetuned",
        "plug_in": artefacts / "plugged-full",
        "bound": artefacts / "plugged-bound",
    }
    documents = encode(tiny_tokenizer(), [loop.text.read_text()])
    nats, accuracy = {}, {}
    for name in SETTINGS:
        setting = result.settings[name]
        assert setting is not None
        assert setting.perplexity is not None
        nats[name], accuracy[name] = setting.perplexity.nats_per_token, setting.tasks["sums"]["acc"]
        if name in directories:
            model = load_model(directories[name])
            assert setting.perplexity == perplexity(model, documents, seq_len=32, batch_size=16)
    assert len(set(nats.values())) == len(SETTINGS)
    assert result.gap_metric == "nats_per_token"
    assert result.gaps.utility == pytest.approx(nats["plug_in"] - nats["full_fine_tuned"])
    assert result.gaps.privacy == pytest.approx(nats["emulator_fine_tuned"] - nats["plug_in"])
    task_gaps = result.task_gaps["sums"]
    assert task_gaps.utility == pytest.approx(accuracy["full_fine_tuned"] - accuracy["plug_in"])
    assert task_gaps.privacy == pytest.approx(accuracy["plug_in"] - accuracy["emulator_fine_tuned"])
    written = json.loads((tmp_path / "result.json").read_text())
    assert written == json.loads(json.dumps(result.to_json()))
    assert written["settings"]["plug_in"]["perplexity"] == pytest.approx(math.exp(nats["plug_in"]))


def setting(nats: float, accuracy: float) -> SettingResult:
    text = Perplexity(nats_per_token=nats, nats_per_byte=nats, num_tokens=1, num_bytes=1)
    return SettingResult(perplexity=text if nats else None, tasks={"t": {"acc": accuracy}})


@pytest.mark.parametrize(
    ("nats", "accuracies", "metric", "gaps", "share"),
    [
        ((4, 2, 2.5, 3), (0.1, 0.5, 0.4, 0.2), "nats_per_token", (0.5, 0.5), 0.75),
        ((4, 3, 2.5, 2), (0.1, 0.5, 0.4, 0.2), "nats_per_token", (-0.5, -0.5), 1.5),
        ((4, 5, 3, 3), (0.1, 0.5, 0.4, 0.2), "nats_per_token", (-2, 0), None),
        ((0, 0, 0, 0), (0.1, 0.5, 0.4, 0.2), "task_score", (0.1, 0.2), 0.75),
    ],
    ids=["all holds", "negative gaps", "fine-tuning that loses", "tasks alone"],
)
def test_gaps_are_counted_in_nats_or_else_in_scores(
    nats: tuple[float, ...],
    accuracies: tuple[float, ...],
    metric: str,
    gaps: tuple[float, float],
    share: float | None,
) -> None:
    names = ("full_zero_shot", "full_fine_tuned", "plug_in", "emulator_fine_tuned")
    given = dict(zip(names, map(setting, nats, accuracies), strict=True))
    result = compare(given, recipe={}, seconds=0)
    assert result.gap_metric == metric
    assert (result.gaps.utility, result.gaps.privacy) == pytest.approx(gaps)
    assert result.fine_tuned_share == (None if share is None else pytest.approx(share))
    assert result.bound_share is None


def test_what_was_not_given_is_not_measured(loop: Loop) -> None:
    plain = evaluated(loop, bundle=str(loop.bundle)).to_json()
    measured = [name for name, setting in plain["settings"].items() if setting is not None]
    assert measured == ["full_zero_shot", "emulator_zero_shot"]
    assert plain["gaps"] == {"utility": None, "privacy": None}
    assert plain["bound_share"] is None


def digest(model: PreTrainedModel) -> str:
    """Return a digest over the names and the bytes of a model's weights."""
    hasher = blake3()
    for name, tensor in sorted(model.state_dict().items()):
        hasher.update(name.encode())
        hasher.update(tensor.contiguous().view(torch.uint8).numpy().tobytes())
    return hasher.hexdigest()


def evaluated_models(loop: Loop, adapter: Path) -> Iterator[tuple[str, PreTrainedModel]]:
    config = EvaluateConfig(
        model=str(loop.model), bundle=str(loop.bundle), adapter=str(adapter), text=("unused.txt",)
    )
    return models(open_artefacts(config), torch.float32)


def test_one_model_is_in_memory_at_a_time(
    loop: Loop, artefacts: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    loaded: list[weakref.ref[PreTrainedModel]] = []

    def load(*args: Any, **options: Any) -> PreTrainedModel:
        assert [model for model in loaded if model() is not None] == []
        model = load_model(*args, **options)
        loaded.append(weakref.ref(model))
        return model

    monkeypatch.setattr("offsite_ray.evaluation.settings.load_model", load)
    evaluated(loop, bundle=str(loop.bundle), adapter=str(artefacts / "lora"))
    assert len(loaded) == 2


@pytest.mark.parametrize("method", METHODS)
def test_the_plug_in_in_memory_is_the_plugged_in_directory(
    loop: Loop, artefacts: Path, method: str
) -> None:
    tokens = torch.arange(40)[None]
    on_disk = load_model(artefacts / f"plugged-{method}")
    seen = []
    with torch.no_grad():
        for name, model in evaluated_models(loop, artefacts / method):
            seen.append(name)
            reference = {"plug_in": on_disk, "full_zero_shot": load_model(loop.model)}.get(name)
            if reference is not None:
                assert digest(model) == digest(reference)
                assert torch.equal(model(tokens).logits, reference(tokens).logits)
    assert seen == ["plug_in", "full_zero_shot", "emulator_fine_tuned", "emulator_zero_shot"]


@pytest.mark.parametrize("method", METHODS)
def test_the_emulator_that_is_evaluated_is_the_one_that_was_trained(
    loop: Loop, tmp_path: Path, method: str
) -> None:
    write_blocks([str(loop.rows)], loop.bundle, 32, tmp_path / "data")
    config = FinetuneConfig(
        bundle=str(loop.bundle),
        data=(str(tmp_path / "data"),),
        out=str(tmp_path / "adapter"),
        max_steps=3,
        batch_size=4,
        learning_rate=1e-2,
        method=method,
    )
    outcomes: list[TrainingOutcome] = []

    def fit(*args: Any) -> TrainingOutcome:
        outcomes.append(run_here(*args))
        return outcomes[-1]

    result = finetune(config, fit, ignore)
    for name, model in evaluated_models(loop, tmp_path / "adapter"):
        if name != "emulator_fine_tuned":
            continue
        _, held_out = split_blocks(tmp_path / "data", config.eval_fraction, config.seed)
        rows = [held_out[index] for index in range(len(held_out))]
        with torch.no_grad():
            total = LanguageModelLoss(model, use_positions=True)(**collate(rows, model.device))
        assert float(total["lm"]) / num_targets(rows) == pytest.approx(result.last_loss, rel=1e-5)
        if method in ("full", "bitfit"):
            trained = {
                name.removeprefix("language_model."): tensor
                for name, tensor in outcomes[0].state.items()
            }
            expected = load_model(loop.bundle)
            assert expected.load_state_dict(trained, strict=False).unexpected_keys == []
            assert digest(model) == digest(expected)
            assert digest(model) != digest(load_model(loop.bundle))


def test_a_bound_of_other_blocks_is_refused(loop: Loop, artefacts: Path, tmp_path: Path) -> None:
    every, bound = str(tmp_path / "every"), str(tmp_path / "bound")
    compress(CompressConfig(model=str(loop.model), plan="2-2-2", out=every))
    make_adapter(tmp_path / "every", tmp_path / "bound")
    given = {"bundle": str(loop.bundle), "adapter": str(artefacts / "full"), "bound": bound}
    with pytest.raises(PlugInError, match=r"blocks \[0, 1, 4, 5\].*blocks \[0, 5\]"):
        evaluated(loop, **given)
