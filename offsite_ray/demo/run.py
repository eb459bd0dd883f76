# SPDX-License-Identifier: Apache-2.0
"""The demo: both parties on one machine, each in a folder of its own, with the real verbs."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import time
from dataclasses import MISSING, dataclass, field, fields
from pathlib import Path
from typing import TYPE_CHECKING, Any

import offsite_ray
from offsite_ray.bundle import check_free
from offsite_ray.config import (
    CompressConfig,
    DistillConfig,
    EvaluateConfig,
    FinetuneConfig,
    PlugInConfig,
)
from offsite_ray.demo.folders import Folders, write_texts
from offsite_ray.demo.page import write_page
from offsite_ray.demo.recipe import DemoRecipe
from offsite_ray.demo.task import TASK_NAME
from offsite_ray.errors import StorageError, TrainingError
from offsite_ray.results import (
    EvalRecord,
    EvaluationResult,
    RunStart,
    StepRecord,
    TrainingHistory,
)
from offsite_ray.uris import refuse_uri

if TYPE_CHECKING:
    from collections.abc import Callable

    from offsite_ray.config import DemoConfig
    from offsite_ray.results import Record, Report

_ROOT = Path(offsite_ray.__file__).resolve().parents[1]


@dataclass(frozen=True, kw_only=True, slots=True)
class DemoResult:
    """What the demo measured, and where to look at it."""

    out: str
    report: str
    picture: str
    evaluation: EvaluationResult
    seconds: float


@dataclass(frozen=True, slots=True)
class Demo:
    """A demo that is running: where, how much, whom to tell, and what was measured so far."""

    folders: Folders
    recipe: DemoRecipe
    tell: Callable[[str], None]
    seconds: dict[str, float] = field(default_factory=dict)
    """Name of a step to the time it took."""
    histories: dict[str, TrainingHistory] = field(default_factory=dict)
    """Name of a training run to its losses."""


def run_demo(config: DemoConfig, tell: Callable[[str], None]) -> DemoResult:
    """Run the whole loop and write a report.

    Args:
        config: Where to, and how much.
        tell: Told what happens, a line at a time.

    Raises:
        OffsiteError: The foundation is missing, the folder is taken, or a step fails.
    """
    start = time.perf_counter()
    refuse_uri("--out", config.out)
    foundation = _foundation(config)
    demo = Demo(Folders(Path(config.out).resolve()), DemoRecipe().scaled(config.scale), tell)
    folders = demo.folders
    check_free(folders.root)
    for folder in (folders.owner, folders.data_owner, folders.evaluation):
        folder.mkdir(parents=True)
    shutil.copytree(foundation, folders.full_model, ignore=shutil.ignore_patterns("*.py", "*.md"))
    write_texts(folders, demo.recipe)
    owner_makes_bundle(demo)
    data_owner_trains(demo)
    owner_plugs_in(demo)
    train_yardsticks(demo)
    evaluation = evaluate_all(demo)
    page, picture = write_page(folders, demo.recipe, evaluation, demo.histories, demo.seconds)
    tell(f"wrote {page} and {picture.name} after {time.perf_counter() - start:.0f} s")
    return DemoResult(
        out=str(folders.root),
        report=str(page),
        picture=str(picture),
        evaluation=evaluation,
        seconds=time.perf_counter() - start,
    )


def _foundation(config: DemoConfig) -> Path:
    checkout = _ROOT / "examples" / "foundation"
    path = checkout if config.foundation is None else Path(config.foundation)
    if not (path / "config.json").is_file():
        raise StorageError(
            f"{path} holds no model; run the demo from a checkout of the project, or give "
            "--foundation DIR"
        )
    return path


def owner_makes_bundle(demo: Demo) -> None:
    """Compress the full model, distil the emulator on public text, hand the bundle out."""
    from offsite_ray.distillation import distill
    from offsite_ray.emulator import compress
    from offsite_ray.train import run_on_ray

    folders, recipe = demo.folders, demo.recipe
    full, bundle = str(folders.full_model), str(folders.compressed)
    demo.tell(f"1/6 owner: compress to {recipe.plan}")
    made = compress(CompressConfig(model=full, plan=recipe.plan, out=bundle), demo.tell)
    demo.seconds["compress"] = made.seconds
    demo.tell(
        f"2/6 owner: distil on public text, {recipe.distill_workers} Ray Train workers, ZeRO-3"
    )
    distilled = distill(
        DistillConfig(
            model=full,
            bundle=bundle,
            data=(str(folders.public),),
            out=str(folders.distilled),
            max_steps=recipe.distill_steps,
            batch_size=recipe.distill_batch_size,
            learning_rate=recipe.distill_learning_rate,
            seq_len=recipe.seq_len,
            eval_every=max(1, recipe.distill_steps // 6),
            eval_fraction=0.003,
            num_workers=recipe.distill_workers,
            zero_stage=3,
            dtype="bf16",
        ),
        run_on_ray,
        training_lines("distillation", demo.tell),
        demo.tell,
    )
    demo.seconds["distill"] = distilled.seconds
    demo.histories["distillation"] = distilled.history
    shutil.copytree(folders.distilled, folders.received)


def data_owner_trains(demo: Demo) -> None:
    """Fine-tune in a process of its own, whose folder holds the bundle and the private text."""
    demo.tell("3/6 data owner: fine-tune the adapter blocks on private text, in its own process")
    folders = demo.folders
    given = {"bundle": folders.received, "data": folders.private, "out": folders.adapter}
    names = {name: str(path.relative_to(folders.data_owner)) for name, path in given.items()}
    config = _finetune_config(demo.recipe, **{**names, "data": (names["data"],)})
    result = in_own_process("finetune", config, folders.data_owner)
    demo.seconds["finetune"] = result["seconds"]
    demo.histories["fine-tuning (data owner)"] = TrainingHistory.from_plain(result["history"])


def _finetune_config(recipe: DemoRecipe, **given: Any) -> FinetuneConfig:
    return FinetuneConfig(
        max_steps=recipe.finetune_steps,
        batch_size=recipe.finetune_batch_size,
        learning_rate=recipe.finetune_learning_rate,
        seq_len=recipe.seq_len,
        eval_every=max(1, recipe.finetune_steps // 5),
        eval_fraction=0.01,
        dtype="bf16",
        **given,
    )


def in_own_process(verb: str, config: FinetuneConfig, folder: Path) -> dict[str, Any]:
    """Run ``offsite-ray VERB --json`` in a folder; return what it prints.

    Raises:
        TrainingError: The process ended with an error, which it has printed.
    """
    command = [sys.executable, "-m", "offsite_ray", verb, "--json", *_flags(config)]
    paths = os.pathsep.join(filter(None, (str(_ROOT), os.environ.get("PYTHONPATH"))))
    done = subprocess.run(
        command,
        cwd=folder,
        env={**os.environ, "PYTHONPATH": paths},
        stdout=subprocess.PIPE,
        text=True,
        check=False,
    )
    if done.returncode != 0:
        raise TrainingError(f"the data owner's process ended with status {done.returncode}")
    result: dict[str, Any] = json.loads(done.stdout)
    return result


def _flags(config: FinetuneConfig) -> list[str]:
    """Return a configuration as flags, those left out that have their default."""
    flags = []
    for known in fields(config):
        value = getattr(config, known.name)
        if known.default is MISSING or value != known.default:
            values = value if isinstance(value, tuple) else (value,)
            flags += [f"--{known.name.replace('_', '-')}", *map(str, values)]
    return flags


def owner_plugs_in(demo: Demo) -> None:
    """Put the data owner's adapter blocks into the full model."""
    from offsite_ray.plug_in import plug_in

    folders = demo.folders
    demo.tell("4/6 owner: plug the adapter in")
    config = PlugInConfig(
        model=str(folders.full_model), adapter=str(folders.adapter), out=str(folders.plugged_in)
    )
    demo.seconds["plug in"] = plug_in(config, demo.tell).seconds


def train_yardsticks(demo: Demo) -> None:
    """Train what the plug-in is judged against, which needs both parties' things together."""
    from offsite_ray.architectures import load_config
    from offsite_ray.emulator import compress
    from offsite_ray.finetuning import finetune
    from offsite_ray.training import run_here

    folders, full = demo.folders, str(demo.folders.full_model)
    demo.tell("5/6 yardsticks: the bound (same adapter blocks in the full model), full fine-tuning")
    every = str(folders.evaluation / "keep-all-bundle")
    bottom, _, top = map(int, demo.recipe.plan.split("-"))
    kept = load_config(full).num_hidden_layers - bottom - top
    compress(CompressConfig(model=full, plan=f"{bottom}-{kept}-{top}", out=every), demo.tell)
    for name, given in {
        "bound": {"bundle": every, "out": str(folders.bound)},
        "full fine-tuning": {"model": full, "out": str(folders.fine_tuned)},
    }.items():
        config = _finetune_config(demo.recipe, data=(str(folders.private),), **given)
        result = finetune(config, run_here, training_lines(name, demo.tell), demo.tell)
        demo.seconds[name] = result.seconds
        demo.histories[name] = result.history


def evaluate_all(demo: Demo) -> EvaluationResult:
    """Measure the five settings and the bound on held-out private text and an lm-eval task."""
    from offsite_ray.evaluation import evaluate

    folders = demo.folders
    demo.tell("6/6 evaluate: five settings and the bound, held-out text and an lm-eval task")
    return evaluate(
        EvaluateConfig(
            model=str(folders.full_model),
            bundle=str(folders.received),
            adapter=str(folders.adapter),
            bound=str(folders.bound),
            finetuned=str(folders.fine_tuned),
            text=(str(folders.held_out),),
            tasks=(TASK_NAME,),
            task_path=(str(folders.evaluation),),
            seq_len=demo.recipe.seq_len,
            batch_size=16,
            dtype="bf16",
            out=str(folders.root / "evaluation.json"),
        ),
        demo.tell,
    )


def training_lines(name: str, tell: Callable[[str], None]) -> Report:
    """Return a report that tells each evaluation in one line."""
    total = 0
    speed: float | None = None

    def report(record: Record) -> None:
        nonlocal total, speed
        if isinstance(record, RunStart):
            total = record.total_steps
        elif isinstance(record, StepRecord):
            speed = record.tokens_per_s
        elif isinstance(record, EvalRecord):
            losses = ", ".join(f"{key} {value:.3f}" for key, value in record.losses.items())
            rate = f", {speed:,.0f} tokens/s" if speed is not None else ""
            tell(f"    {name} {record.step}/{total}: held-out {losses}{rate}")

    return report
