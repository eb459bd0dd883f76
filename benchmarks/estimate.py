# SPDX-License-Identifier: Apache-2.0
"""Compare what `offsite-ray estimate` predicts of memory with what training takes.

    python benchmarks/estimate.py                     writes what docs/benchmarks.md shows
    python benchmarks/estimate.py --case opt-distill  one of the settings

Each setting runs the library's own task, engine and steps in processes of their own, on random
rows and weights; the prediction sees the model's config alone.
"""

from __future__ import annotations

import argparse
import datetime
import json
import sys
import tempfile
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

# A script's own folder is all that Python would look in.
sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from transformers import AutoConfig, AutoModelForCausalLM

from benchmarks.machine import ROOT, commit, machine
from benchmarks.page import put
from benchmarks.peaks import Setting, peak_bytes
from offsite_ray.architectures import DTYPES
from offsite_ray.config import CompressConfig, DistillConfig, FinetuneConfig
from offsite_ray.emulator import compress
from offsite_ray.estimate import Memory, Step, Worker, memory_of, open_shapes

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping

RESULTS = ROOT / "benchmarks" / "results"
PAGE = ROOT / "docs" / "benchmarks.md"
BEGIN = "<!-- begin: written by benchmarks/estimate.py -->"
PLAN = "1-2-1"

_COMMON = {"hidden_size": 512, "num_hidden_layers": 6, "num_attention_heads": 8}
_ROTARY = {
    **_COMMON,
    "intermediate_size": 1536,
    "num_key_value_heads": 4,
    "max_position_embeddings": 1024,
}
MODELS: dict[str, dict[str, Any]] = {
    "opt": {
        **_COMMON,
        "vocab_size": 8192,
        "ffn_dim": 2048,
        "word_embed_proj_dim": 512,
        "max_position_embeddings": 1024,
    },
    "llama": {**_ROTARY, "vocab_size": 16384, "tie_word_embeddings": False},
    "qwen3": {**_ROTARY, "vocab_size": 8192, "head_dim": 64},
    "gpt2": {"vocab_size": 8192, "n_embd": 512, "n_layer": 6, "n_head": 8, "n_positions": 1024},
}
"""Family to the fields of its configuration."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Case:
    """A model and a setting."""

    family: str
    verb: str
    dtype: str
    batch_size: int = 8
    seq_len: int = 512
    packed: bool = False
    options: Mapping[str, Any] = field(default_factory=dict)


_HERE = {"num_workers": 0}
CASES: dict[str, Case] = {
    "opt-distill": Case(family="opt", verb="distill", dtype="fp32", options=_HERE),
    "opt-distill-recomputed": Case(
        family="opt",
        verb="distill",
        dtype="bf16",
        batch_size=16,
        options={**_HERE, "gradient_checkpointing": True},
    ),
    "llama-distill-logits": Case(
        family="llama", verb="distill", dtype="fp32", options={**_HERE, "logits_weight": 1.0}
    ),
    "qwen3-distill-layerwise": Case(
        family="qwen3", verb="distill", dtype="bf16", options={**_HERE, "layerwise_weight": 1.0}
    ),
    "llama-finetune": Case(family="llama", verb="finetune", dtype="bf16"),
    "gpt2-finetune-lora": Case(
        family="gpt2", verb="finetune", dtype="fp32", options={"method": "lora"}
    ),
    "gpt2-finetune-whole": Case(family="gpt2", verb="finetune-full", dtype="bf16"),
    "opt-zero-0": Case(
        family="opt", verb="distill", dtype="fp32", options={"num_workers": 2, "zero_stage": 0}
    ),
    "llama-zero-2": Case(
        family="llama", verb="distill", dtype="bf16", options={"num_workers": 2, "zero_stage": 2}
    ),
    "opt-zero-3": Case(
        family="opt", verb="distill", dtype="fp32", options={"num_workers": 2, "zero_stage": 3}
    ),
}


def make_models(case: Case, folder: Path) -> Path:
    """Write a case's model and bundle, if they are not there; return their folder."""
    directory = folder / f"{case.family}-{case.dtype}"
    if not (directory / "bundle").exists():
        config = AutoConfig.for_model(
            case.family, bos_token_id=2, eos_token_id=2, pad_token_id=1, **MODELS[case.family]
        )
        model = AutoModelForCausalLM.from_config(config, dtype=DTYPES[case.dtype])
        model.save_pretrained(directory / "model")
        out = directory / "bundle"
        compress(CompressConfig(model=str(directory / "model"), plan=PLAN, out=str(out)))
    return directory


def setting_of(case: Case, directory: Path) -> Setting:
    """Return how a case is run."""
    return Setting(
        directory=str(directory),
        verb=case.verb,
        seq_len=case.seq_len,
        batch_size=case.batch_size,
        packed=case.packed,
        device="cpu",
        options={"dtype": case.dtype, **case.options},
    )


def predicted(case: Case, directory: Path) -> Memory:
    """Return what is predicted for a case; of the model its config is read."""
    shapes = open_shapes(directory / "model", PLAN)
    workers = int(case.options.get("num_workers", 0))
    worker = Worker(
        zero_stage=int(case.options.get("zero_stage", 0)) if workers else None,
        offload="none",
        num_workers=workers or 1,
        itemsize=DTYPES[case.dtype].itemsize,
        gpu=False,
    )
    step = Step(
        batch_size=case.batch_size // (workers or 1),
        seq_len=case.seq_len,
        packed=case.packed,
        replicated=worker.replicates,
        gpu=False,
    )
    given: dict[str, Any] = {
        "data": ("x",),
        "out": "x",
        "batch_size": case.batch_size,
        "dtype": case.dtype,
        **case.options,
    }
    if case.verb == "distill":
        distill = DistillConfig(model="x", bundle="x", **given)
        return memory_of(shapes.rehearse_distillation(distill, step), worker)
    in_emulator = case.verb == "finetune"
    finetune = FinetuneConfig(bundle="x", **given)
    return memory_of(shapes.rehearse_finetuning(finetune, step, in_emulator=in_emulator), worker)


def measure(names: Iterable[str], folder: Path) -> dict[str, Any]:
    """Return prediction and measurement of some cases."""
    found = {}
    for name in names:
        case = CASES[name]
        directory = make_models(case, folder)
        memory = predicted(case, directory)
        peak = peak_bytes(setting_of(case, directory))
        found[name] = {
            "case": asdict(case),
            "predicted_bytes": memory.total,
            "parts": asdict(memory),
            "measured_bytes": peak,
        }
        ratio = memory.total / peak
        print(f"{name}: {memory.total >> 20} MiB predicted, {peak >> 20} measured, {ratio:.2f}")
    return found


def table(result: Mapping[str, Any]) -> str:
    """Return the page's table."""
    on = result["machine"]
    lines = [
        f"{on['cpu']}, {on['num_cores']} cores; {result['date']}, commit {result['commit']}.",
        "",
        "| setting | predicted | measured | predicted over measured |",
        "| --- | --: | --: | --: |",
    ]
    for name, case in result["cases"].items():
        mib = [case[key] / 2**20 for key in ("predicted_bytes", "measured_bytes")]
        lines.append(f"| {name} | {mib[0]:,.0f} MiB | {mib[1]:,.0f} MiB | {mib[0] / mib[1]:.2f} |")
    return "\n".join(lines)


def main(argv: list[str] | None = None) -> None:
    """Measure, write the result and update the page."""
    parser = argparse.ArgumentParser(description="Check estimates against measurements.")
    parser.add_argument("--case", action="append", choices=CASES, help="may be repeated")
    parser.add_argument("--results", type=Path, default=RESULTS, help="folder for the JSON")
    args = parser.parse_args(argv)
    with tempfile.TemporaryDirectory() as folder:
        cases = measure(args.case or CASES, Path(folder))
    now = datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds")
    result = {"machine": machine(), "date": now, "commit": commit(), "cases": cases}
    args.results.mkdir(parents=True, exist_ok=True)
    out = args.results / "estimate.json"
    out.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    if args.results == RESULTS:
        put(PAGE, BEGIN, table(result))
    print(f"{out} written", file=sys.stderr)


if __name__ == "__main__":
    main()
