# SPDX-License-Identifier: Apache-2.0
"""What holds for the package as a whole: imports, files, pins and the length of its files."""

from __future__ import annotations

import importlib.metadata
import subprocess
import sys
import tomllib
from fnmatch import fnmatch
from pathlib import Path
from typing import Any

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

import offsite_ray

ROOT = Path(__file__).resolve().parent.parent
PACKAGE = ROOT / "offsite_ray"
PYPROJECT: dict[str, Any] = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
SPDX = "# SPDX-License-Identifier: Apache-2.0"
MAX_LINES = 400
FOLDERS = ("offsite_ray", "tests", "examples", "benchmarks", "jobs", "serve", "cluster")
SOURCES = sorted(path for folder in FOLDERS for path in (ROOT / folder).rglob("*.py"))


def run(*command: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)


def requirements() -> list[Requirement]:
    project = PYPROJECT["project"]
    optional = [line for lines in project["optional-dependencies"].values() for line in lines]
    return [Requirement(line) for line in (*project["dependencies"], *optional)]


def pins() -> dict[str, str]:
    lines = (ROOT / "constraints.txt").read_text(encoding="utf-8").splitlines()
    pairs = [line.split("==") for line in lines if line and not line.startswith("#")]
    return {canonicalize_name(name): version for name, version in pairs}


def test_import_loads_neither_torch_nor_ray() -> None:
    code = "import offsite_ray, sys; print(*sorted({'torch', 'ray'} & set(sys.modules)))"
    done = run(sys.executable, "-c", code)
    assert (done.returncode, done.stdout.strip()) == (0, ""), done.stderr


def test_version_is_that_of_the_installed_package() -> None:
    assert importlib.metadata.version("offsite-ray") == offsite_ray.__version__


def test_types_are_shipped() -> None:
    assert (PACKAGE / "py.typed").is_file()


def test_every_data_file_is_in_the_wheel() -> None:
    patterns = PYPROJECT["tool"]["setuptools"]["package-data"]["offsite_ray"]
    files = [path for path in PACKAGE.rglob("*") if path.is_file()]
    data = [path for path in files if path.suffix not in (".py", ".pyc")]
    names = [path.relative_to(PACKAGE).as_posix() for path in data]
    assert [name for name in names if not any(fnmatch(name, p) for p in patterns)] == []


def test_every_folder_of_the_package_is_in_the_wheel() -> None:
    folders = {path.parent for path in PACKAGE.rglob("*.py")}
    assert [str(folder) for folder in folders if not (folder / "__init__.py").is_file()] == []


@pytest.mark.parametrize("path", SOURCES, ids=lambda path: path.relative_to(ROOT).as_posix())
def test_source_begins_with_its_licence(path: Path) -> None:
    text = path.read_text(encoding="utf-8")
    assert not text or text.splitlines()[0] == SPDX


def test_no_file_of_the_package_is_too_long() -> None:
    lengths = {
        path.relative_to(ROOT).as_posix(): len(path.read_text(encoding="utf-8").splitlines())
        for path in PACKAGE.rglob("*.py")
    }
    assert {name: lines for name, lines in lengths.items() if lines > MAX_LINES} == {}


def test_imports_point_one_way() -> None:
    lint = Path(sys.executable).with_name("lint-imports")
    done = run(str(lint), "--no-cache")
    assert done.returncode == 0, done.stdout + done.stderr


@pytest.mark.parametrize("requirement", requirements(), ids=str)
def test_dependency_is_pinned_within_its_range(requirement: Requirement) -> None:
    pinned = pins()
    name = canonicalize_name(requirement.name)
    assert name in pinned, f"constraints.txt does not pin {name}"
    assert requirement.specifier.contains(pinned[name], prereleases=True)
