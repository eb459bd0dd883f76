# SPDX-License-Identifier: Apache-2.0
"""Emulator bundles and plugged-in models as nobody should accept them: one row per damage."""

from __future__ import annotations

import json
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import torch
from safetensors.torch import load_file, save_file

from offsite_ray.errors import FamilyError, StorageError
from tests.damage import edit_json, edit_tensors
from tests.damaged_files import (
    DEEP,
    EVERY_BUNDLE,
    WEIGHTS,
    Row,
    cut_off,
    safetensors_rows,
    sealed,
    write_pickle,
)

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

INDEX = "model.safetensors.index.json"


def config(edit: Callable[[dict[str, Any]], object]) -> Callable[[Path], None]:
    return sealed(lambda directory: edit_json(directory / "config.json", edit))


def config_text(text: str) -> Callable[[Path], None]:
    return sealed(lambda directory: (directory / "config.json").write_text(text, encoding="utf-8"))


def tensors(edit: Callable[[dict[str, torch.Tensor]], object]) -> Callable[[Path], None]:
    return sealed(lambda directory: edit_tensors(directory / WEIGHTS, edit))


def rename_tensor(old: str, new: str) -> Callable[[Path], None]:
    return tensors(lambda found: found.update({new: found.pop(old)}))


def pickle_instead(directory: Path) -> None:
    torch.save(load_file(directory / WEIGHTS), directory / "pytorch_model.bin")
    (directory / WEIGHTS).unlink()


def shard(directory: Path, edit: Callable[[dict[str, Any]], object] = lambda _: None) -> None:
    """Spread the weights over two files with an index, which ``edit`` changes."""
    values = sorted(load_file(directory / WEIGHTS).items())
    (directory / WEIGHTS).unlink()
    weight_map: dict[str, str] = {}
    for number, part in enumerate((values[::2], values[1::2]), start=1):
        file = f"model-0000{number}-of-00002.safetensors"
        save_file(dict(part), directory / file, metadata={"format": "pt"})
        weight_map |= {name: file for name, _ in part}
    index = {"metadata": {"total_size": 1}, "weight_map": weight_map}
    edit(index)
    (directory / INDEX).write_text(json.dumps(index), encoding="utf-8")


def sharded(edit: Callable[[dict[str, Any]], object]) -> Callable[[Path], None]:
    return sealed(lambda directory: shard(directory, edit))


def index_text(text: str) -> Callable[[Path], None]:
    def damage(directory: Path) -> None:
        shard(directory)
        (directory / INDEX).write_text(text, encoding="utf-8")

    return sealed(damage)


def first_name(index: dict[str, Any]) -> str:
    return min(map(str, index["weight_map"]))


def both_ways(directory: Path) -> None:
    """Put an index and shards beside the one file that stock transformers would read instead."""
    whole = (directory / WEIGHTS).read_bytes()
    shard(directory)
    (directory / WEIGHTS).write_bytes(whole)


EMULATOR_BUNDLES = (
    *EVERY_BUNDLE,
    *safetensors_rows(WEIGHTS),
    Row("tokenizer-missing", lambda d: (d / "tokenizer.json").unlink(), "lacks"),
    Row("pickle-instead", sealed(pickle_instead), "never read"),
    Row(
        "adapter-of-peft-beside",  # which stock transformers would load, and what it names
        sealed(lambda d: (d / "adapter_config.json").write_text("{}")),
        "adapter_config.json",
    ),
    Row("weights-missing", sealed(lambda d: (d / WEIGHTS).unlink()), "no model", StorageError),
    # the index
    Row("index-no-json", index_text("{"), "no index"),
    Row("index-deep", index_text(DEEP), "no index"),
    Row("index-a-list", index_text("[]"), "no index"),
    Row("index-of-a-list", sharded(lambda i: i.update(weight_map=["x"])), "no index"),
    Row("index-of-numbers", sharded(lambda i: i.update(weight_map={"x": 1})), "no index"),
    Row(
        "index-above",
        sharded(lambda i: i["weight_map"].update({first_name(i): "../x.safetensors"})),
        "beside",
    ),
    Row(
        "index-of-a-pickle",
        sharded(lambda i: i["weight_map"].update({first_name(i): "x.bin"})),
        "beside",
    ),
    Row(
        "index-of-nothing",
        sharded(lambda i: i["weight_map"].update({first_name(i): "x.safetensors"})),
        "missing",
    ),
    Row("index-incomplete", sharded(lambda i: i["weight_map"].pop(first_name(i))), "different"),
    Row("index-with-more", sharded(lambda i: i["weight_map"].update(x=WEIGHTS)), "missing"),
    Row("index-and-one-file", sealed(both_ways), "of other files"),
    # the config
    Row("config-no-json", config_text("{"), "JSON"),
    Row("config-deep", config_text(DEEP), "JSON"),
    Row("config-a-list", config_text("[]"), "JSON object"),
    Row(
        "config-missing",
        sealed(lambda d: (d / "config.json").unlink()),
        "no config.json",
        StorageError,
    ),
    Row("config-of-more-blocks", config(lambda c: c.update(n_layer=6)), "6 blocks"),
    Row("config-of-less-blocks", config(lambda c: c.update(n_layer=4)), "4 blocks"),
    Row("config-of-text", config(lambda c: c.update(n_layer="5")), "refused", FamilyError),
    Row("config-of-another-type", config(lambda c: c.update(model_type="gptj")), "gptj"),
    Row(
        "config-of-no-type",
        config(lambda c: c.update(model_type="gpt-2")),
        "does not know",
        FamilyError,
    ),
    Row(
        "config-with-code",
        config(lambda c: c.update(auto_map={"AutoConfig": "x.Y"})),
        "never run",
        FamilyError,
    ),
    Row("config-of-a-plug-in", config(lambda c: c.update(model_type="offsite_bottleneck")), "base"),
    Row(
        "config-of-an-odd-plug-in",
        config(lambda c: c.update(model_type="offsite_bottleneck", base_config=[])),
        "base",
    ),
    # the tensors
    Row(
        "tensor-missing", tensors(lambda t: t.pop("transformer.h.1.ln_1.weight")), "h.1.ln_1.weight"
    ),
    Row("tensor-extra", tensors(lambda t: t.update(x=torch.zeros(2))), "'x'"),
    Row(
        "block-missing",
        tensors(lambda t: [t.pop(name) for name in list(t) if ".h.1." in name]),
        "block 1",
    ),
    Row(
        "block-extra",
        rename_tensor("transformer.h.1.ln_1.weight", "transformer.h.5.ln_1.weight"),
        "block 5",
    ),
    Row(
        "tensor-renamed",
        rename_tensor("transformer.h.1.ln_1.weight", "transformer.h.1.ln_9.weight"),
        "ln_",
    ),
)
"""What no emulator bundle may be; all made of a GPT-2 that keeps the blocks 0, 1, 3, 4, 5 of 6."""

BOTTLENECKS = "bottleneck.safetensors"

PLUGGED_IN = (
    *(row for row in EVERY_BUNDLE if row.name != "kind-swapped"),  # to the kind that it is
    *safetensors_rows(WEIGHTS),
    *(replace(row, name=f"bottlenecks-{row.name}") for row in safetensors_rows(BOTTLENECKS)),
)
"""What no plugged-in model may be: a GPT-2 with bottleneck adapters."""


def bottlenecks(edit: Callable[[dict[str, torch.Tensor]], object]) -> Callable[[Path], None]:
    return lambda directory: edit_tensors(directory / BOTTLENECKS, edit)


BESIDE_THE_WEIGHTS = (
    Row("missing", lambda d: (d / BOTTLENECKS).unlink(), BOTTLENECKS),
    Row("truncated", cut_off(BOTTLENECKS), BOTTLENECKS),
    Row("pickle", lambda d: write_pickle(d, BOTTLENECKS), BOTTLENECKS),
    Row("none", bottlenecks(lambda t: t.clear()), BOTTLENECKS),
    Row("bias-missing", bottlenecks(lambda t: t.pop(min(t))), r"down\.bias"),
    Row("extra", bottlenecks(lambda t: t.update(x=torch.zeros(1))), "'?x'?"),
)
"""What bottlenecks may not be where a plugged-in model is loaded, digests or not."""
