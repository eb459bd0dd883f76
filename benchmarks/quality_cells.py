# SPDX-License-Identifier: Apache-2.0
"""The cells of the quality table: distil an emulator, or tune its adapter blocks and measure.

Everything is the library's own: ``compress``, ``prepare``, ``distill``, ``finetune``, ``evaluate``.
"""

from __future__ import annotations

import dataclasses
import functools
import json
import shutil
import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from offsite_ray.architectures import DTYPES, load_config, load_model, load_tokenizer
from offsite_ray.bundle import atomic_file
from offsite_ray.config import CompressConfig, DistillConfig, EvaluateConfig, FinetuneConfig
from offsite_ray.data import write_blocks
from offsite_ray.distillation import distill
from offsite_ray.emulator import compress
from offsite_ray.evaluation.perplexity import encode, perplexity
from offsite_ray.evaluation.settings import models, open_artefacts
from offsite_ray.finetuning import finetune
from offsite_ray.results import EvalRecord
from offsite_ray.training import TrainingOutcome, run_here, training_loop
from offsite_ray.training.engine import TorchEngine

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

    from offsite_ray.config import TrainingConfig
    from offsite_ray.results import Record
    from offsite_ray.training import Report, TrainingTask

Cell = Mapping[str, Any]

LOSSES: dict[str, dict[str, float]] = {
    "hidden": {"hidden_weight": 1.0, "lm_weight": 0.0},
    "layerwise": {"hidden_weight": 0.0, "lm_weight": 0.0, "layerwise_weight": 1.0},
    "logits": {"hidden_weight": 0.0, "lm_weight": 0.0, "logits_weight": 1.0},
    "lm": {"hidden_weight": 0.0, "lm_weight": 1.0},
    "30 hidden + lm": {"hidden_weight": 30.0, "lm_weight": 1.0},
}
"""Every part of the loss alone, and the paper's sum, as fields of ``DistillConfig``."""

UNDISTILLED = "undistilled"


@dataclass(frozen=True, kw_only=True, slots=True)
class Recipe:
    """How much is trained and measured: the same for every row."""

    plan: str = "2-4-2"
    seeds: tuple[int, ...] = (0, 1, 2)
    dtype: str = "bf16"
    seq_len: int = 128
    batch_size: int = 8
    distill_steps: int = 32
    """Optimizer steps; the emulator is also measured after a quarter and a half of them."""
    rates: tuple[float, ...] = (1e-3, 3e-3)
    """Peak learning rates that a pilot chooses from, for each loss."""
    pilot_steps: int = 10
    tune_steps: int = 12
    tune_rate: float = 6e-4
    train_share: float = 0.85
    """Share of each text that comes before what is measured."""
    test_characters: int = 24_000
    """Characters of each text that are measured: the last ones."""
    course_seeds: tuple[int, ...] = (0, 1, 2)
    """Seeds for which the emulators of a quarter and a half of the steps are tuned as well."""

    @property
    def marks(self) -> tuple[int, ...]:
        """Steps after which an emulator is written: a quarter, a half, all."""
        quarter = max(1, self.distill_steps // 4)
        return tuple(sorted({quarter, min(2 * quarter, self.distill_steps), self.distill_steps}))

    def tokens(self, steps: int) -> int:
        """Return the tokens that some steps train on."""
        return steps * self.batch_size * self.seq_len


@dataclass(kw_only=True, slots=True)
class Pausing:
    """Runs a task in this process, and keeps what it has trained after some steps."""

    marks: tuple[int, ...]
    outcomes: dict[int, TrainingOutcome] = field(default_factory=dict)

    def __call__(
        self, task: TrainingTask, config: TrainingConfig, run_dir: Path, report: Report
    ) -> TrainingOutcome:
        """Run it to its end."""
        engine = TorchEngine(task, config)
        states = {}

        def keep(record: Record) -> None:
            if isinstance(record, EvalRecord) and record.step in self.marks:
                states[record.step] = {n: tensor.clone() for n, tensor in engine.gather().items()}
            report(record)

        history = training_loop(task, engine, config, run_dir, keep)
        for step, state in states.items():
            seen = tuple(e for e in history.evaluations if e.step <= step)
            known = dataclasses.replace(history, evaluations=seen)
            self.outcomes[step] = TrainingOutcome(history=known, state=state)
        return self.outcomes[config.max_steps or 0]


class Laboratory:
    """A folder in which cells are made, each once: a run that was killed goes on."""

    def __init__(
        self,
        recipe: Recipe,
        model: Path,
        texts: Mapping[str, Path],
        public: Path,
        work: Path,
        tell: Callable[[str], None] | None,
    ) -> None:
        """Split and prepare the texts, and make the undistilled bundle and that of the bound.

        Args:
            recipe: How much.
            model: Directory of the full model.
            texts: Name of each downstream text to its file.
            public: The text to distil on.
            work: Folder that is this recipe's own.
            tell: Told of each cell; None: nothing is made, and only what is stored is known.
        """
        self.recipe, self._model, self._work, self._tell = recipe, model, work, tell
        if tell is None:
            return
        (work / "cells").mkdir(parents=True, exist_ok=True)
        self._tokenizer = load_tokenizer(model)
        for name, file in {**texts, "public": public}.items():
            self._once(work / name, functools.partial(self._split, file))
        bottom, _, top = map(int, recipe.plan.split("-"))
        kept = load_config(model).num_hidden_layers - bottom - top
        self._compress(recipe.plan, self.bundle(UNDISTILLED))
        self._compress(f"{bottom}-{kept}-{top}", self.bundle("bound"))

    def bundle(self, loss: str, seed: int = 0, steps: int = 0) -> Path:
        """Return where the bundle of a loss is, after some steps with a seed."""
        if loss in (UNDISTILLED, "bound"):
            return self._work / loss
        return self._work / _file_name(f"{loss}-{seed}-{steps}")

    def cell(self, name: str, make: Callable[[], Cell]) -> Cell | None:
        """Return a cell: read if it was made before, else made and stored."""
        file = self._work / "cells" / f"{_file_name(name)}.json"
        if not file.exists():
            if self._tell is None:
                return None
            start = time.perf_counter()
            made = {**make(), "seconds": time.perf_counter() - start}
            with atomic_file(file) as tmp:
                tmp.write_text(json.dumps(made) + "\n", encoding="utf-8")
            self._tell(f"{name}: {json.dumps({k: v for k, v in made.items() if k != 'losses'})}")
        found: Cell = json.loads(file.read_text(encoding="utf-8"))
        return found

    def pilot(self, loss: str, rate: float) -> Cell | None:
        """Distil for a few steps with seed 0; return the emulator's loss on public text."""

        def make() -> Cell:
            out, steps = self._clean("pilot"), self.recipe.pilot_steps
            distill(self._distillation(loss, 0, rate, steps, out), run_here, _silent)
            return {"nats": self._nats(out, "public")}

        return self.cell(f"pilot-{loss}-{rate:g}", make)

    def distil(self, loss: str, seed: int, rate: float) -> Cell | None:
        """Distil, write a bundle at each mark, and measure these emulators as they are."""

        def make() -> Cell:
            steps, run = self.recipe.distill_steps, Pausing(marks=self.recipe.marks)
            config = self._distillation(loss, seed, rate, steps, self._clean("distilled"))
            losses = distill(config, run, _silent).history.evaluations
            nats = {}
            for mark, outcome in run.outcomes.items():
                out = self._clean("marked")
                again = dataclasses.replace(config, out=str(out), max_steps=mark)
                distill(again, lambda *_, known=outcome: known, _silent)
                bundle = self.bundle(loss, seed, mark)
                shutil.rmtree(bundle, ignore_errors=True)
                out.rename(bundle)
                nats[str(mark)] = self._nats(bundle, "public")
            return {"nats": nats, "losses": {str(e.step): dict(e.losses) for e in losses}}

        return self.cell(f"distil-{loss}-{seed}", make)

    def tune(self, loss: str, text: str, seed: int, steps: int = 0) -> Cell | None:
        """Tune the adapter blocks of a bundle on a text; measure emulator and plug-in."""

        def make() -> Cell:
            bundle, adapter, recipe = (
                self.bundle(loss, seed, steps),
                self._clean("adapter"),
                self.recipe,
            )
            config = FinetuneConfig(
                bundle=str(bundle),
                data=(str(self._work / text / "train"),),
                out=str(adapter),
                max_steps=recipe.tune_steps,
                learning_rate=recipe.tune_rate,
                batch_size=recipe.batch_size,
                seed=seed,
                **self._common(recipe.tune_steps),
            )
            finetune(config, run_here, _silent)
            return self._settings(bundle, adapter, text, bound=loss == "bound")

        return self.cell(f"tune-{loss}-{steps}-{text}-{seed}", make)

    def full_zero_shot(self, text: str) -> Cell | None:
        """Measure the full model as it is."""
        return self.cell(f"full-{text}", lambda: {"nats": self._nats(self._model, text)})

    def _distillation(
        self, loss: str, seed: int, rate: float, steps: int, out: Path
    ) -> DistillConfig:
        weights: dict[str, Any] = LOSSES[loss]
        return DistillConfig(
            model=str(self._model),
            bundle=str(self.bundle(UNDISTILLED)),
            data=(str(self._work / "public" / "train"),),
            out=str(out),
            max_steps=steps,
            learning_rate=rate,
            batch_size=self.recipe.batch_size,
            seed=seed,
            num_workers=0,
            **weights,
            **self._common(max(1, steps // 4)),
        )

    def _common(self, eval_every: int) -> dict[str, Any]:
        return {
            "dtype": self.recipe.dtype,
            "eval_every": eval_every,
            "eval_fraction": 0.003,
            "checkpoint_every": 10**9,
        }

    def _settings(self, bundle: Path, adapter: Path, text: str, *, bound: bool) -> Cell:
        """Return nats per token by setting; full zero-shot is measured once, elsewhere."""
        test = str(self._work / text / "test.txt")
        given: dict[str, Any] = (
            {"bound": str(adapter)} if bound else {"adapter": str(adapter), "bundle": str(bundle)}
        )
        artefacts = open_artefacts(EvaluateConfig(model=str(self._model), text=(test,), **given))
        return {
            name: self._measured(model, text)
            for name, model in models(artefacts, DTYPES[self.recipe.dtype])
            if name != "full_zero_shot"
        }

    def _nats(self, directory: Path, text: str) -> float:
        return self._measured(load_model(directory, dtype=DTYPES[self.recipe.dtype]), text)

    def _measured(self, model: Any, text: str) -> float:
        words = (self._work / text / "test.txt").read_text(encoding="utf-8")
        documents = encode(self._tokenizer, [words])
        found = perplexity(model, documents, seq_len=self.recipe.seq_len, batch_size=16)
        return found.nats_per_token

    def _split(self, file: Path, out: Path) -> None:
        words = file.read_text(encoding="utf-8")
        cut = min(
            int(len(words) * self.recipe.train_share), len(words) - self.recipe.test_characters
        )
        out.mkdir()
        (out / "train.txt").write_text(words[:cut], encoding="utf-8")
        (out / "test.txt").write_text(words[-self.recipe.test_characters :], encoding="utf-8")
        write_blocks([str(out / "train.txt")], self._model, self.recipe.seq_len, out / "train")

    def _compress(self, plan: str, out: Path) -> None:
        config = CompressConfig(model=str(self._model), plan=plan, out=str(out))
        if not out.exists():
            compress(config)

    def _once(self, out: Path, make: Callable[[Path], None]) -> None:
        if not out.exists():
            made = self._clean("made")
            make(made)
            made.rename(out)

    def _clean(self, name: str) -> Path:
        """Return where something is made that is no one's yet, with nothing of a killed run."""
        for left in (self._work / name, self._work / f".{name}.run"):
            shutil.rmtree(left, ignore_errors=True)
        return self._work / name


def _file_name(name: str) -> str:
    return name.replace(" ", "").replace("+", "-")


def _silent(_record: Record) -> None:
    """Take a record and tell no one."""
