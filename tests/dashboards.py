# SPDX-License-Identifier: Apache-2.0
"""The dashboards of cluster/grafana, and what Prometheus finds at a node of Ray."""

from __future__ import annotations

import json
import re
import threading
from pathlib import Path
from typing import Any, Self

import requests

GRAFANA = Path(__file__).resolve().parents[1] / "cluster" / "grafana"
DASHBOARDS = sorted(path.stem for path in GRAFANA.glob("*.json"))

_METRIC = re.compile(r"\bray_[a-z_]+")
_LABELS = re.compile(r"\bby \(([^)]*)\)|([a-z]+)=~?\"|label_values\([a-z_]+, ([a-z]+)\)")
_SAMPLE = re.compile(r"^(\w+)\{(.*)\} \S+$", re.MULTILINE)


def dashboard(name: str) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((GRAFANA / f"{name}.json").read_text())
    return found


def queries(name: str) -> list[str]:
    """Return what a dashboard asks Prometheus, for its panels and its variables."""
    whole = dashboard(name)
    variables = [v["query"]["query"] for v in whole["templating"]["list"] if v["type"] == "query"]
    targets = [target["expr"] for panel in whole["panels"] for target in panel["targets"]]
    return variables + targets


def asked_for(name: str) -> dict[str, set[str]]:
    """Return the metrics that a dashboard asks for, each with the labels it must have."""
    found: dict[str, set[str]] = {}
    for query in queries(name):
        labels = {
            label.strip()
            for groups in _LABELS.findall(query)
            for label in ",".join(groups).split(",")
            if label.strip()
        }
        for metric in _METRIC.findall(query):
            found.setdefault(metric, set()).update(labels)
    return found


class Scraper:
    """Collects what a node gives Prometheus while a block runs: Ray soon forgets what has ended."""

    def __init__(self, url: str) -> None:
        self._url, self._ended = url, threading.Event()
        self._thread = threading.Thread(target=self._collect, daemon=True)
        self.there: dict[str, set[str]] = {}
        self.samples: set[str] = set()

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def __exit__(self, *error: object) -> None:
        self._ended.set()
        self._thread.join()

    def _collect(self) -> None:
        while not self._ended.wait(1.0):
            self.take(requests.get(self._url, timeout=60).text)

    def take(self, text: str) -> None:
        for metric, labels in _SAMPLE.findall(text):
            self.there.setdefault(metric, set()).update(re.findall(r'(\w+)="', labels))
            if metric.startswith("ray_offsite_ray_"):
                self.samples.add(f"{metric}{{{labels}}}")

    def missing(self, name: str) -> dict[str, set[str]]:
        """Return the metrics, and their labels, that a dashboard asks for and that were not there.

        Args:
            name: Of the dashboard.
        """
        return {
            metric: labels - self.there.get(metric, set())
            for metric, labels in asked_for(name).items()
            if metric not in self.there or labels - self.there[metric]
        }
