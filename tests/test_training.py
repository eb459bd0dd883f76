# SPDX-License-Identifier: Apache-2.0
"""The training loop in this process: schedule, global batch, resuming, errors."""

from __future__ import annotations

import math
from collections import Counter
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
import torch
from safetensors.torch import load_file

from offsite_ray.config import FinetuneConfig
from offsite_ray.data import IGNORED, PreparedData
from offsite_ray.errors import StorageError, TrainingError
from offsite_ray.finetuning import FinetuneResult, FinetuneTask, finetune
from offsite_ray.results import CheckpointRecord, EvalRecord, Record, RunStart, StepRecord
from offsite_ray.training import parameter_groups, run_here
from offsite_ray.training.batches import sum_cross_entropy
from offsite_ray.training.schedule import schedule
from tests.loops import Loop, Stopped, ignore, stop_after
from tests.tiny_models import save_tiny

if TYPE_CHECKING:
    from torch import Tensor


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


def test_two_runs_never_share_an_output(loop: Loop, tmp_path: Path) -> None:
    given = config(loop, tmp_path / "out")
    refused: list[str] = []

    def start_another(record: Record) -> None:
        if isinstance(record, RunStart):
            with pytest.raises(StorageError, match="another run is writing") as caught:
                finetune(given, run_here, ignore)
            refused.append(str(caught.value))

    finetune(given, run_here, start_another)
    assert len(refused) == 1
    assert sorted(path.name for path in tmp_path.iterdir()) == ["out"]


def test_a_checkpoint_of_other_settings_is_refused(loop: Loop, tmp_path: Path) -> None:
    with pytest.raises(Stopped):
        finetune(config(loop, tmp_path / "out", checkpoint_every=2), run_here, stop_after(3))
    other = config(loop, tmp_path / "out", checkpoint_every=2, weight_decay=0.1, resume=True)
    with pytest.raises(TrainingError, match=r"weight_decay was 0\.0 and is 0\.1"):
        finetune(other, run_here, ignore)


def test_a_run_that_had_too_little_memory_goes_on_with_recomputation(
    loop: Loop, tmp_path: Path
) -> None:
    with pytest.raises(Stopped):
        finetune(config(loop, tmp_path / "out", checkpoint_every=2), run_here, stop_after(3))
    given = {"checkpoint_every": 2, "resume": True, "gradient_checkpointing": True}
    resumed = finetune(config(loop, tmp_path / "out", **given), run_here, ignore)
    straight = finetune(config(loop, tmp_path / "straight"), run_here, ignore)
    assert trained(resumed) == pytest.approx(trained(straight), rel=1e-5)


def test_a_failed_run_without_checkpoint_leaves_nothing(loop: Loop, tmp_path: Path) -> None:
    with pytest.raises(TrainingError, match="learning-rate"):
        finetune(config(loop, tmp_path / "out", learning_rate=1e30), run_here, ignore)
    assert list(tmp_path.iterdir()) == []


def test_records_come_in_order(loop: Loop, tmp_path: Path) -> None:
    seen: list[Any] = []
    finetune(config(loop, tmp_path / "out", eval_every=3), run_here, seen.append)
    written = [record for record in seen if isinstance(record, CheckpointRecord)]
    assert [record.step for record in written] == [1, 2, 3, 4, 5]
    seen = [record for record in seen if record not in written]
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
    steps = [record for record in seen if isinstance(record, StepRecord)]
    assert all(record.tokens_per_s and record.tokens_per_s > 0 for record in steps)


def test_vectors_are_never_decayed() -> None:
    module = torch.nn.Sequential(torch.nn.Linear(3, 4), torch.nn.LayerNorm(4))
    module[1].bias.requires_grad_(False)
    groups = parameter_groups(module, weight_decay=0.1)
    assert [(g["weight_decay"], [p.ndim for p in g["params"]]) for g in groups] == [
        (0.1, [2]),
        (0.0, [1, 1]),
    ]


def mapped_bytes(file: Path) -> int:
    """How much of a file this process has in memory by mapping it."""
    total, inside = 0, False
    for line in Path("/proc/self/smaps").read_text().splitlines():
        words = line.split()
        if not words[0].endswith(":"):
            inside = words[-1] == str(file)
        elif inside and words[0] == "Rss:":
            total += int(words[1]) * 1024
    return total


@pytest.mark.skipif(not Path("/proc/self/smaps").exists(), reason="reads what Linux has mapped")
def test_weights_that_train_in_float32_do_not_stay_in_memory_in_bf16_too(tmp_path: Path) -> None:
    directory = save_tiny("gpt2", tmp_path / "model", dtype=torch.bfloat16, n_inner=2**13)
    task = FinetuneTask(
        model=str(directory),
        model_id="",
        blocks=None,
        indices=(0, 1, 2),
        config=FinetuneConfig(bundle="b", data=("d",), out="o", dtype="bf16"),
        data=PreparedData(path=tmp_path, block_size=8, num_blocks=1, tokenizer=""),
        use_positions=True,
    )
    built: Any = task.build(torch.device("cpu"))
    module = built.language_model
    names = [name for name, parameter in module.named_parameters() if parameter.requires_grad]
    file = directory / "model.safetensors"
    stored = load_file(file)
    for name, parameter in module.named_parameters():
        assert torch.equal(parameter.detach().bfloat16(), stored[name]), name
    assert module.lm_head.weight is module.transformer.wte.weight
    del stored
    trained = sum(module.get_parameter(name).numel() for name in names) * 2
    assert 0 < mapped_bytes(file) < file.stat().st_size - trained / 2


def plain_cross_entropy(logits: Tensor, labels: Tensor) -> Tensor:
    """The definition, in the precision of the logits."""
    scores = torch.log_softmax(logits[:, :-1], -1)
    targets = labels[:, 1:]
    chosen = scores.gather(2, targets.clamp(min=0)[..., None])[..., 0]
    return -chosen[targets != IGNORED].sum()


@pytest.mark.parametrize("pieces", ["one", "many"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("shape", [(1, 2, 3), (2, 5, 11), (3, 40, 257)])
@pytest.mark.parametrize("scale", [1.0, 1000.0])
def test_cross_entropy_is_the_shifted_sum_over_targets(
    monkeypatch: pytest.MonkeyPatch,
    shape: tuple[int, int, int],
    dtype: torch.dtype,
    scale: float,
    pieces: str,
) -> None:
    """Value and gradient against the definition in float64: only the last rounding differs."""
    if pieces == "many":
        monkeypatch.setattr("offsite_ray.training.batches._CPU_PIECE", 3 * shape[2])
    torch.manual_seed(0)
    given = (torch.randn(shape) * scale).to(dtype)
    labels = torch.randint(shape[2], shape[:2])
    labels[:, 2::3] = IGNORED
    exact = given.double().requires_grad_()
    expected = plain_cross_entropy(exact, labels)
    (expected / 7).backward()  # type: ignore[no-untyped-call]
    assert exact.grad is not None
    leaf = given.clone().requires_grad_()
    for logits in (leaf, leaf * 1):  # the second is overwritten
        leaf.grad = None
        loss = sum_cross_entropy(logits, labels)
        assert loss.dtype == torch.float32
        torch.testing.assert_close(loss.double(), expected, rtol=1e-6, atol=1e-6)
        (loss / 7).backward()  # type: ignore[no-untyped-call]
        assert leaf.grad is not None
        close = {"rtol": 1e-5, "atol": 1e-7} if dtype is torch.float32 else {}
        torch.testing.assert_close(leaf.grad, exact.grad.to(dtype), **close)
        assert torch.equal(leaf, given)


def test_cross_entropy_without_a_target_is_zero() -> None:
    logits = torch.randn(1, 4, 5, requires_grad=True)
    loss = sum_cross_entropy(logits, torch.full((1, 4), IGNORED))
    (gradient,) = torch.autograd.grad(loss, logits)
    assert float(loss.detach()) == 0
    assert torch.equal(gradient, torch.zeros(1, 4, 5))


def test_cross_entropy_overwrites_no_logits_that_something_else_needs() -> None:
    scores = torch.randn(1, 4, 5, requires_grad=True)
    logits = scores.tanh()  # its derivative is a function of the logits
    loss = sum_cross_entropy(logits, torch.tensor([[0, 1, 2, 3]]))
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()  # type: ignore[no-untyped-call]
