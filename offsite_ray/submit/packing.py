# SPDX-License-Identifier: Apache-2.0
"""What goes to the cluster with a job: its recipe, this package, and which versions it needs.

Nothing else does. Everybody who may ask the cluster may read all of it, so no secret is in it: jobs
have those of the nodes that they run on.
"""

from __future__ import annotations

import contextlib
import re
import tempfile
from importlib import metadata
from pathlib import Path
from typing import TYPE_CHECKING, Any

import offsite_ray
from offsite_ray.errors import ConfigError, StorageError
from offsite_ray.uris import has_key

if TYPE_CHECKING:
    from collections.abc import Iterator

    from offsite_ray.config import SubmitConfig

RECIPE = "recipe.yaml"
"""The recipe, in the folder that a job begins in."""
REQUIREMENTS = "requirements.txt"
"""The versions beside it, where they are to be checked."""

_NAME = re.compile(r"[A-Za-z0-9._-]+")


def read_recipe(config: SubmitConfig) -> bytes:
    """Return a recipe that may be read by others, and its changes too.

    Raises:
        StorageError: It cannot be read.
        ConfigError: There is a key in it.
    """
    path = Path(config.recipe or "")
    try:
        recipe = path.read_bytes()
    except OSError as error:
        raise StorageError(f"cannot read --config {path}: {error.strerror}") from error
    named = {str(path): recipe.decode(errors="replace"), "KEY=VALUE": "\n".join(config.words)}
    for name, text in named.items():
        if has_key(text):
            raise ConfigError(
                f"{name} has a key in an address (USER:PASSWORD@, ?secret_key=), and all who may "
                "ask the cluster may read a recipe; give it to the nodes, e.g. as "
                "AWS_SECRET_ACCESS_KEY"
            )
    return recipe


@contextlib.contextmanager
def packed(recipe: bytes, packages: str) -> Iterator[dict[str, Any]]:
    """Give the runtime environment of a job; its folder is there until the block ends.

    Args:
        recipe: What the verb is to read.
        packages: Of :class:`SubmitConfig`.
    """
    with tempfile.TemporaryDirectory(prefix="offsite-ray-") as folder:
        (Path(folder) / RECIPE).write_bytes(recipe)
        environment: dict[str, Any] = {
            "working_dir": folder,
            "py_modules": [str(Path(offsite_ray.__file__).parent)],
            "excludes": ["__pycache__"],
        }
        if packages != "any":
            pins = pinned()
            text = "".join(f"{name}=={version}\n" for name, version in pins.items())
            (Path(folder) / REQUIREMENTS).write_text(text, encoding="utf-8")
        if packages == "pip":
            # Ray's own version is that of the cluster, and no environment can be another.
            environment["pip"] = [f"{n}=={v}" for n, v in pins.items() if n != "ray"]
        yield environment


def pinned() -> dict[str, str]:
    """Return what this package requires, in the versions that are installed here.

    Local parts are left out (``2.13.0+cpu``): the nodes may have another build of the same version.

    Raises:
        ConfigError: This package was not installed, so nothing says what it requires.
    """
    try:
        lines = metadata.requires("offsite-ray") or []
    except metadata.PackageNotFoundError:
        raise ConfigError(
            "offsite-ray is not installed here, only found, so its requirements are unknown; "
            "install it (pip install -e .), or do not check with --packages any"
        ) from None
    found = {}
    for line in lines:
        match = _NAME.match(line)
        if match and "extra ==" not in line and (version := _installed(match[0])):
            found[match[0]] = version
    return found


def check_installed(requirements: Path) -> None:
    """Refuse to run with other versions than the pinned ones; raise :class:`ConfigError`."""
    pins = dict(line.split("==") for line in requirements.read_text(encoding="utf-8").split())
    others = [
        f"{name} {_installed(name) or 'missing'} (submitted with {version})"
        for name, version in pins.items()
        if _installed(name) != version
    ]
    if others:
        raise ConfigError(
            f"the cluster has other versions: {', '.join(others)}; submit from a machine with "
            "those of the cluster, have Ray install them with --packages pip, or do not check with "
            "--packages any"
        )


def _installed(name: str) -> str | None:
    """Return a version without its local part; None where there is none, e.g. on another system."""
    with contextlib.suppress(metadata.PackageNotFoundError):
        return metadata.version(name).partition("+")[0]
    return None
