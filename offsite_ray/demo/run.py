# SPDX-License-Identifier: Apache-2.0
"""The demo: both parties on one machine, each in a folder of its own, with the real verbs."""

from __future__ import annotations

import json
import os
import platform
import shutil
import subprocess
import sys
import time
from dataclasses import dataclass
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
from offsite_ray.demo.recipe import DemoRecipe
from offsite_ray.demo.story import facts, notes
from offsite_ray.demo.task import TASK_NAME, write_task
from offsite_ray.demo.texts import Document, held_out, package_documentation, standard_library
from offsite_ray.errors import StorageError, TrainingError
from offsite_ray.results import (
    EvalRecord,
    EvaluationResult,
    RunStart,
    StepRecord,
    TrainingHistory,
)

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

    from offsite_ray.config import DemoConfig
    from offsite_ray.report import Artefact

    Tell = Callable[[str], None]

_HELD_OUT_ONE_IN = 6


@dataclass(frozen=True, kw_only=True, slots=True)
class DemoResult:
    """What the demo measured, and where to look at it."""

    out: str
    report: str
    picture: str
    evaluation: EvaluationResult
    seconds: float


@dataclass(frozen=True, slots=True)
class Folders:
    """Who has what. The data owner's folder never holds anything of the full model."""

    root: Path

    @property
    def owner(self) -> Path:
        """The model owner's: full model, public text, everything made of the full model."""
        return self.root / "owner"

    @property
    def data_owner(self) -> Path:
        """The data owner's: the emulator bundle, private text, the adapter bundle."""
        return self.root / "data-owner"

    @property
    def evaluation(self) -> Path:
        """Nobody's in real life: held-out private text and both parties' models together."""
        return self.root / "evaluation"


def run_demo(config: DemoConfig, tell: Tell) -> DemoResult:
    """Run the whole loop and write a report.

    Args:
        config: Where to, and how much.
        tell: Told what happens, a line at a time.

    Raises:
        OffsiteError: The foundation is missing, the folder is taken, or a step fails.
    """
    start = time.perf_counter()
    recipe = DemoRecipe().scaled(config.scale)
    foundation = _foundation(config)
    folders = Folders(Path(config.out).resolve())
    check_free(folders.root)
    for folder in (folders.owner, folders.data_owner, folders.evaluation):
        folder.mkdir(parents=True)
    full = folders.owner / "full-model"
    shutil.copytree(foundation, full, ignore=shutil.ignore_patterns("*.py", "*.md"))
    write_texts(folders, recipe)
    clock: dict[str, float] = {}
    histories: dict[str, TrainingHistory] = {}
    owner_makes_bundle(folders, recipe, tell, clock, histories)
    data_owner_trains(folders, recipe, tell, clock, histories)
    owner_plugs_in(folders, recipe, tell, clock, histories)
    evaluation = evaluate_all(folders, recipe, tell, clock)
    page, picture = _report(folders, recipe, evaluation, histories, clock)
    return DemoResult(
        out=str(folders.root),
        report=str(page),
        picture=str(picture),
        evaluation=evaluation,
        seconds=time.perf_counter() - start,
    )


def _foundation(config: DemoConfig) -> Path:
    checkout = Path(offsite_ray.__file__).resolve().parents[1] / "examples" / "foundation"
    path = checkout if config.foundation is None else Path(config.foundation)
    if not (path / "config.json").is_file():
        raise StorageError(
            f"{path} holds no model; run the demo from a checkout of the project, or give "
            "--foundation DIR"
        )
    return path


def write_texts(folders: Folders, recipe: DemoRecipe) -> None:
    """Write public text for the owner, private text for the data owner, held-out for the test."""
    _write_jsonl(folders.owner / "public.jsonl", standard_library())
    private, test = held_out(package_documentation(recipe.private_package), _HELD_OUT_ONE_IN)
    _write_jsonl(folders.data_owner / "private.jsonl", private)
    shortened = _first_characters(test, recipe.held_out_characters)
    _write_jsonl(folders.evaluation / "held-out.jsonl", shortened)
    write_task(folders.evaluation, test, recipe.task_questions, seed=0)


def _first_characters(documents: list[Document], budget: int) -> list[Document]:
    """Return the beginning of each document, all of equal share of ``budget`` characters."""
    share = max(200, budget // len(documents))
    return [Document(name=d.name, text=d.text[:share]) for d in documents]


def _write_jsonl(path: Path, documents: list[Document]) -> None:
    lines = "".join(json.dumps({"text": d.text}) + "\n" for d in documents)
    path.write_text(lines, encoding="utf-8")


def owner_makes_bundle(
    folders: Folders,
    recipe: DemoRecipe,
    tell: Tell,
    clock: dict[str, float],
    histories: dict[str, TrainingHistory],
) -> None:
    """Compress the full model, distil the emulator on public text, hand the bundle out."""
    from offsite_ray.distillation import distill
    from offsite_ray.emulator import compress
    from offsite_ray.train import run_on_ray

    full, bundle = folders.owner / "full-model", folders.owner / "bundle"
    tell(f"1/6 owner: compress to {recipe.plan}")
    made = compress(CompressConfig(model=str(full), plan=recipe.plan, out=str(bundle)), tell)
    clock["compress"] = made.seconds
    tell(f"2/6 owner: distil on public text, {recipe.distill_workers} Ray Train workers, ZeRO-3")
    distilled = distill(
        DistillConfig(
            model=str(full),
            bundle=str(bundle),
            data=(str(folders.owner / "public.jsonl"),),
            out=str(folders.owner / "distilled-bundle"),
            max_steps=recipe.distill_steps,
            batch_size=recipe.distill_batch_size,
            learning_rate=recipe.distill_learning_rate,
            seq_len=recipe.seq_len,
            eval_fraction=0.003,
            num_workers=recipe.distill_workers,
            zero_stage=3,
            dtype="bf16",
        ),
        run_on_ray,
        training_lines("distillation", tell),
        tell,
    )
    clock["distill"] = distilled.seconds
    histories["distillation"] = distilled.history
    shutil.copytree(folders.owner / "distilled-bundle", folders.data_owner / "bundle")


def data_owner_trains(
    folders: Folders,
    recipe: DemoRecipe,
    tell: Tell,
    clock: dict[str, float],
    histories: dict[str, TrainingHistory],
) -> None:
    """Fine-tune in a process of its own, whose folder holds the bundle and the private text."""
    tell("3/6 data owner: fine-tune the adapter blocks on private text, in a separate process")
    config = _finetune_config(recipe, bundle="bundle", data=("private.jsonl",), out="adapter")
    result = _in_own_process(folders.data_owner, config)
    clock["finetune"] = result["seconds"]
    histories["fine-tuning (data owner)"] = _history(result["history"])


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


def _in_own_process(folder: Path, config: FinetuneConfig) -> dict[str, Any]:
    """Run ``offsite-ray finetune`` in a folder; return what it prints as JSON."""
    flags = {
        "bundle": config.bundle,
        "data": config.data[0],
        "out": config.out,
        "max-steps": config.max_steps,
        "batch-size": config.batch_size,
        "learning-rate": config.learning_rate,
        "seq-len": config.seq_len,
        "eval-every": config.eval_every,
        "eval-fraction": config.eval_fraction,
        "dtype": config.dtype,
    }
    command = [sys.executable, "-m", "offsite_ray", "finetune", "--json"]
    for flag, value in flags.items():
        command += [f"--{flag}", str(value)]
    root = str(Path(offsite_ray.__file__).resolve().parents[1])
    paths = os.pathsep.join(filter(None, (root, os.environ.get("PYTHONPATH"))))
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


def _history(plain: Mapping[str, Any]) -> TrainingHistory:
    return TrainingHistory(
        **{
            **plain,
            "steps": tuple(StepRecord(**record) for record in plain["steps"]),
            "evaluations": tuple(EvalRecord(**record) for record in plain["evaluations"]),
        }
    )


def owner_plugs_in(
    folders: Folders,
    recipe: DemoRecipe,
    tell: Tell,
    clock: dict[str, float],
    histories: dict[str, TrainingHistory],
) -> None:
    """Plug the adapter in; then train what it is judged against, which needs both parties."""
    from offsite_ray.architectures import load_config
    from offsite_ray.emulator import compress
    from offsite_ray.finetuning import finetune
    from offsite_ray.plug_in import plug_in
    from offsite_ray.training import run_here

    full = str(folders.owner / "full-model")
    tell("4/6 owner: plug the adapter in")
    plugged = plug_in(
        PlugInConfig(
            model=full,
            adapter=str(folders.data_owner / "adapter"),
            out=str(folders.owner / "plugged-in"),
        ),
        tell,
    )
    clock["plug in"] = plugged.seconds
    tell("5/6 yardsticks: the bound (same adapter blocks in the full model), full fine-tuning")
    every = str(folders.evaluation / "keep-all-bundle")
    bottom, _, top = recipe.plan.split("-")
    num_blocks = load_config(full).num_hidden_layers
    plan = f"{bottom}-{num_blocks - int(bottom) - int(top)}-{top}"
    compress(CompressConfig(model=full, plan=plan, out=every), tell)
    data = (str(folders.data_owner / "private.jsonl"),)
    for name, given in {
        "bound": {"bundle": every, "out": str(folders.evaluation / "bound")},
        "full fine-tuning": {"model": full, "out": str(folders.evaluation / "fine-tuned")},
    }.items():
        config = _finetune_config(recipe, data=data, **given)
        result = finetune(config, run_here, training_lines(name, tell), tell)
        clock[name] = result.seconds
        histories[name] = result.history


def evaluate_all(
    folders: Folders, recipe: DemoRecipe, tell: Tell, clock: dict[str, float]
) -> EvaluationResult:
    """Measure the five settings and the bound on held-out private text and an lm-eval task."""
    from offsite_ray.evaluation import evaluate

    tell("6/6 evaluate: five settings and the bound, held-out text and an lm-eval task")
    result = evaluate(
        EvaluateConfig(
            model=str(folders.owner / "full-model"),
            bundle=str(folders.data_owner / "bundle"),
            adapter=str(folders.data_owner / "adapter"),
            bound=str(folders.evaluation / "bound"),
            finetuned=str(folders.evaluation / "fine-tuned"),
            text=(str(folders.evaluation / "held-out.jsonl"),),
            tasks=(TASK_NAME,),
            task_path=(str(folders.evaluation),),
            seq_len=recipe.seq_len,
            batch_size=16,
            dtype="bf16",
            out=str(folders.root / "evaluation.json"),
        ),
        tell,
    )
    clock["evaluate"] = result.seconds or 0.0
    return result


def training_lines(name: str, tell: Tell) -> Callable[[RunStart | StepRecord | EvalRecord], None]:
    """Return a report that tells each evaluation in one line."""
    total = 0
    speed: float | None = None

    def report(record: RunStart | StepRecord | EvalRecord) -> None:
        nonlocal total, speed
        if isinstance(record, RunStart):
            total = record.total_steps
        elif isinstance(record, StepRecord):
            speed = record.tokens_per_s
        else:
            losses = ", ".join(f"{key} {value:.3f}" for key, value in record.losses.items())
            rate = f", {speed:,.0f} tokens/s" if speed is not None else ""
            tell(f"    {name} {record.step}/{total}: held-out {losses}{rate}")

    return report


def _report(
    folders: Folders,
    recipe: DemoRecipe,
    evaluation: EvaluationResult,
    histories: Mapping[str, TrainingHistory],
    clock: Mapping[str, float],
) -> tuple[Path, Path]:
    from offsite_ray.report import write_report

    return write_report(
        folders.root,
        evaluation,
        title="Offsite-tuning, from one machine's point of view",
        histories=histories,
        artefacts=artefacts(folders, histories, clock),
        notes=notes(recipe, evaluation),
        facts={
            **facts(recipe, folders.owner / "full-model"),
            "Machine": f"{platform.machine()}, {os.cpu_count()} cores, Python "
            f"{platform.python_version()}",
        },
    )


def artefacts(
    folders: Folders, histories: Mapping[str, TrainingHistory], clock: Mapping[str, float]
) -> list[Artefact]:
    """Return what each step made: its size on disk, its time, its memory."""
    from offsite_ray.report import Artefact

    rows = (
        ("full model", folders.owner / "full-model", None, None, "stays with the owner"),
        ("emulator bundle", folders.owner / "bundle", "compress", None, "some blocks dropped"),
        (
            "distilled emulator bundle",
            folders.data_owner / "bundle",
            "distill",
            "distillation",
            "owner to data owner",
        ),
        (
            "adapter bundle",
            folders.data_owner / "adapter",
            "finetune",
            "fine-tuning (data owner)",
            "data owner to owner",
        ),
        ("plugged-in model", folders.owner / "plugged-in", "plug in", None, "what is served"),
        ("bound", folders.evaluation / "bound", "bound", "bound", "only to judge by"),
        (
            "fine-tuned model",
            folders.evaluation / "fine-tuned",
            "full fine-tuning",
            "full fine-tuning",
            "only to judge by",
        ),
    )
    return [
        Artefact(
            name=name,
            path=str(path.relative_to(folders.root)),
            size_bytes=sum(f.stat().st_size for f in path.rglob("*") if f.is_file()),
            seconds=clock.get(step) if step else None,
            peak_memory_bytes=histories[run].peak_memory_bytes if run else None,
            note=note,
        )
        for name, path, step, run, note in rows
    ]
