# SPDX-License-Identifier: Apache-2.0
"""The README's commands, run as they are written."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]


def blocks(language: str) -> list[str]:
    """Return the README's code blocks of a language, in order."""
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    return re.findall(rf"```{language}\n(.*?)```", text, flags=re.DOTALL)


@pytest.mark.slow
def test_every_command_of_the_readme_runs(tmp_path: Path) -> None:
    shutil.copytree(ROOT / "examples", tmp_path / "examples")
    bin_dir = Path(sys.executable).parent
    shell = "\n".join(blocks("bash")).replace("source .venv/bin/activate", "true")
    script = f"set -euo pipefail\n{shell}\npython - <<'END'\n{''.join(blocks('python'))}END\n"
    done = subprocess.run(
        ["bash", "-c", script],
        cwd=tmp_path,
        env={**os.environ, "PATH": f"{bin_dir}:{os.environ['PATH']}", "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-4000:]
    result = json.loads((tmp_path / "runs/result.json").read_text())
    assert all(result["settings"][name]["perplexity"] > 1 for name in result["settings"])
    assert result["bound_share"] is not None
    assert "Plug-in" in (tmp_path / "runs/report/report.html").read_text(encoding="utf-8")
    assert (tmp_path / "runs/report/report.png").is_file()
    assert '"object":"text_completion"' in done.stdout
    leftovers = [p.name for p in (tmp_path / "runs").iterdir() if p.name.startswith(".")]
    assert leftovers == []


def test_the_readme_names_every_family() -> None:
    from offsite_ray.architectures import FAMILIES

    text = (ROOT / "README.md").read_text(encoding="utf-8")
    assert [family for family in FAMILIES if family not in text] == []
