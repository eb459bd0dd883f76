# SPDX-License-Identifier: Apache-2.0
"""The fingerprint of a full model: by which an adapter finds back to the model it is for.

It holds a digest of the config, one of every tensor's name, dtype and shape, one for each tensor
that a bundle carries, and one over a fixed sample of bytes of every other tensor. Fine-tuning moves
nearly every weight, so a sample tells another version of a model apart at the cost of a few reads.
"""

from __future__ import annotations

import json
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import blake3

from offsite_ray.architectures import config_values
from offsite_ray.bundle.digest import digest_plain, new_hasher
from offsite_ray.bundle.remembered import nothing_known, recall, remember
from offsite_ray.bundle.windows import windows

if TYPE_CHECKING:
    from collections.abc import Collection, Iterable, Mapping, Sequence
    from pathlib import Path

    from offsite_ray.bundle.tensors import TensorDirectory, TensorInfo

_SAMPLE_WINDOWS = 16
_SAMPLE_WINDOW_BYTES = 256

_VOLATILE = frozenset({"_name_or_path", "transformers_version", "use_cache"})
"""Config keys that change without the model changing."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Fingerprint:
    """Digests by which a full model is known again; see the module's text."""

    config: str
    layout: str
    """Of every tensor's name, dtype and shape."""
    carried: Mapping[str, str]
    """Name in the full model to digest of its bytes, of the tensors that a bundle carries."""
    sample: str
    """Of a fixed sample of bytes of every other tensor."""


def fingerprint(
    directory: Path, weights: TensorDirectory, carried: Mapping[str, str]
) -> Fingerprint:
    """Return the fingerprint of the full model in ``directory``.

    Args:
        directory: The full model.
        weights: Its tensors.
        carried: Names of the tensors that a bundle carries, to the digests of their bytes.
    """
    layout = {name: [info.dtype, list(info.shape)] for name, info in weights.tensors.items()}
    return Fingerprint(
        config=digest_plain(_stable(config_values(directory))),
        layout=digest_plain(layout),
        carried={name: carried[name] for name in sorted(carried)},
        sample=_sample(weights, set(weights.tensors) - set(carried)),
    )


def digests(
    weights: TensorDirectory,
    names: Collection[str],
    files: Collection[Path] = (),
    *,
    from_memory: bool = False,
) -> tuple[dict[str, str], dict[Path, str]]:
    """Return the digests of tensors by name, and of whole files; no byte is read twice for both.

    Args:
        weights: The tensors of a model.
        names: Those of which to give the digest.
        files: Those of its files of which to give the digest.
        from_memory: Read no file that was read so before and not touched since.
    """
    of_tensors, of_files = {}, {}
    for file in weights.files:
        infos = weights.of_file(file)
        wanted = {info.name for info in infos if info.name in names}
        known = recall(file) if from_memory else nothing_known(file)
        if not wanted <= set(known.tensors) or (file in files and known.whole is None):
            whole, tensors = _read_digests(file, infos, wanted, whole=file in files)
            known = replace(known, whole=whole or known.whole, tensors={**known.tensors, **tensors})
            if from_memory:
                remember(file, known)
        of_tensors.update({name: known.tensors[name] for name in wanted})
        if file in files and known.whole is not None:
            of_files[file] = known.whole
    return of_tensors, of_files


def _read_digests(
    file: Path, infos: Sequence[TensorInfo], names: Collection[str], *, whole: bool
) -> tuple[str | None, dict[str, str]]:
    """Return the digest of a file, if that is wanted, and those of some of its tensors."""
    all_bytes = new_hasher() if whole else None
    tensors = {}
    with file.open("rb") as stream:
        if all_bytes is not None:
            all_bytes.update(stream.read(infos[0].begin if infos else -1))
        for info in infos:
            own = new_hasher() if info.name in names else None
            hashers = [hasher for hasher in (all_bytes, own) if hasher is not None]
            for piece in windows(stream, info.begin, info.end) if hashers else ():
                for hasher in hashers:
                    hasher.update(piece)
            if own is not None:
                tensors[info.name] = own.hexdigest()
    return None if all_bytes is None else all_bytes.hexdigest(), tensors


def difference(expected: Fingerprint, found: Fingerprint) -> str | None:
    """Return in words what differs first between two fingerprints, or None."""
    if expected.config != found.config:
        return "its config.json is another"
    if expected.layout != found.layout:
        return "its tensors have other names, shapes or dtypes"
    for name, digest in expected.carried.items():
        if found.carried.get(name) != digest:
            return f"its tensor {name!r} has other values"
    return "its weights have other values" if expected.sample != found.sample else None


def _stable(config: Mapping[str, Any]) -> dict[str, Any]:
    known = {key: value for key, value in config.items() if key not in _VOLATILE}
    # Infinity is no JSON, and stands in some configurations nevertheless.
    stable: dict[str, Any] = json.loads(json.dumps(known), parse_constant=str)
    return stable


def _sample(weights: TensorDirectory, names: Iterable[str]) -> str:
    """Return the digest over evenly spaced windows of each tensor's bytes."""
    hasher = blake3.blake3()
    for name in sorted(names):
        last = max(0, weights.tensors[name].nbytes - _SAMPLE_WINDOW_BYTES)
        starts = sorted({last * i // (_SAMPLE_WINDOWS - 1) for i in range(_SAMPLE_WINDOWS)})
        hasher.update(name.encode())
        hasher.update(weights.sample(name, starts, _SAMPLE_WINDOW_BYTES))
    return hasher.hexdigest()
