# SPDX-License-Identifier: Apache-2.0
"""Adapter bundles as no owner should plug in: one row per way to be malformed, by method."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any

import torch

from offsite_ray.errors import BundleError, ConfigError, FamilyError, PlugInError
from tests.damage import edit_header, edit_json, edit_tensors, join_safetensors, reseal
from tests.damaged_files import DEEP, EVERY_BUNDLE, Row, manifest_sealed, safetensors_rows, sealed

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

    from torch import Tensor

TENSORS = "adapter.safetensors"
PEFT_TENSORS = "adapter_model.safetensors"
PEFT_CONFIG = "adapter_config.json"


def tensors(edit: Callable[[dict[str, Tensor]], object], name: str = TENSORS) -> Any:
    return sealed(lambda directory: edit_tensors(directory / name, edit))


def method(name: object) -> Callable[[Path], None]:
    return manifest_sealed(lambda m: m["recipe"].update(finetuning={"method": name}))


def set_value(name: str, value: float) -> Callable[[dict[str, Tensor]], object]:
    return lambda found: found[name].view(-1)[-1:].fill_(value)


def empty_tensor(name: str, tensor: str) -> Callable[[Path], None]:
    """Return the damage of a tensor of no bytes whose shape overflows what it is multiplied in."""

    def damage(directory: Path) -> None:
        found: dict[str, Any] = {}
        edit_header(directory / name, found.update)
        names = [key for key in found if key != "__metadata__"]
        entry = {"dtype": "F32", "shape": [0, 2**62, 2**62], "data_offsets": [0, 0]}
        join_safetensors(directory / name, json.dumps(dict.fromkeys(names, entry)).encode(), b"")
        assert tensor in names

    return sealed(damage)


def swap_plan(plan: dict[str, Any]) -> Callable[[Path], None]:
    return manifest_sealed(lambda m: m["plan"].update(plan))


MATRIX = "transformer.h.0.attn.c_attn.weight"

FULL = (
    *EVERY_BUNDLE,
    *safetensors_rows(TENSORS),
    Row(
        "emulator-bundle",
        manifest_sealed(lambda m: m.update(kind="emulator_bundle")),
        "adapter_bundle",
        BundleError,
    ),
    Row("no-method", manifest_sealed(lambda m: m["recipe"].pop("finetuning")), "method"),
    Row("method-a-list", method([]), "method"),
    Row("method-unknown", method("prompt"), "prompt", ConfigError),
    Row("method-of-another-file", method("lora"), PEFT_CONFIG, PlugInError),
    Row("method-of-less", method("bitfit"), "may not be replaced", PlugInError),
    Row("method-beside", method("bottleneck"), "bottleneck", PlugInError),
    Row(
        "finetuning-a-list",
        manifest_sealed(lambda m: m["recipe"].update(finetuning=["full"])),
        "method",
    ),
    Row(
        "block-also-in-the-emulator",
        swap_plan({"emulator": [1, 3]}),
        "block 3 is named as adapter and as emulator",
    ),
    Row(
        "another-adapter-block",
        swap_plan(
            {
                "adapter": [0, 2, 5],
                "emulator": [1, 3],
                "kept": [0, 1, 2, 3, 5],
                "text": "adapter=0,2,5 emulator=1,3",
            }
        ),
        "lacks tensor 'transformer.h.2",
        PlugInError,
    ),
    Row(
        "one-adapter-block-less",
        swap_plan({"adapter": [0, 5], "kept": [0, 1, 4, 5], "text": "1-2-1"}),
        "h.3.*may not be replaced",
        PlugInError,
    ),
    Row(
        "another-depth",
        swap_plan(
            {
                "num_blocks": 7,
                "kept": [0, 1, 3, 4, 5],
                "text": "adapter=0,3,5 emulator=1,4",
            }
        ),
        "7 blocks",
        PlugInError,
    ),
    Row(
        "another-family",
        manifest_sealed(lambda m: m["model"].update(family="gptj")),
        "gptj",
        PlugInError,
    ),
    Row(
        "another-config",
        manifest_sealed(lambda m: m["full_model"].update(config="0" * 64)),
        "config",
        PlugInError,
    ),
    Row(
        "another-layout",
        manifest_sealed(lambda m: m["full_model"].update(layout="0" * 64)),
        "other names, shapes or dtypes",
        PlugInError,
    ),
    Row(
        "other-carried-tensors",
        manifest_sealed(lambda m: m["full_model"]["carried"].update({MATRIX: "0" * 64})),
        "c_attn.*other values",
        PlugInError,
    ),
    Row(
        "carried-tensor-of-no-model",
        manifest_sealed(lambda m: m["full_model"]["carried"].update(x="0" * 64)),
        "'x'",
        PlugInError,
    ),
    Row(
        "other-dropped-tensors",
        manifest_sealed(lambda m: m["full_model"].update(sample="0" * 64)),
        "other values",
        PlugInError,
    ),
    Row(
        "another-path-of-blocks",
        manifest_sealed(lambda m: m["model"].update(recognised="path", blocks="transformer.x")),
        "transformer.x",
        FamilyError,
    ),
    Row("tensor-missing", tensors(lambda t: t.pop(MATRIX)), "lacks", PlugInError),
    Row("tensor-extra", tensors(lambda t: t.update(x=torch.zeros(1))), "'x'", PlugInError),
    Row(
        "embeddings",
        tensors(lambda t: t.update({"transformer.wte.weight": torch.zeros(128, 32)})),
        "may not be replaced",
        PlugInError,
    ),
    Row(
        "emulator-block",
        tensors(lambda t: t.update({MATRIX.replace(".0.", ".1."): t[MATRIX].clone()})),
        "may not be replaced",
        PlugInError,
    ),
    Row("shape", tensors(lambda t: t.update({MATRIX: t[MATRIX][:-1]})), "model has", PlugInError),
    Row(
        "transposed",
        tensors(lambda t: t.update({MATRIX: t[MATRIX].T.contiguous()})),
        "model has",
        PlugInError,
    ),
    Row("scalar", tensors(lambda t: t.update({MATRIX: torch.tensor(0.0)})), r"\[\]", PlugInError),
    Row("half", tensors(lambda t: t.update({MATRIX: t[MATRIX].half()})), "F16", PlugInError),
    Row("double", tensors(lambda t: t.update({MATRIX: t[MATRIX].double()})), "F64", PlugInError),
    Row("integers", tensors(lambda t: t.update({MATRIX: t[MATRIX].int()})), "I32", PlugInError),
    Row("nan", tensors(set_value(MATRIX, float("nan"))), "not finite", PlugInError),
    Row("infinite", tensors(set_value(MATRIX, float("inf"))), "not finite", PlugInError),
    Row("empty-tensors", empty_tensor(TENSORS, MATRIX), "model has", PlugInError),
)
"""What no adapter of whole blocks may be: a GPT-2's blocks 0, 3 and 5 of 6."""

A = f"base_model.model.{MATRIX.removesuffix('.weight')}.lora_A.weight"
B = f"base_model.model.{MATRIX.removesuffix('.weight')}.lora_B.weight"


def lora(edit: Callable[[dict[str, Tensor]], object]) -> Any:
    return tensors(edit, PEFT_TENSORS)


def settings(edit: Callable[[dict[str, Any]], object]) -> Callable[[Path], None]:
    return sealed(lambda directory: edit_json(directory / PEFT_CONFIG, edit))


def settings_text(text: str) -> Callable[[Path], None]:
    return sealed(lambda directory: (directory / PEFT_CONFIG).write_text(text, encoding="utf-8"))


def retarget(old: str, new: str) -> Callable[[Path], None]:
    """Return the damage of LoRA on another module, consistently."""

    def damage(directory: Path) -> None:
        def modules(values: dict[str, Any]) -> None:
            values["target_modules"] = [m.replace(old, new) for m in values["target_modules"]]

        def names(found: dict[str, Tensor]) -> None:
            for name in [n for n in found if old in n]:
                found[name.replace(old, new)] = found.pop(name)

        edit_json(directory / PEFT_CONFIG, modules)
        edit_tensors(directory / PEFT_TENSORS, names)
        reseal(directory)

    return damage


LORA = (
    *(
        Row(name, settings(edit), word, PlugInError)
        for name, edit, word in (
            ("dora", lambda s: s.update(use_dora=True), "use_dora"),
            ("rslora", lambda s: s.update(use_rslora=True), "use_rslora"),
            ("ia3", lambda s: s.update(peft_type="IA3"), "IA3"),
            ("no-type", lambda s: s.pop("peft_type"), "peft_type"),
            ("biases", lambda s: s.update(bias="all"), "bias"),
            ("whole-modules", lambda s: s.update(modules_to_save=["lm_head"]), "modules_to_save"),
            ("rank-pattern", lambda s: s.update(rank_pattern={"c_attn": 2}), "rank_pattern"),
            ("alpha-pattern", lambda s: s.update(alpha_pattern={"c_attn": 2}), "alpha_pattern"),
            ("replication", lambda s: s.update(layer_replication=[[0, 2]]), "layer_replication"),
            ("parameters", lambda s: s.update(target_parameters=["x"]), "target_parameters"),
            ("rank-other", lambda s: s.update(r=3), "rank 3"),
            ("rank-zero", lambda s: s.update(r=0), "positive"),
            ("rank-text", lambda s: s.update(r="4"), "cannot be used"),
            ("alpha-nan", lambda s: s.update(lora_alpha=float("nan")), "finite"),
            ("alpha-infinite", lambda s: s.update(lora_alpha=float("-inf")), "finite"),
            ("alpha-missing", lambda s: s.pop("lora_alpha"), "lora_alpha"),
            ("targets-all-linear", lambda s: s.update(target_modules="all-linear"), "holds|lacks"),
            ("targets-none", lambda s: s.update(target_modules=None), "cannot be used"),
            ("targets-lists", lambda s: s.update(target_modules=[["x"]]), "cannot be used"),
            ("targets-fewer", lambda s: s["target_modules"].pop(), "holds"),
            ("targets-more", lambda s: s["target_modules"].append("lm_head"), "lacks"),
            ("unheard-of", lambda s: s.update(use_tomorrow={"x": 1}), "use_tomorrow"),
            ("activated", lambda s: s.update(alora_invocation_tokens=[1]), "alora"),
            ("initialised", lambda s: s.update(init_lora_weights="pissa"), "init_lora_weights"),
        )
    ),
    Row("settings-missing", sealed(lambda d: (d / PEFT_CONFIG).unlink()), PEFT_CONFIG, PlugInError),
    Row("settings-no-json", settings_text("{"), PEFT_CONFIG, PlugInError),
    Row("settings-a-list", settings_text("[]"), PEFT_CONFIG, PlugInError),
    Row("settings-deep", settings_text(DEEP), PEFT_CONFIG, PlugInError),
    Row("target-emulator-block", retarget(".h.0.", ".h.1."), "no adapter block", PlugInError),
    Row("target-dropped-block", retarget(".h.0.", ".h.2."), "no adapter block", PlugInError),
    Row("target-no-block", retarget(".h.0.", ".h.9."), "no adapter block", PlugInError),
    Row("target-head", retarget("transformer.h.0.mlp.c_fc", "lm_head"), "lm_head", PlugInError),
    Row("target-unknown", retarget("h.0.mlp.c_fc", "h.0.mlp.c_xx"), "c_xx", PlugInError),
    Row("target-norm", retarget("h.0.mlp.c_fc", "h.0.ln_1"), "ln_1", PlugInError),
    Row("tensor-missing", lora(lambda t: t.pop(B)), "lacks", PlugInError),
    Row("tensor-extra", lora(lambda t: t.update(x=torch.zeros(1))), "holds", PlugInError),
    Row(
        "magnitudes",
        lora(lambda t: t.update({B.replace("lora_B", "lora_magnitude_vector"): t[B].clone()})),
        "magnitude",
        PlugInError,
    ),
    Row("half", lora(lambda t: t.update({A: t[A].bfloat16()})), "BF16", PlugInError),
    Row("width", lora(lambda t: t.update({A: t[A][:, :-1]})), "model has", PlugInError),
    Row("rank", lora(lambda t: t.update({A: t[A][:-1]})), "rank 4", PlugInError),
    Row("scalar", lora(lambda t: t.update({A: torch.tensor(0.0)})), "rank 4", PlugInError),
    Row("nan", lora(set_value(A, float("nan"))), "not finite", PlugInError),
    Row("infinite", lora(set_value(B, float("inf"))), "not finite", PlugInError),
    Row(
        "overflow",
        lora(lambda t: (t[A].fill_(3e38), t[B].fill_(3e38))),
        "not finite",
        BundleError,
    ),
    Row("empty-tensors", empty_tensor(PEFT_TENSORS, A), "rank 4", PlugInError),
)
"""What no LoRA may be: rank 4 on every linear layer of a GPT-2's blocks 0, 3 and 5 of 6."""

DOWN = "transformer.h.0.offsite_bottleneck.down.weight"
UP = "transformer.h.0.offsite_bottleneck.up.weight"

BOTTLENECK = (
    Row("missing", tensors(lambda t: t.pop(UP)), "lacks", PlugInError),
    Row("extra", tensors(lambda t: t.update(x=torch.zeros(1))), "holds", PlugInError),
    Row(
        "emulator-block",
        tensors(lambda t: t.update({DOWN.replace(".0.", ".1."): t[DOWN].clone()})),
        "holds",
        PlugInError,
    ),
    Row("width", tensors(lambda t: t.update({DOWN: t[DOWN][:, 1:]})), "not F32", PlugInError),
    Row("rank", tensors(lambda t: t.update({DOWN: t[DOWN][1:]})), "not F32", PlugInError),
    Row("scalar", tensors(lambda t: t.update({DOWN: torch.tensor(0.0)})), "not F32", PlugInError),
    Row("half", tensors(lambda t: t.update({DOWN: t[DOWN].half()})), "F16", PlugInError),
    Row("nan", tensors(set_value(UP, float("nan"))), "not finite", PlugInError),
    Row("infinite", tensors(set_value(DOWN, float("inf"))), "not finite", PlugInError),
    Row("empty-tensors", empty_tensor(TENSORS, DOWN), "not F32", PlugInError),
    Row("none", tensors(lambda t: t.clear()), "lacks", PlugInError),
)
"""What no bottleneck adapter may be."""
