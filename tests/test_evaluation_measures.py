# SPDX-License-Identifier: Apache-2.0
"""What an evaluation measures: perplexity and lm-eval tasks, against plain references."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

import pytest
import torch
from torch.nn import functional

from offsite_ray.architectures import load_model, load_tokenizer
from offsite_ray.errors import DataError, TrainingError
from offsite_ray.evaluation.perplexity import context_length, encode, perplexity
from offsite_ray.evaluation.task_loading import load_tasks
from offsite_ray.evaluation.tasks import run_tasks
from tests.questions import GENERATING, QUESTIONS, own_task, write_questions
from tests.tiny_models import tiny_model, tiny_tokenizer

if TYPE_CHECKING:
    from pathlib import Path

    from transformers import PreTrainedModel

    from offsite_ray.results import Perplexity
    from tests.loops import Loop


pytestmark = pytest.mark.usefixtures("dataset_cache")

TEXTS = ["Caf\u00e9 au lait", "ab", "", "a", "The cat sat on the mat and slept. " * 3]


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
