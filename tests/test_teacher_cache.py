# SPDX-License-Identifier: Apache-2.0
"""The teacher's outputs on disk: the losses of the teacher itself, and only where they belong."""

from __future__ import annotations

import dataclasses
import json
import os
from typing import TYPE_CHECKING, Any

import pytest
import torch

from offsite_ray.config import CompressConfig, DistillConfig
from offsite_ray.distillation import DistillResult, distill, fill_here
from offsite_ray.distillation.cache import CACHE_MANIFEST, CacheTask, ensure_cache
from offsite_ray.emulator import compress, open_bundle
from offsite_ray.errors import CacheError, ConfigError, StorageError
from offsite_ray.train import fill_on_ray
from offsite_ray.training import run_here
from tests.loops import Loop, distill_config, ignore
from tests.tiny_models import save_tiny

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence
    from pathlib import Path

EVERY_LOSS = {"layerwise_weight": 2.0, "logits_weight": 3.0, "temperature": 2.0}


def config(loop: Loop, out: Path, **changes: Any) -> DistillConfig:
    return distill_config(loop, out, **{"max_steps": 6, "learning_rate": 3e-3, **changes})


def run(given: DistillConfig, fill: Any = fill_here) -> DistillResult:
    return distill(given, run_here, ignore, None, fill)


@pytest.mark.parametrize("weights", [{}, EVERY_LOSS, {"hidden_weight": 0.0, "logits_weight": 1.0}])
@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
def test_the_losses_are_those_with_the_teacher(
    loop: Loop, tmp_path: Path, weights: dict[str, float], dtype: str
) -> None:
    close = 1e-4 if dtype == "fp32" else 3e-2
    given = {"dtype": dtype, "max_steps": 4, **weights}
    plain = run(config(loop, tmp_path / "plain", **given))
    cached = run(config(loop, tmp_path / "cached", **given, teacher_cache=str(tmp_path / "cache")))
    assert len(cached.history.steps) == 4
    for ours, theirs in zip(cached.history.steps, plain.history.steps, strict=True):
        assert ours.losses == pytest.approx(theirs.losses, rel=close)
    assert cached.last_losses == pytest.approx(plain.last_losses, rel=close)
    drift = {"drift/1", "drift/4"} if "layerwise_weight" in weights else {"drift/4"}
    assert set(cached.history.evaluations[-1].diagnostics) == drift


@pytest.mark.parametrize("family", ["llama", "gemma3_text", "opt", "bloom"])
def test_other_families(family: str, tmp_path: Path) -> None:
    from tests.loops import make_loop

    loop = make_loop(tmp_path / "loop", family)
    plain = run(config(loop, tmp_path / "plain", max_steps=2, **EVERY_LOSS))
    cache = {"teacher_cache": str(tmp_path / "cache")}
    cached = run(config(loop, tmp_path / "cached", max_steps=2, **EVERY_LOSS, **cache))
    assert cached.last_losses == pytest.approx(plain.last_losses, rel=1e-3)


def test_one_cache_serves_emulators_of_other_blocks_without_the_teacher(
    loop: Loop, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    cache = {"teacher_cache": str(tmp_path / "cache")}
    run(config(loop, tmp_path / "a", **cache))
    other = tmp_path / "other"
    compress(CompressConfig(model=str(loop.model), plan="1-3-1", out=str(other)))
    plain = run(config(loop, tmp_path / "plain", bundle=str(other)))
    loaded: list[str] = []
    real = torch.nn.Module.requires_grad_

    def fill(*_: Any) -> None:
        raise AssertionError("the cache is whole")

    def spy(module: Any, value: bool = True) -> Any:
        if hasattr(module, "config") and hasattr(module.config, "num_hidden_layers"):
            loaded.append(str(module.config.num_hidden_layers))
        return real(module, value)

    monkeypatch.setattr(torch.nn.Module, "requires_grad_", spy)
    cached = run(config(loop, tmp_path / "b", bundle=str(other), **cache), fill)
    assert set(loaded) == {"5"}  # the emulator model's blocks; the full model has six
    assert cached.last_losses == pytest.approx(plain.last_losses, rel=1e-4)
    assert open_bundle(tmp_path / "b").manifest.recipe["distillation"]["losses"] == ["hidden", "lm"]


def refuse(change: Callable[[Loop, Path], dict[str, Any]], said: str) -> Any:
    return pytest.param(change, said, id=said.split()[0])


def other_model(loop: Loop, folder: Path) -> dict[str, Any]:
    save_tiny("gpt2", folder / "model", seed=1)
    plan = CompressConfig(model=str(folder / "model"), plan="1-2-1", out=str(folder / "bundle"))
    compress(plan)
    return {"model": str(folder / "model"), "bundle": str(folder / "bundle")}


def other_boundaries(loop: Loop, folder: Path) -> dict[str, Any]:
    compress(CompressConfig(model=str(loop.model), plan="1-2-2", out=str(folder / "bundle")))
    return {"bundle": str(folder / "bundle")}


def other_data(loop: Loop, folder: Path) -> dict[str, Any]:
    folder.mkdir(exist_ok=True)
    (folder / "text.txt").write_text(loop.text.read_text() + " One more sentence.")
    return {"data": (str(folder / "text.txt"),)}


@pytest.mark.parametrize(
    ("change", "said"),
    [
        refuse(other_model, "another full model"),
        refuse(other_boundaries, r"other blocks \(\[4\], and \[3\] is needed\)"),
        refuse(other_data, "other prepared data"),
        refuse(lambda _loop, _folder: {"dtype": "bf16"}, "another arithmetic"),
        refuse(lambda _loop, _folder: {"layerwise_weight": 1.0}, r"other blocks \(\[4\]"),
    ],
)
def test_a_cache_of_something_else_is_refused(
    loop: Loop, tmp_path: Path, change: Callable[[Loop, Path], dict[str, Any]], said: str
) -> None:
    cache = {"teacher_cache": str(tmp_path / "cache")}
    run(config(loop, tmp_path / "a", **cache))
    before = sorted((tmp_path / "cache").iterdir())
    with pytest.raises(CacheError, match=said):
        run(config(loop, tmp_path / "b", **{**cache, **change(loop, tmp_path / "other")}))
    assert sorted((tmp_path / "cache").iterdir()) == before
    assert not (tmp_path / "b").exists()


def test_a_damaged_cache_is_refused(loop: Loop, tmp_path: Path) -> None:
    cache = {"teacher_cache": str(tmp_path / "cache")}
    run(config(loop, tmp_path / "a", **cache))
    (file,) = (tmp_path / "cache").glob("*.safetensors")
    os.truncate(file, file.stat().st_size - 4)
    with pytest.raises(CacheError, match="damaged teacher cache"):
        run(config(loop, tmp_path / "b", **cache))
    (tmp_path / "cache" / CACHE_MANIFEST).write_text("{}")
    with pytest.raises(CacheError, match="damaged teacher cache"):
        run(config(loop, tmp_path / "b", **cache))


def test_a_directory_that_holds_something_else_is_left_alone(loop: Loop, tmp_path: Path) -> None:
    (tmp_path / "cache").mkdir()
    (tmp_path / "cache" / "thesis.txt").write_text("mine")
    with pytest.raises(CacheError, match="is not empty and no cache"):
        run(config(loop, tmp_path / "a", teacher_cache=str(tmp_path / "cache")))
    assert [path.name for path in (tmp_path / "cache").iterdir()] == ["thesis.txt"]


def test_what_cannot_be_cached_is_said(loop: Loop, tmp_path: Path) -> None:
    cache = {"teacher_cache": str(tmp_path / "cache")}
    with pytest.raises(ConfigError, match="nothing to cache"):
        run(config(loop, tmp_path / "a", hidden_weight=0.0, **cache))
    plan = "adapter=0,3 emulator=2"
    compress(CompressConfig(model=str(loop.model), plan=plan, out=str(tmp_path / "bundle")))
    with pytest.raises(ConfigError, match=r"keeps none of the blocks \[4, 5\]"):
        run(config(loop, tmp_path / "a", bundle=str(tmp_path / "bundle"), **cache))
    assert not (tmp_path / "cache").exists()


def small_files(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("offsite_ray.distillation.cache._FILE_BYTES", 8 * 32 * 32 * 4)


def test_writing_goes_on_where_it_stopped(
    loop: Loop, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    small_files(monkeypatch)
    cache = {"teacher_cache": str(tmp_path / "cache")}
    asked: list[list[int]] = []

    def stop_after_two(
        task: CacheTask, given: DistillConfig, parts: Sequence[int], tell: Callable[[int], None]
    ) -> None:
        asked.append(list(parts))
        fill_here(task, given, parts[:2], tell)
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        run(config(loop, tmp_path / "a", **cache), stop_after_two)
    assert len(asked[0]) > 3
    assert not (tmp_path / "cache" / CACHE_MANIFEST).exists()

    def go_on(
        task: CacheTask, given: DistillConfig, parts: Sequence[int], tell: Callable[[int], None]
    ) -> None:
        asked.append(list(parts))
        fill_here(task, given, parts, tell)

    result = run(config(loop, tmp_path / "a", **cache), go_on)
    assert asked[1] == asked[0][2:]
    assert result.last_losses["hidden"] < result.first_losses["hidden"]
    key = json.loads((tmp_path / "cache" / CACHE_MANIFEST).read_text())["key"]
    assert key["ends"] == [4]


def test_another_run_may_write_the_same_cache_meanwhile(
    loop: Loop, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It ends while this one computes, or just when this one looks what is there."""
    computed: list[int] = []

    def fill(
        task: CacheTask, given: DistillConfig, parts: Sequence[int], tell: Callable[[int], None]
    ) -> None:
        computed.append(len(parts))
        fill_here(task, given, parts, tell)

    def fill_behind(
        task: CacheTask, given: DistillConfig, parts: Sequence[int], tell: Callable[[int], None]
    ) -> None:
        ensure_cache(task, given, fill, lambda _: None)
        fill(task, given, parts, tell)

    result = run(config(loop, tmp_path / "a", teacher_cache=str(tmp_path / "a-cache")), fill_behind)
    assert computed == [1, 1]
    assert result.last_losses["hidden"] < result.first_losses["hidden"]
    assert not (tmp_path / "a-cache/begun.json").exists()

    given = config(loop, tmp_path / "b", teacher_cache=str(tmp_path / "b-cache"))
    place = "offsite_ray.distillation.cache.check_parent"

    def other_run_ends(_: Path) -> None:
        monkeypatch.setattr(place, lambda _: None)
        run(config(loop, tmp_path / "c", teacher_cache=str(tmp_path / "b-cache")), fill)

    monkeypatch.setattr(place, other_run_ends)
    run(given, fill)
    assert computed == [1, 1, 1]


def test_what_a_killed_run_left_half_written_is_removed(loop: Loop, tmp_path: Path) -> None:
    folder = tmp_path / "cache"
    folder.mkdir()
    old, young = folder / ".begun.json.tmp-1-00", folder / ".teacher-000000.safetensors.tmp-2-00"
    for file in (old, young):
        file.write_text("{")
    os.utime(old, (0, 0))
    run(config(loop, tmp_path / "a", teacher_cache=str(folder)))
    assert not old.exists()
    assert young.exists()  # of a run that may be alive


def test_a_file_system_that_refuses_is_quoted_and_nothing_said_of_what_stays(
    loop: Loop, tmp_path: Path
) -> None:
    begun = tmp_path / "cache" / "begun.json"
    begun.mkdir(parents=True)
    with pytest.raises(StorageError, match=f"^{begun}: Is a directory$"):
        run(config(loop, tmp_path / "a", teacher_cache=str(begun.parent)))


@pytest.mark.slow
@pytest.mark.usefixtures("ray_cluster")
def test_what_an_actor_raises_is_raised_here(loop: Loop, tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()

    def fill(task: CacheTask, *given: Any) -> None:
        assert task.batch_size == 2  # a worker's share
        fill_on_ray(dataclasses.replace(task, model=str(tmp_path / "empty")), *given)

    given = config(loop, tmp_path / "a", teacher_cache=str(tmp_path / "cache"), num_workers=2)
    with pytest.raises(StorageError, match="empty") as caught:
        run(given, fill)
    assert "\n" not in str(caught.value)


@pytest.mark.slow
@pytest.mark.usefixtures("ray_cluster")
def test_actors_write_the_same_files(
    loop: Loop, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    small_files(monkeypatch)
    for folder, fill, workers in (("here", fill_here, 0), ("ray", fill_on_ray, 2)):
        given = config(loop, tmp_path / "out" / folder, teacher_cache=str(tmp_path / folder))
        run(DistillConfig(**{**vars_of(given), "num_workers": workers}), fill)
    ours, theirs = (
        {p.name: p.read_bytes() for p in (tmp_path / folder).iterdir()}
        for folder in ("ray", "here")
    )
    assert len(ours) > 4
    assert ours == theirs


def vars_of(given: DistillConfig) -> dict[str, Any]:
    return {name: getattr(given, name) for name in type(given).__dataclass_fields__}
