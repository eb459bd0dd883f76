# SPDX-License-Identifier: Apache-2.0
"""The manifest ``offsite.json``: what a bundle is, what it was made from, and its digests."""

from __future__ import annotations

import dataclasses
import datetime
import json
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath
from typing import TYPE_CHECKING, Any, Literal, get_args

from offsite_ray import __version__
from offsite_ray.bundle.digest import canonical_json, digest_file, digest_plain, unique_names
from offsite_ray.bundle.fingerprint import Fingerprint
from offsite_ray.errors import BundleError, IntegrityError, OffsiteError, StorageError
from offsite_ray.results import to_plain
from offsite_ray.split import SplitPlan

if TYPE_CHECKING:
    from collections.abc import Mapping

MANIFEST = "offsite.json"
SCHEMA_VERSION = 1

Kind = Literal["emulator_bundle", "adapter_bundle", "plugged_in_model"]

_MAX_MANIFEST_BYTES = 64 * 2**20
_MAX_BLOCKS = 10_000
"""More than any model has; a plan is spelled out block by block."""

_SUFFIXES = (".safetensors", ".json", ".txt", ".model", ".jinja")
"""Of the files that a bundle may hold: neither pickles nor code."""


@dataclass(frozen=True, kw_only=True, slots=True)
class ModelFacts:
    """The full model, as far as a bundle says."""

    family: str
    """``model_type`` of its config."""
    architecture: str
    """Class in transformers."""
    blocks: str
    """Path of its block list."""
    recognised: str
    """``table``, ``structure`` or ``path``."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Manifest:
    """What ``offsite.json`` holds."""

    kind: Kind
    model: ModelFacts
    plan: SplitPlan
    full_model: Fingerprint
    files: Mapping[str, str]
    """File name to digest, of every file of the bundle but the manifest."""
    recipe: Mapping[str, Any] = field(default_factory=dict)
    """Stage to how it was done, with seeds: selection, compression, distillation, finetuning."""
    dtypes: Mapping[str, Any] = field(default_factory=dict)
    """``stored``: dtypes of the tensors on disk; ``compute``: of the forward pass, if any."""
    trained_against: str | None = None
    """Id of the emulator bundle that an adapter was trained against."""
    measured: Mapping[str, Any] = field(default_factory=dict)
    """Figures with their unit in the name; None where not measured."""
    created: str = ""
    tool: str = f"offsite_ray {__version__}"
    schema_version: int = SCHEMA_VERSION

    @property
    def id(self) -> str:
        """Digest of everything that the manifest says, the digests of all files among it."""
        return digest_plain(self._content())

    def _content(self) -> dict[str, Any]:
        content: dict[str, Any] = to_plain(self)
        content["plan"] |= {"kept": list(self.plan.kept), "text": self.plan.short}
        return content

    def to_json(self) -> dict[str, Any]:
        """Return the manifest as ``offsite.json`` holds it."""
        return {"schema_version": self.schema_version, "id": self.id, **self._content()}


def now() -> str:
    """Return the time as manifests write it: ISO 8601, UTC, to the second."""
    return datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds")


def write_manifest(directory: Path, manifest: Manifest) -> Manifest:
    """Write ``offsite.json``, with the time where it has none; return what was written."""
    dated = manifest if manifest.created else dataclasses.replace(manifest, created=now())
    text = json.dumps(dated.to_json(), indent=2, allow_nan=False) + "\n"
    (directory / MANIFEST).write_text(text, encoding="utf-8")
    return dated


def read_manifest(directory: Path) -> Manifest:
    """Return the manifest of a bundle, checked in itself; files are not looked at.

    Raises:
        StorageError: There is no such directory.
        BundleError: It is no bundle, or one of a future schema.
        IntegrityError: The manifest was altered, or contradicts itself.
    """
    path = directory / MANIFEST
    if not directory.is_dir():
        raise StorageError(f"{directory} is no directory; give the directory of a bundle")
    if not path.is_file():
        raise BundleError(
            f"{directory} has no {MANIFEST}, so it is no bundle; 'offsite-ray compress' makes one"
        )
    if path.is_symlink() or path.stat().st_size > _MAX_MANIFEST_BYTES:
        raise IntegrityError(f"{path} is a link or over {_MAX_MANIFEST_BYTES} bytes; refused")
    try:
        values = json.loads(path.read_text(encoding="utf-8"), object_pairs_hook=unique_names)
    except (ValueError, RecursionError) as error:
        raise IntegrityError(f"{path} is no JSON: {error}") from error
    return _parse(path, values)


def _parse(path: Path, values: Any) -> Manifest:
    version = values.get("schema_version") if isinstance(values, dict) else None
    if version != SCHEMA_VERSION:
        raise BundleError(
            f"{path} has schema version {version!r}, this version reads {SCHEMA_VERSION}; "
            "install the version of offsite_ray that wrote it"
        )
    try:
        manifest = _from_json(values)
        same = canonical_json(manifest.to_json()) == canonical_json(values)
    except OffsiteError as error:
        raise IntegrityError(f"{path}: {error}") from error
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise IntegrityError(f"{path} is no manifest: {error!r}") from error
    if not same:
        raise IntegrityError(f"{path} was altered: its content does not have the id that it names")
    return manifest


def _from_json(values: dict[str, Any]) -> Manifest:
    content = {key: value for key, value in values.items() if key != "id"}
    plan = content["plan"]
    if content["kind"] not in get_args(Kind):
        raise IntegrityError(f"kind {content['kind']!r} is none of {', '.join(get_args(Kind))}")
    _check_types(content)
    return Manifest(
        **{
            **content,
            "plan": SplitPlan(
                num_blocks=plan["num_blocks"],
                adapter=tuple(plan["adapter"]),
                emulator=tuple(plan["emulator"]),
            ),
            "model": ModelFacts(**content["model"]),
            "full_model": Fingerprint(**content["full_model"]),
            "files": _file_names(content["files"]),
        }
    )


def _check_types(content: Mapping[str, Any]) -> None:
    """Check what the class's annotations promise, where whatever reads a manifest relies on it."""
    full_model, plan = content["full_model"], content["plan"]
    for name in ("recipe", "dtypes", "measured"):
        if not isinstance(content[name], dict):
            raise IntegrityError(f"{name} is {content[name]!r}, not an object")
    for name, digests in (("files", content["files"]), ("carried", full_model["carried"])):
        if not isinstance(digests, dict) or not all(map(_is_text, digests.values())):
            raise IntegrityError(f"{name} does not give a digest for each name")
    texts = {
        **content["model"],
        **{name: content[name] for name in ("created", "tool")},
        **{name: full_model[name] for name in ("config", "layout", "sample")},
        "trained_against": content["trained_against"] or "",
    }
    if odd := [name for name, value in texts.items() if not _is_text(value)]:
        raise IntegrityError(f"{odd[0]} is {texts[odd[0]]!r}, not a line of text")
    if not 0 <= plan["num_blocks"] <= _MAX_BLOCKS:
        raise IntegrityError(f"a plan for {plan['num_blocks']} blocks, at most {_MAX_BLOCKS}")
    numbers = (plan["num_blocks"], *plan["adapter"], *plan["emulator"])
    for number in numbers:
        if type(number) is not int:
            raise IntegrityError(f"the plan names block {number!r}, which is no whole number")


def _is_text(value: object) -> bool:
    """Return whether a value is text that may go to a terminal as it is."""
    return isinstance(value, str) and value.isprintable()


def _file_names(files: Mapping[str, str]) -> Mapping[str, str]:
    for name in files:
        path = PurePosixPath(name)
        if path.is_absolute() or ".." in path.parts or len(path.parts) != 1 or name == MANIFEST:
            raise IntegrityError(f"the manifest names the file {name!r}, which is not beside it")
        if path.suffix not in _SUFFIXES:
            raise IntegrityError(
                f"the manifest names the file {name!r}; bundles hold only "
                f"{', '.join(_SUFFIXES)}, and anything else is never read"
            )
    return files


def read_verified(directory: Path, kind: Kind) -> Manifest:
    """Return the manifest of a bundle of some kind, every file of it verified.

    Raises:
        BundleError: It is no bundle, or one of another kind.
        IntegrityError: It is not whole or was altered.
    """
    manifest = read_manifest(directory)
    _check_kind(directory, manifest, kind)
    _check_files(directory, manifest)
    return manifest


def _check_kind(directory: Path, manifest: Manifest, kind: Kind) -> None:
    """Refuse a bundle of another kind than a verb needs; raise :class:`BundleError`."""
    if manifest.kind != kind:
        raise BundleError(
            f"{directory} is of the kind {manifest.kind!r}, and {kind!r} is needed here"
        )


def _check_files(directory: Path, manifest: Manifest) -> None:
    """Check that a bundle's files are exactly those of its manifest, unaltered.

    Raises:
        IntegrityError: A file is missing, too many, a link or altered.
    """
    present = {path.name for path in directory.iterdir()} - {MANIFEST}
    if missing := sorted(set(manifest.files) - present):
        raise IntegrityError(f"{directory} lacks {missing[0]!r}, which its manifest names")
    if extra := sorted(present - set(manifest.files)):
        raise IntegrityError(
            f"{directory} holds {extra[0]!r}, which its manifest does not name; remove it"
        )
    for name, digest in manifest.files.items():
        path = directory / name
        if path.is_symlink() or not path.is_file():
            raise IntegrityError(f"{path} is a link or no file; bundles hold plain files only")
        if digest_file(path) != digest:
            raise IntegrityError(f"{path} was altered: its digest is not the one in {MANIFEST}")
