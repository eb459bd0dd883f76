# SPDX-License-Identifier: Apache-2.0
"""Writing a model with trained tensors in it: plug-in, and the baseline's result."""

from __future__ import annotations

import json
from dataclasses import dataclass
from typing import TYPE_CHECKING

from offsite_ray.architectures import config_values
from offsite_ray.architectures.bottleneck import BOTTLENECK_FILE, BOTTLENECK_TYPE
from offsite_ray.bundle import TensorDirectory, digest_file, rewrite_model, specs, write_file
from offsite_ray.emulator import write_companions
from offsite_ray.errors import IntegrityError, PlugInError
from offsite_ray.finetuning.methods import FinetuningMethod, Replacements, bottleneck_tensors

if TYPE_CHECKING:
    from collections.abc import Mapping
    from pathlib import Path

    from offsite_ray.finetuning.host import Host


@dataclass(frozen=True, kw_only=True, slots=True)
class PluggedIn:
    """What was written."""

    files: dict[str, str]
    """File name to digest."""
    replaced: tuple[str, ...] = ()
    """Names of the tensors that have other values now."""
    added: tuple[str, ...] = ()
    """Names of the tensors that lie beside those of the model."""


def write_plugged_in(
    directory: Path,
    host: Host,
    method: FinetuningMethod,
    path: Path,
    saved: TensorDirectory,
    known: Mapping[Path, str] | None = None,
) -> PluggedIn:
    """Write a model with trained tensors in it.

    Args:
        directory: Empty.
        host: The model.
        method: By which the tensors were trained.
        path: Where they are.
        saved: The tensors.
        known: Digests of files of the model, where somebody has just read them.
    """
    if method.replacements is None:
        return _write_bottleneck(directory, host, path, saved, known)
    replacements = checked_replacements(method, path, saved, host)
    files = rewrite_model(host.path, directory, replacements, known)
    files |= write_companions(host.path, directory, None)
    return PluggedIn(files=files, replaced=tuple(sorted(replacements)))


def checked_replacements(
    method: FinetuningMethod, path: Path, saved: TensorDirectory, host: Host
) -> Replacements:
    """Return a method's replacements; what it cannot use is refused as :class:`PlugInError`."""
    if method.replacements is None:
        return {}
    try:
        return method.replacements(path, saved, host)
    except IntegrityError as error:
        raise PlugInError(str(error)) from error


def check_plug_in(method: FinetuningMethod, path: Path, saved: TensorDirectory, host: Host) -> None:
    """Check that trained tensors can be plugged into a model; nothing is written.

    Raises:
        BundleError: They cannot.
    """
    if method.replacements is None:
        bottleneck_tensors(path, saved, host)
    for new in checked_replacements(method, path, saved, host).values():
        new()


def _write_bottleneck(
    directory: Path,
    host: Host,
    path: Path,
    saved: TensorDirectory,
    known: Mapping[Path, str] | None,
) -> PluggedIn:
    """Write the model unchanged with the bottlenecks beside it, and a config that says so."""
    tensors = bottleneck_tensors(path, saved, host)
    files = rewrite_model(host.path, directory, {}, known)
    files |= write_companions(host.path, directory, None)
    files[BOTTLENECK_FILE] = write_file(directory / BOTTLENECK_FILE, specs(tensors))
    config = directory / "config.json"
    values = {
        "model_type": BOTTLENECK_TYPE,
        "architectures": ["OffsiteBottleneckModel"],
        "base_config": config_values(host.path),
        "blocks": host.arch.blocks_path,
    }
    config.write_text(json.dumps(values, indent=2) + "\n", encoding="utf-8")
    files["config.json"] = digest_file(config)
    return PluggedIn(files=files, added=tuple(sorted(tensors)))
