# SPDX-License-Identifier: Apache-2.0
"""Ways to damage a bundle or an adapter on disk, with and without digests that still fit."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any

from blake3 import blake3
from safetensors.torch import load_file, save_file

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

    from torch import Tensor

MANIFEST = "offsite.json"


def edit_json(file: Path, edit: Callable[[dict[str, Any]], object]) -> None:
    """Change the JSON object in a file in place; the edit's return value is not used."""
    values = json.loads(file.read_text(encoding="utf-8"))
    edit(values)
    file.write_text(json.dumps(values), encoding="utf-8")


def edit_tensors(file: Path, edit: Callable[[dict[str, Tensor]], object]) -> None:
    """Change the tensors of a safetensors file in place; the edit's return value is not used."""
    tensors = load_file(file)
    edit(tensors)
    save_file({n: t.contiguous() for n, t in tensors.items()}, file, metadata={"format": "pt"})


def edit_header(file: Path, edit: Callable[[dict[str, Any]], object], tail: bytes = b"") -> None:
    """Change the header of a safetensors file without a look at its tensors; append ``tail``."""
    header, data = split_safetensors(file)
    values = json.loads(header)
    edit(values)
    join_safetensors(file, json.dumps(values).encode(), data + tail)


def split_safetensors(file: Path) -> tuple[bytes, bytes]:
    """Return the header and the tensors of a safetensors file."""
    raw = file.read_bytes()
    end = 8 + int.from_bytes(raw[:8], "little")
    return raw[8:end], raw[end:]


def join_safetensors(file: Path, header: bytes, data: bytes) -> None:
    """Write a safetensors file of a header and tensors as they are."""
    file.write_bytes(len(header).to_bytes(8, "little") + header + data)


def reseal(directory: Path, edit: Callable[[dict[str, Any]], object] | None = None) -> None:
    """Make the manifest fit again what lies beside it, as somebody would who tampers with care.

    Args:
        directory: Of the bundle.
        edit: Changes the manifest before its id is computed anew.
    """
    file = directory / MANIFEST
    values = json.loads(file.read_text(encoding="utf-8"))
    values["files"] = {
        path.name: blake3(path.read_bytes()).hexdigest()
        for path in sorted(directory.iterdir())
        if path.name != MANIFEST and path.is_file()
    }
    if edit is not None:
        edit(values)
    del values["id"]
    text = json.dumps(values, sort_keys=True, separators=(",", ":"))
    file.write_text(json.dumps({**values, "id": blake3(text.encode()).hexdigest()}), "utf-8")
