# SPDX-License-Identifier: Apache-2.0
"""Text that is on every machine with Python and this package's dependencies.

Files are read, never imported. The order is that of the names, so the same versions give the same
text everywhere.
"""

from __future__ import annotations

import ast
import importlib.util
import pydoc_data.topics
import sysconfig
from dataclasses import dataclass
from pathlib import Path

import blake3

from offsite_ray.errors import DataError

_NOT_PROSE_OR_CODE = frozenset(
    {
        "__pycache__",
        "encodings",
        "idlelib",
        "lib2to3",
        "pydoc_data",
        "site-packages",
        "test",
        "tests",
        "turtledemo",
    }
)
"""Folders of the standard library with tests, tables, or a program of their own."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Document:
    """A piece of text with a name that is the same on every machine."""

    name: str
    text: str


def standard_library() -> list[Document]:
    """Return the sources of the standard library and the topics of its ``help()``, by name."""
    root = Path(sysconfig.get_paths()["stdlib"])
    names = sorted(
        path.relative_to(root)
        for path in root.rglob("*.py")
        if not _NOT_PROSE_OR_CODE & set(path.relative_to(root).parts)
    )
    sources = [
        Document(name=name.as_posix(), text=(root / name).read_text(errors="replace"))
        for name in names
    ]
    topics = [
        Document(name=f"topics/{topic}", text=text)
        for topic, text in sorted(pydoc_data.topics.topics.items())
    ]
    return [document for document in sources + topics if document.text.strip()]


_SHORTEST_DOCSTRING = 200
"""Characters below which a docstring is a label more than a text."""


def package_documentation(package: str) -> list[Document]:
    """Return the docstrings of an installed package, a document for each module, by name.

    Raises:
        DataError: The package is not installed.
    """
    spec = importlib.util.find_spec(package)
    if spec is None or not spec.submodule_search_locations:
        raise DataError(f"package {package!r} is not installed, and its documentation is needed")
    root = Path(spec.submodule_search_locations[0])
    documents = []
    for path in sorted(root.rglob("*.py")):
        name = path.relative_to(root.parent)
        if not _NOT_PROSE_OR_CODE & set(name.parts[1:]):
            text = "\n\n".join(_docstrings(path.read_text(encoding="utf-8", errors="replace")))
            documents.append(Document(name=name.as_posix(), text=text))
    return [document for document in documents if document.text]


def _docstrings(source: str) -> list[str]:
    """Return the docstrings of a module that are long enough to be prose, in order."""
    kinds = (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)
    nodes = [node for node in ast.walk(ast.parse(source)) if isinstance(node, kinds)]
    found = [ast.get_docstring(node) for node in nodes]
    return [text for text in found if text and len(text) >= _SHORTEST_DOCSTRING]


def held_out(documents: list[Document], one_in: int) -> tuple[list[Document], list[Document]]:
    """Return the documents to train on and one in so many to measure, by a hash of the name."""
    chosen = {d.name for d in documents if blake3.blake3(d.name.encode()).digest()[0] % one_in == 0}
    return (
        [d for d in documents if d.name not in chosen],
        [d for d in documents if d.name in chosen],
    )
