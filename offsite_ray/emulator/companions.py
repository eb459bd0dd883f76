# SPDX-License-Identifier: Apache-2.0
"""What lies beside the weights of a model: its config, tokenizer, templates."""

from __future__ import annotations

import json
import re
import shutil
from typing import TYPE_CHECKING

from offsite_ray.architectures.bottleneck import BOTTLENECK_FILE
from offsite_ray.architectures.packed import PACKED_FILE
from offsite_ray.bundle import digest_file
from offsite_ray.errors import FamilyError

if TYPE_CHECKING:
    from pathlib import Path

    from transformers.configuration_utils import PretrainedConfig

COMPANION_FILES = (
    "generation_config.json",
    "tokenizer.json",
    "tokenizer_config.json",
    "tokenizer.model",
    "sentencepiece.bpe.model",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
    "vocab.txt",
    "merges.txt",
    "spiece.model",
    "chat_template.jinja",
    "chat_template.json",
    "preprocessor_config.json",
    "processor_config.json",
)
"""Files beside the weights that belong to a model: its tokenizer, image processor, templates."""

_WEIGHTS = re.compile(r"model(-\d{5}-of-\d{5}\.safetensors|\.safetensors(\.index\.json)?)")


def belongs_to_bundle(name: str) -> bool:
    """Return whether an emulator bundle may hold a file of that name.

    A stock loader acts on files of other names, ``adapter_config.json`` among them.
    """
    weights = _WEIGHTS.fullmatch(name) or PACKED_FILE.fullmatch(name)
    return name in ("config.json", *COMPANION_FILES) or weights is not None


def refuse_bottlenecks(directory: Path) -> None:
    """Refuse a plugged-in model of which something is beside its weights.

    Raises:
        FamilyError: It has bottleneck adapters.
    """
    if (directory / BOTTLENECK_FILE).exists():
        raise FamilyError(
            f"{directory} has bottleneck adapters beside its weights, which would be lost; use the "
            "model that they were plugged into, or another method"
        )


def write_companions(source: Path, target: Path, config: PretrainedConfig | None) -> dict[str, str]:
    """Copy tokenizer and templates; write the config (None: copy it too); return digests."""
    names = [name for name in COMPANION_FILES if (source / name).is_file()]
    if config is None:
        names.append("config.json")
    else:
        (target / "config.json").write_text(config_text(source, config), encoding="utf-8")
    for name in names:
        shutil.copyfile(source / name, target / name)
    return {name: digest_file(target / name) for name in dict.fromkeys((*names, "config.json"))}


def config_text(source: Path, config: PretrainedConfig) -> str:
    """Return ``config.json`` of a changed config, with the class and dtype of the original's."""
    values = json.loads(config.to_json_string(use_diff=False))
    original = json.loads((source / "config.json").read_text(encoding="utf-8"))
    for key in ("architectures", "dtype", "torch_dtype"):
        if key in original:
            values[key] = original[key]
    values.pop("_name_or_path", None)
    return json.dumps(values, indent=2, sort_keys=True) + "\n"
