# SPDX-License-Identifier: Apache-2.0
"""Measure serving: many tenants on one trunk, beside copies, `generate` and other batching.

    python benchmarks/serve.py                          writes what docs/serving.md shows
    python benchmarks/serve.py --minutes 0.2 --blocks 4 --width 64 --results runs    that it runs

The model has GPT-2's architecture with random weights, in float32. Every way to answer the same 16
requests (64 tokens each, 64 tokens of answer) is a process of its own, with all cores; then the
application itself is loaded over HTTP, and a replica of it is killed.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any

# A script's own folder is all that Python would look in.
sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from benchmarks.machine import ROOT, commit, machine
from benchmarks.page import put
from benchmarks.serve_engine import CLOSE, NUM_TENANTS, WAYS
from benchmarks.serve_http import CONCURRENCY, drive, flood, killed, service, steady, with_hey
from benchmarks.serve_page import BEGIN, tables

if TYPE_CHECKING:
    from collections.abc import Callable

RESULTS = ROOT / "benchmarks" / "results"
PAGE = ROOT / "docs" / "serving.md"
VOCABULARY = 50_257
PARTS = ("engine", "http", "faults")


def prepare(folder: Path, blocks: int, width: int) -> None:
    """Write the full model, and for two methods a trained adapter bundle and its plug-in."""
    import torch
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import GPT2Config, GPT2LMHeadModel, PreTrainedTokenizerFast

    torch.manual_seed(0)
    config = GPT2Config(
        n_layer=blocks, n_embd=width, n_head=width // 64 or 1, vocab_size=VOCABULARY,
        bos_token_id=0, eos_token_id=0, tie_word_embeddings=True,
    )  # fmt: skip
    GPT2LMHeadModel(config).save_pretrained(folder / "full")
    words = {"<|end|>": 0, **{f"t{number}": number for number in range(1, VOCABULARY)}}
    tokenizer = Tokenizer(models.WordLevel(words, unk_token="<|end|>"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<|end|>").save_pretrained(
        folder / "full"
    )
    (folder / "text.txt").write_text(" ".join(f"t{n * 7 % 50_000}" for n in range(2_000)))
    model, bundle = folder / "full", folder / "bundle"
    run("compress", f"--model={model}", f"--plan=2-{blocks - 4}-2", f"--out={bundle}")
    for method in ("full", "lora"):
        adapter = folder / f"adapter-{method}"
        run("finetune", f"--bundle={bundle}", f"--data={folder / 'text.txt'}", f"--out={adapter}",
            f"--method={method}", "--max-steps=1", "--batch-size=1", "--seq-len=64",
            "--num-workers=0")  # fmt: skip
        plugged = folder / f"plugged-{method}"
        run("plug-in", f"--model={model}", f"--adapter={adapter}", f"--out={plugged}")


def run(*words: str) -> None:
    """Run a verb of the command line."""
    subprocess.run([sys.executable, "-m", "offsite_ray", *words], stdout=sys.stderr, check=True)


def measure_engine(folder: Path) -> list[dict[str, Any]]:
    """Return what every way took; those that are near each other have further turns."""
    found: dict[str, dict[str, Any]] = {}
    for way in (*WAYS, *CLOSE, *CLOSE):
        words = [sys.executable, "-m", "benchmarks.serve_engine", way, str(folder)]
        done = subprocess.run(words, stdout=subprocess.PIPE, text=True, check=True, cwd=ROOT)
        took = json.loads(done.stdout.rstrip().rpartition("\n")[2])
        print(took, file=sys.stderr, flush=True)
        found.setdefault(way, {**took, "seconds": []})["seconds"] += took["seconds"]
    return list(found.values())


def measure_http(folder: Path, minutes: float) -> dict[str, Any]:
    """Return what clients of one replica see: at its load, for long, and at ten times as much.

    As much is counted in requests a second, and in clients who do not wait for long.
    """
    models = [f"tenant-{number}" for number in range(NUM_TENANTS)]
    cores = os.cpu_count() or 1
    with service(folder, folder / "state", models, num_cpus=cores) as served:
        drive(served, CONCURRENCY, 10)  # every tenant once
        found: dict[str, Any] = {"steady": steady(served, 60 * minutes)}
        per_s = 10 * found["steady"]["answers_per_s"]
        flooded = flood(served, per_s, max(10, 6 * minutes))
        found |= {
            "overload": {"offered_per_s": per_s, **flooded.summary()},
            "crowd": drive(served, 10 * CONCURRENCY, max(10, 6 * minutes)).summary(),
            "after": drive(served, CONCURRENCY, max(10, 3 * minutes)).summary(),
            "hey": with_hey(served, 200, CONCURRENCY),
        }
    print(found, file=sys.stderr, flush=True)
    return found


def measure_faults(folder: Path) -> dict[str, Any]:
    """Return what clients see of two replicas of which one is killed."""
    flags = {"min_replicas": 2, "max_replicas": 2, "num_cpus": 1}
    with service(folder, folder / "state", ["tenant-0", "tenant-1"], **flags) as served:
        drive(served, CONCURRENCY, 10)
        found = killed(served, 60)
    print(found, file=sys.stderr, flush=True)
    return found


def main(argv: list[str] | None = None) -> int:
    """Measure, write the result and the page."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--blocks", type=int, default=24)
    parser.add_argument("--width", type=int, default=512)
    parser.add_argument("--minutes", type=float, default=10.0, help="of steady load")
    parser.add_argument("--of", choices=PARTS, help="only this; the others are as stored")
    parser.add_argument("--results", type=Path, default=RESULTS)
    args = parser.parse_args(argv)
    file = args.results / "serve.json"
    stored = json.loads(file.read_text("utf-8")) if args.of and file.exists() else {}
    with tempfile.TemporaryDirectory() as work:
        folder = Path(work)
        prepare(folder, args.blocks, args.width)
        measured: dict[str, Callable[[], Any]] = {
            "engine": lambda: measure_engine(folder),
            "http": lambda: measure_http(folder, args.minutes),
            "faults": lambda: measure_faults(folder),
        }
        chosen = PARTS if args.of is None else (args.of,)
        parts = {part: measured[part]() if part in chosen else stored.get(part) for part in PARTS}
        now = {"date": datetime.now(UTC).isoformat(timespec="seconds"), "commit": commit()}
        result = {
            "machine": machine(),
            "versions": {name: version(name) for name in ("torch", "transformers", "ray")},
            "blocks": args.blocks,
            "width": args.width,
            **parts,
            "measured": {**stored.get("measured", {}), **dict.fromkeys(chosen, now)},
        }
    args.results.mkdir(parents=True, exist_ok=True)
    file.write_text(json.dumps(result, indent=1) + "\n", "utf-8")
    print(tables(result))
    if args.results == RESULTS:
        put(PAGE, BEGIN, tables(result))
    return 0


if __name__ == "__main__":
    sys.exit(main())
