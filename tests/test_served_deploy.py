# SPDX-License-Identifier: Apache-2.0
"""A Serve config file, run by Serve's own command."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import requests
import yaml

from tests.deployed import eventually, free_port, make_served

ROOT = Path(__file__).resolve().parents[1]


def answers(url: str) -> bool:
    try:
        return requests.get(url, timeout=5).ok
    except requests.RequestException:
        return False


def test_a_config_file_is_run_by_serve_itself(tmp_path: Path) -> None:
    tenants, port = make_served(tmp_path / "served"), free_port()
    plain: dict[str, Any] = yaml.safe_load((ROOT / "serve" / "local.yaml").read_text())
    plain["http_options"]["port"] = port
    plain["applications"][0]["args"] |= {
        "model": str(tenants.full),
        "adapter": [f"acme={tenants.adapters['full']}"],
        "state": str(tmp_path / "state"),
        "num_cpus": 0.5,
    }
    file = tmp_path / "deploy.yaml"
    file.write_text(yaml.safe_dump(plain))
    environment = {name: value for name, value in os.environ.items() if name != "RAY_ADDRESS"}
    with (tmp_path / "serve.log").open("w") as log:
        process = subprocess.Popen(
            [str(Path(sys.executable).parent / "serve"), "run", "--address=local", str(file)],
            env={**environment, "PYTHONPATH": str(ROOT)},
            stdout=log,
            stderr=subprocess.STDOUT,
        )
    try:
        url = f"http://127.0.0.1:{port}"
        eventually(lambda: answers(f"{url}/health"), 120)
        key = (tmp_path / "state" / "admin.key").read_text().strip()
        answer = requests.post(
            f"{url}/v1/completions",
            json={"model": "acme", "prompt": "The cat sat", "max_tokens": 6, "temperature": 0},
            headers={"Authorization": f"Bearer {key}"},
            timeout=60,
        )
        assert answer.status_code == 200, answer.text
        assert answer.json()["choices"][0]["text"]
    finally:
        process.send_signal(signal.SIGINT)
        process.wait(60)
