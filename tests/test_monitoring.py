# SPDX-License-Identifier: Apache-2.0
"""Metrics of verbs as Prometheus finds them at a node, and the dashboards that ask for them."""

from __future__ import annotations

import json
import time
from itertools import combinations
from typing import TYPE_CHECKING, Any

import pytest
import ray
import yaml

from offsite_ray import monitoring
from offsite_ray.cli import main
from offsite_ray.monitoring import GAUGES
from tests.dashboards import DASHBOARDS, Scraper, asked_for, dashboard, queries

if TYPE_CHECKING:
    from pathlib import Path

    from tests.loops import Loop


def test_there_is_a_dashboard_for_training_sweeps_and_serving() -> None:
    assert DASHBOARDS == ["serving", "sweeps", "training"]
    assert len({dashboard(name)["uid"] for name in DASHBOARDS}) == len(DASHBOARDS)


@pytest.mark.parametrize("name", DASHBOARDS)
def test_a_dashboard_is_whole(name: str) -> None:
    whole = dashboard(name)
    assert whole["schemaVersion"] >= 36
    assert whole["title"].startswith("offsite_ray: ")
    source, choice = whole["templating"]["list"]
    assert (source["name"], source["type"], source["query"]) == (
        "datasource", "datasource", "prometheus",
    )  # fmt: skip
    asks = {"type": "prometheus", "uid": "${datasource}"}
    assert (choice["type"], choice["datasource"]) == ("query", asks)
    panels = whole["panels"]
    assert len({panel["id"] for panel in panels}) == len(panels)
    assert len({panel["title"] for panel in panels}) == len(panels)
    for panel in panels:
        assert (panel["type"], panel["datasource"]) == ("timeseries", asks)
        assert panel["fieldConfig"]["defaults"]["unit"]
        targets = panel["targets"]
        assert targets
        assert len({target["refId"] for target in targets}) == len(targets)
        assert all(target["datasource"] == asks for target in targets)
        assert all(target["expr"] and target["legendFormat"] for target in targets)
        place = panel["gridPos"]
        assert place["x"] + place["w"] <= 24
    for one, other in combinations([panel["gridPos"] for panel in panels], 2):
        apart = any(
            a[at] + a[size] <= b[at]
            for a, b in ((one, other), (other, one))
            for at, size in (("x", "w"), ("y", "h"))
        )
        assert apart, (one, other)
    for query in queries(name):
        assert all(query.count(a) == query.count(b) for a, b in ("()", "{}", "[]"))
        assert set(query.split("$")[1:]) == {
            part for part in query.split("$")[1:] if part.startswith(choice["name"])
        }


def test_dashboards_show_every_gauge_but_what_a_cpu_has_not() -> None:
    asked = {metric for name in ("training", "sweeps") for metric in asked_for(name)}
    assert asked == {f"ray_offsite_ray_{name}" for name in GAUGES if "flops" not in name}


def test_what_is_set_meanwhile_is_not_set_back(monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[float] = []

    class Slow:
        def set(self, value: float, _: object) -> None:
            time.sleep(0 if value in seen else 0.1)
            seen.append(value)

    monkeypatch.setattr(monitoring, "_AGAIN_S", 0.01)
    monkeypatch.setattr(ray, "is_initialized", lambda: True)
    gauges = monitoring.Gauges("run", "distill")
    monkeypatch.setattr(gauges, "_gauge", lambda _: Slow())
    with gauges.kept():
        for value in (1.0, 2.0):
            gauges.set([("train_steps", value, {})])
            time.sleep(0.05)
    assert set(seen[seen.index(2.0) :]) == {2.0}


@pytest.mark.usefixtures("ray_cluster")
def test_what_dashboards_ask_for_comes_out_of_runs(loop: Loop, tmp_path: Path) -> None:
    def offsite_ray(verb: str, **given: Any) -> None:
        recipe = tmp_path / f"{verb}.yaml"
        recipe.write_text(yaml.safe_dump(given))
        words = ("--config", str(recipe), "--run", verb, "--runs", str(tmp_path / "runs"))
        assert main([verb, *words, "--out", str(tmp_path / verb), "--json"]) == 0

    model, text, data = str(loop.model), [str(loop.text)], str(tmp_path / "prepare")
    space = {"compress": {"plan": "1-2-1"}, "finetune": {"max_steps": 1, "batch_size": 2}}
    (node,) = (node for node in ray.nodes() if node["Alive"])
    url = f"http://{node['NodeManagerAddress']}:{node['MetricsExportPort']}/metrics"
    with Scraper(url) as found:
        offsite_ray("prepare", tokenizer=model, text=text, block_size=16, num_workers=1)
        offsite_ray(
            "distill", model=model, bundle=str(loop.bundle), data=[data], num_workers=0,
            max_steps=2, batch_size=4, seq_len=16,
        )  # fmt: skip
        offsite_ray(
            "sweep", model=model, private=text, text=text, space=space, seq_len=16,
            max_concurrent=0,
        )  # fmt: skip
        until = time.monotonic() + 60
        while found.missing("training") | found.missing("sweeps") and time.monotonic() < until:
            time.sleep(0.5)
    assert found.missing("training") | found.missing("sweeps") == {}
    told = "\n".join(found.samples)
    for label in (
        'run="distill"', 'verb="distill"', 'part="hidden"', 'status="finished"', 'run="sweep"',
    ):  # fmt: skip
        assert label in told
    record = json.loads((tmp_path / "runs" / "prepare" / "run.json").read_text())
    assert record["device_hours"]["gpu"] == 0
    assert record["device_hours"]["cpu"] > 0


def test_a_sweep_that_goes_on_keeps_the_lines_of_jobs_that_nobody_saw_end(
    loop: Loop, tmp_path: Path
) -> None:
    space = {"compress": {"plan": "1-2-1"}, "finetune": {"max_steps": 1, "batch_size": 2}}
    (tmp_path / "sweep.yaml").write_text(json.dumps({"space": space}))
    words = [
        "sweep", f"--config={tmp_path}/sweep.yaml", f"--model={loop.model}",
        f"--private={loop.text}", f"--text={loop.text}", "--seq-len=16", "--max-concurrent=0",
        f"--out={tmp_path}/out", "--run=tried", f"--runs={tmp_path}/runs",
    ]  # fmt: skip
    assert main(words) == 0
    file = tmp_path / "runs/tried/metrics.jsonl"
    lines = file.read_text().splitlines(keepends=True)
    file.write_text("".join(lines[1:-1]))
    assert main(words) == 0
    assert sorted(file.read_text().splitlines(keepends=True)) == sorted(lines)
