# SPDX-License-Identifier: Apache-2.0
"""What the pages say: commands that the command line takes, links that lead somewhere."""

from __future__ import annotations

import json
import re
import shlex
from typing import TYPE_CHECKING

import pytest

from offsite_ray.cli.arguments import parse
from offsite_ray.cli.verbs import VERBS
from tests.conftest import ROOT

if TYPE_CHECKING:
    from pathlib import Path

PAGES = sorted([ROOT / "README.md", *ROOT.glob("docs/*.md"), *ROOT.glob("*/README.md")])
_LINK = re.compile(r"\]\((?!https?:)([^)#\s]+)(?:#[^)]*)?\)")


def commands(page: Path) -> list[list[str]]:
    """Return the words behind each ``offsite-ray`` in a page's blocks of shell commands."""
    blocks = re.findall(r"```bash\n(.*?)```", page.read_text(encoding="utf-8"), flags=re.DOTALL)
    lines = "".join(blocks).replace("\\\n", " ").splitlines()
    found = (re.search(r"(?:^|-- )offsite-ray ([^|&;>]*)", line.split("  #")[0]) for line in lines)
    return [shlex.split(match[1]) for match in found if match]


def test_there_are_commands_to_look_at() -> None:
    assert sum(len(commands(page)) for page in PAGES) > 30


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_the_command_line_takes_what_a_page_says(page: Path, tmp_path: Path) -> None:
    recipe = tmp_path / "recipe.yaml"
    stock = (ROOT / "jobs" / "recipes" / "opt-1.3b.yaml").read_text(encoding="utf-8")
    sweep = {"model": "M", "private": ["p.txt"], "text": ["t.txt"], "preset": "figure4"}
    recipe.write_text(f"{stock}\nsweep: {json.dumps(sweep)}\n")
    for verb, *words in commands(page):
        if "--config" in words:
            words[words.index("--config") + 1] = str(recipe)  # whatever file is meant
        parse(VERBS[verb], words, VERBS)


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_links_lead_somewhere(page: Path) -> None:
    links = _LINK.findall(page.read_text(encoding="utf-8"))
    assert [link for link in links if not (page.parent / link).exists()] == []
