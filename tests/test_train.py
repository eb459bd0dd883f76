# SPDX-License-Identifier: Apache-2.0
"""Ray Train with DeepSpeed: the same numbers as in one process, and what goes wrong."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import pytest
from ray.train.torch import TorchTrainer

from offsite_ray.bundle import TensorDirectory
from offsite_ray.config import DistillConfig, FinetuneConfig
from offsite_ray.distillation import DistillResult, distill
from offsite_ray.errors import ConfigError, TrainingError
from offsite_ray.finetuning import finetune
from offsite_ray.results import EvalRecord, RunStart, StepRecord, to_plain
from offsite_ray.train import run_on_ray
from offsite_ray.training import run_here
from tests.loops import Loop, ignore

if TYPE_CHECKING:
    from pathlib import Path

    from offsite_ray.training import Fit

pytestmark = [pytest.mark.slow, pytest.mark.usefixtures("ray_cluster")]

CLOSE = 3e-4
"""A tenth of the learning rate: Adam's first steps are long where a gradient is but rounding."""


def run(loop: Loop, out: Path, fit: Fit, **changes: Any) -> DistillResult:
    given = {"max_steps": 6, "batch_size": 4, "seq_len": 32, "learning_rate": 3e-3, **changes}
    config = DistillConfig(
        model=str(loop.model),
        bundle=str(loop.bundle),
        data=(str(loop.text),),
        out=str(out),
        **given,
    )
    return distill(config, fit, ignore)


def losses(result: DistillResult) -> list[float]:
    return [record.losses["loss"] for record in result.history.steps]


def largest_difference(a: Path, b: Path) -> float:
    left, right = TensorDirectory.of_model(a), TensorDirectory.of_model(b)
    assert set(left.tensors) == set(right.tensors)
    return max(
        float((left.read(name).float() - right.read(name).float()).abs().max())
        for name in left.tensors
    )


@pytest.fixture(scope="module")
def here(loop: Loop, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, DistillResult]:
    """Return the run that all others must equal: one process, no Ray."""
    out = tmp_path_factory.mktemp("here") / "out"
    return out, run(loop, out, run_here, num_workers=0)


@pytest.mark.parametrize(
    ("workers", "stage", "micro", "offload"),
    [
        (1, 0, None, "none"),
        (2, 0, 1, "none"),
        (2, 1, None, "optimizer"),
        (2, 2, 1, "none"),
        (2, 3, None, "none"),
        (2, 3, None, "all"),
    ],
)
def test_workers_and_stages_do_not_change_the_result(
    loop: Loop,
    here: tuple[Path, DistillResult],
    tmp_path: Path,
    workers: int,
    stage: int,
    micro: int | None,
    offload: str,
) -> None:
    reference, expected = here
    given: dict[str, Any] = {"num_workers": workers, "zero_stage": stage, "micro_batch_size": micro}
    given |= {"offload": offload}
    result = run(loop, tmp_path / "out", run_on_ray, **given)
    assert losses(result) == pytest.approx(losses(expected), rel=1e-4)
    assert result.last_losses == pytest.approx(expected.last_losses, rel=1e-4)
    assert largest_difference(tmp_path / "out", reference) < CLOSE


def test_bf16_masters_and_reports(
    loop: Loop, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[Any] = []
    ended: list[Any] = []
    fit = TorchTrainer.fit

    def watched(trainer: Any) -> Any:
        ended.append(fit(trainer))
        return ended[-1]

    monkeypatch.setattr(TorchTrainer, "fit", watched)
    config = FinetuneConfig(
        bundle=str(loop.bundle),
        data=(str(loop.rows),),
        out=str(tmp_path / "out"),
        method="lora",
        max_steps=4,
        batch_size=4,
        seq_len=32,
        learning_rate=1e-2,
        dtype="bf16",
        num_workers=2,
        zero_stage=2,
    )
    result = finetune(config, run_on_ray, seen.append)
    assert result.first_loss is not None
    assert result.last_loss is not None
    assert result.last_loss < result.first_loss
    assert isinstance(seen[0], RunStart)
    assert [r.step for r in seen if isinstance(r, StepRecord)] == [1, 2, 3, 4]
    evaluations = [record for record in seen if isinstance(record, EvalRecord)]
    assert len(evaluations) == 5
    # Ray Train has the same: the last evaluation, and the step before it.
    told = ended[0].metrics
    assert told["step"] == 4
    assert {name: told[name] for name in evaluations[-1].losses} == evaluations[-1].losses
    assert told["steps"] == [
        to_plain(record) for record in seen if isinstance(record, StepRecord) and record.step == 4
    ]


def test_more_workers_than_the_cluster_holds(loop: Loop, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="64 workers need 64 CPUs"):
        run(loop, tmp_path / "out", run_on_ray, num_workers=64, batch_size=64)
    assert list(tmp_path.iterdir()) == []


def test_an_error_on_a_worker_is_one_line(loop: Loop, tmp_path: Path) -> None:
    with pytest.raises(TrainingError, match="try a lower --learning-rate") as caught:
        run(loop, tmp_path / "out", run_on_ray, num_workers=1, learning_rate=1e30)
    assert "\n" not in str(caught.value)
    assert list(tmp_path.iterdir()) == []
