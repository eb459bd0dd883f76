# SPDX-License-Identifier: Apache-2.0
"""The training loop in this process: schedule, global batch, resuming, errors."""

from __future__ import annotations

import math
from collections import Counter
from typing import TYPE_CHECKING, Any

import pytest
import torch

from offsite_ray.config import FinetuneConfig
from offsite_ray.errors import StorageError, TrainingError
from offsite_ray.finetuning import FinetuneResult, finetune
from offsite_ray.results import EvalRecord, RunStart, StepRecord
from offsite_ray.training import parameter_groups, run_here
from offsite_ray.training.batches import sum_cross_entropy
from offsite_ray.training.schedule import schedule
from tests.loops import Loop, Stopped, ignore, stop_after

if TYPE_CHECKING:
    from pathlib import Path


def config(loop: Loop, out: Path, **changes: Any) -> FinetuneConfig:
    given = {"max_steps": 6, "batch_size": 4, "seq_len": 32, "learning_rate": 3e-3, **changes}
    return FinetuneConfig(bundle=str(loop.bundle), data=(str(loop.text),), out=str(out), **given)


def trained(result: FinetuneResult) -> list[float]:
    return [record.losses["loss"] for record in result.history.steps]


def test_every_row_comes_once_an_epoch_and_epochs_differ() -> None:
    plan = schedule(FinetuneConfig(model="m", data=("d",), out="o", epochs=3, batch_size=7), 20)
    rows = [row for step in range(plan.total_steps) for row in plan.rows(step)]
    assert plan.total_steps == math.ceil(3 * 20 / 7)
    assert Counter(rows[:60]) == Counter(dict.fromkeys(range(20), 3))
    assert rows[:20] != rows[20:40]


def test_the_learning_rate_rises_and_falls_to_zero() -> None:
    given = FinetuneConfig(
        model="m", data=("d",), out="o", max_steps=100, warmup_fraction=0.1, learning_rate=1.0
    )
    rates = [schedule(given, 50).learning_rate(step) for step in range(100)]
    assert rates[0] == pytest.approx(0.1)
    assert rates[9] == pytest.approx(1.0)
    assert max(rates) == 1.0
    assert rates[10:] == sorted(rates[10:], reverse=True)
    assert rates[-1] < 0.001


@pytest.mark.parametrize("micro", [1, 3])
def test_micro_batches_do_not_change_the_result(loop: Loop, tmp_path: Path, micro: int) -> None:
    whole = finetune(config(loop, tmp_path / "a"), run_here, ignore)
    cut = finetune(config(loop, tmp_path / "b", micro_batch_size=micro), run_here, ignore)
    assert trained(cut) == pytest.approx(trained(whole), rel=1e-5)
    assert cut.last_loss == pytest.approx(whole.last_loss, rel=1e-5)


@pytest.mark.parametrize("method", ["full", "lora", "bottleneck", "bitfit"])
@pytest.mark.parametrize("stop", [3, 5])
def test_a_stopped_run_resumes_to_the_same_end(
    loop: Loop, tmp_path: Path, method: str, stop: int
) -> None:
    given = {"method": method, "checkpoint_every": 2}
    straight = finetune(config(loop, tmp_path / "straight", **given), run_here, ignore)
    with pytest.raises(Stopped):
        finetune(config(loop, tmp_path / "stopped", **given), run_here, stop_after(stop))
    assert not (tmp_path / "stopped").exists()
    assert (tmp_path / ".stopped.run").is_dir()
    seen: list[Any] = []
    resumed = finetune(
        config(loop, tmp_path / "stopped", **given, resume=True), run_here, seen.append
    )
    assert isinstance(seen[0], RunStart)
    assert seen[0].first_step == 2 * ((stop - 1) // 2)
    assert trained(resumed) == trained(straight)
    assert resumed.history.evaluations == straight.history.evaluations
    for file in (tmp_path / "straight").glob("*.safetensors"):
        assert file.read_bytes() == (tmp_path / "stopped" / file.name).read_bytes()
    assert not (tmp_path / ".stopped.run").exists()


def test_a_leftover_run_is_not_overwritten(loop: Loop, tmp_path: Path) -> None:
    given = config(loop, tmp_path / "out", checkpoint_every=2)
    with pytest.raises(Stopped):
        finetune(given, run_here, stop_after(3))
    with pytest.raises(StorageError, match="--resume"):
        finetune(given, run_here, ignore)


def test_a_checkpoint_of_other_settings_is_refused(loop: Loop, tmp_path: Path) -> None:
    with pytest.raises(Stopped):
        finetune(config(loop, tmp_path / "out", checkpoint_every=2), run_here, stop_after(3))
    other = config(loop, tmp_path / "out", checkpoint_every=2, learning_rate=1e-3, resume=True)
    with pytest.raises(TrainingError, match=r"learning_rate was 0\.003 and is 0\.001"):
        finetune(other, run_here, ignore)


def test_a_failed_run_without_checkpoint_leaves_nothing(loop: Loop, tmp_path: Path) -> None:
    with pytest.raises(TrainingError, match="learning-rate"):
        finetune(config(loop, tmp_path / "out", learning_rate=1e30), run_here, ignore)
    assert list(tmp_path.iterdir()) == []


def test_records_come_in_order(loop: Loop, tmp_path: Path) -> None:
    seen: list[Any] = []
    finetune(config(loop, tmp_path / "out", eval_every=3), run_here, seen.append)
    kinds = [type(record) for record in seen]
    assert kinds == [
        RunStart,
        EvalRecord,
        *[StepRecord] * 3,
        EvalRecord,
        *[StepRecord] * 3,
        EvalRecord,
    ]
    assert [r.step for r in seen[1:]] == [0, 1, 2, 3, 3, 4, 5, 6, 6]
    assert all(record.tokens_per_s > 0 for record in seen if isinstance(record, StepRecord))


def test_vectors_are_never_decayed() -> None:
    module = torch.nn.Sequential(torch.nn.Linear(3, 4), torch.nn.LayerNorm(4))
    module[1].bias.requires_grad_(False)
    groups = parameter_groups(module, weight_decay=0.1)
    assert [(g["weight_decay"], [p.ndim for p in g["params"]]) for g in groups] == [
        (0.1, [2]),
        (0.0, [1, 1]),
    ]


def test_cross_entropy_is_the_shifted_sum_over_targets() -> None:
    torch.manual_seed(0)
    logits = torch.randn(2, 5, 11, requires_grad=True)
    labels = torch.randint(11, (2, 5))
    labels[0, 3] = -100
    expected = sum(
        -torch.log_softmax(logits[b, t - 1], -1)[labels[b, t]]
        for b in range(2)
        for t in range(1, 5)
        if labels[b, t] != -100
    )
    loss = sum_cross_entropy(logits, labels)
    assert torch.allclose(loss, torch.as_tensor(expected))
    (gradient,) = torch.autograd.grad(loss, logits)
    (reference,) = torch.autograd.grad(torch.as_tensor(expected), logits)
    assert torch.allclose(gradient, reference, atol=1e-6)
