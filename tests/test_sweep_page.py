# SPDX-License-Identifier: Apache-2.0
"""The report of a sweep, in a real browser: drawn, pointed at, sorted, on a phone, offline."""

from __future__ import annotations

import json
import re
from typing import TYPE_CHECKING, Any

import pytest

from offsite_ray.config import SweepConfig
from offsite_ray.tune.front import chosen, front
from offsite_ray.tune.page import page_data, write_page
from offsite_ray.tune.table import summaries
from tests.test_sweep_results import a_row

if TYPE_CHECKING:
    from pathlib import Path

    from tests.browser import Browser

CONFIG = SweepConfig(
    model="models/foundation", private=("p",), text=("held-out.txt",), out="o", seeds=3,
    space={"compress": {"plan": "2-4-2"}},
)  # fmt: skip
BOTTOM, TOP, BOTH = "0,1,2,3", "12,13,14,15", "0,1,14,15"


def a_point(name: str, size: int, steps: int, select: str, seed: int) -> dict[str, Any]:
    """Return a row as a sweep of a model of 16 blocks might have it."""
    lost = 0.9 / size * (2.7 if select == "tail" else 1) / (1 + steps / 40)
    plug_in, emulator = 3.2 + 0.15 * lost + seed / 500, 3.3 + 2 * lost + seed / 300
    return a_row(
        name, seed, plan=f"2-{size}-2", select=select, distill_steps=steps, num_blocks=16,
        control="tail" if select == "tail" else None, num_emulator_blocks=size,
        num_adapter_blocks=4, adapter_blocks=BOTH, emulator_blocks="2,3",
        bundle_bytes=10**6 * (size + 6), full_model_bytes=18 * 10**6, plug_in_nats=plug_in,
        emulator_fine_tuned_nats=emulator, emulator_zero_shot_nats=emulator + 0.4,
        bound_nats=3.18, bound_gap=plug_in - 3.18, utility_gap=plug_in - 3.1,
        privacy_gap=emulator - plug_in, bound_share=0.9, seconds=12.0,
        settings=json.dumps({"compress": {"plan": f"2-{size}-2"}, "finetune": {}}),
    )  # fmt: skip


def some_rows() -> list[dict[str, Any]]:
    rows = [
        a_point(f"{select}{size}x{steps}", size, steps, select, seed)
        for select in ("uniform", "tail")
        for size in (2, 4, 8)
        for steps in (0, 40, 120)
        for seed in range(3)
    ]
    for blocks, nats in ((BOTTOM, 3.25), (TOP, 3.22), (BOTH, 3.18), ("0,1", 3.3), ("0,15", 3.21)):
        rows.append(
            a_row(f"b{blocks}", role="bound", adapter_blocks=blocks, bound_nats=nats, num_blocks=16,
                  num_adapter_blocks=len(blocks.split(",")))
        )  # fmt: skip
    rows += [
        a_row("full", role="full", full_zero_shot_nats=3.6),
        a_row("ft", role="fine_tuned", full_fine_tuned_nats=3.1),
        a_row("bad", status="failed", error="<b>no</b> & why", settings=json.dumps(
            {"compress": {"plan": "9-9-9"}, "finetune": {}}
        )),
    ]  # fmt: skip
    return rows


INSIDE = """[...document.querySelectorAll('.plot svg[role=img]')].every(svg => {
  const [box, view] = [svg.getBBox(), svg.viewBox.baseVal];
  return box.x >= -2 && box.y >= -2
    && box.x + box.width <= view.width + 2 && box.y + box.height <= view.height + 2;
})"""
"""Script that says whether every plot is drawn within its bounds."""


@pytest.fixture(scope="module")
def page(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("page") / "report.html"
    rows = some_rows()
    points = summaries(rows)
    best = front(points, CONFIG.objectives)
    write_page(path, CONFIG, rows, points, best, chosen(points, CONFIG.objectives, 0.5))
    return path


def test_the_page_asks_nothing_of_the_network(page: Path) -> None:
    source = page.read_text(encoding="utf-8")
    assert not re.search(r"https?:|//[a-z]+\.|@import|url\(|src=|href=", source)
    assert "&lt;b&gt;no&lt;/b&gt; &amp; why" in source
    assert source.count("</script>") == 2
    assert "prefers-color-scheme: dark" in source


def test_every_plot_is_drawn(page: Path, browser: Browser) -> None:
    browser.open(page, 1200)
    assert browser.problems == []
    sections = ["knob", "pareto", "compression", "placement", "parallel"]
    drawn = browser.run(
        f"{sections}.map(id => document.getElementById(id).hidden ? 0 :"
        " document.querySelectorAll(`#${id} .plot svg path`).length)"
    )
    assert all(count > 5 for count in drawn), dict(zip(sections, drawn, strict=True))
    assert browser.run("document.querySelectorAll('#pareto .mark').length") == 18
    assert browser.run("document.querySelectorAll('#parallel .thread').length") == 18
    assert browser.run("document.querySelectorAll('#compression figure').length") == 6
    assert browser.run("document.querySelectorAll('#compression .gap').length") == 12
    assert browser.run("document.querySelectorAll('.turned').length") == 0
    assert browser.run("document.querySelectorAll('#points tbody tr').length") == 18
    assert browser.run(INSIDE)
    assert not browser.run("document.body.innerText.match(/NaN|undefined|Infinity|null/)")


def test_what_is_pointed_at_is_found_in_every_plot_and_in_the_table(
    page: Path, browser: Browser
) -> None:
    browser.open(page, 1200)
    browser.point_at("#pareto .mark[data-id='uniform2x0']")
    on = browser.run("[...document.querySelectorAll('.on')].map(n => n.dataset.id)")
    assert set(on) == {"uniform2x0"}
    assert len(on) >= 4
    detail = browser.run("document.getElementById('detail').innerText")
    assert detail.startswith("2-2-2, uniform, not distilled")
    assert "±" in detail
    browser.point_at("#points tbody tr[data-id='tail2x0'] th")
    assert "tail control" in browser.run("document.getElementById('detail').innerText")


def test_the_weight_of_privacy_chooses_another_emulator(page: Path, browser: Browser) -> None:
    browser.open(page, 1200)

    def chosen_at(weight: float) -> str:
        browser.run(
            f"(() => {{ const s = document.getElementById('weight'); s.value = {weight};"
            "s.dispatchEvent(new Event('input')); })()"
        )
        text: str = browser.run("document.getElementById('chosen').innerText")
        return text

    assert "2-8-2, uniform, 120 steps" in chosen_at(0)
    assert "2-2-2, tail, not distilled" in chosen_at(1)
    assert browser.run("document.getElementById('kind').value").startswith("2 emulator blocks")


def test_a_heading_sorts_the_table_both_ways(page: Path, browser: Browser) -> None:
    browser.open(page, 1200)
    column = (
        "[...document.querySelectorAll('#points tbody tr')]"
        ".map(r => Number(r.cells[5].dataset.value))"
    )
    browser.point_at("#points th:nth-child(6) button")
    up = browser.run(column)
    assert up == sorted(up)
    assert browser.run("document.querySelector('#points th:nth-child(6)').ariaSort") == "ascending"
    browser.point_at("#points th:nth-child(6) button")
    assert browser.run(column) == up[::-1]
    browser.point_at("#points th:nth-child(2) button")
    text = "[...document.querySelectorAll('#points tbody tr')].map(r => r.cells[1].dataset.value)"
    assert browser.run(text) == ["tail"] * 9 + ["uniform"] * 9


@pytest.mark.parametrize("dark", [False, True])
def test_a_phone_can_read_it(page: Path, browser: Browser, tmp_path: Path, dark: bool) -> None:
    browser.open(page, 390, 800, dark=dark)
    assert browser.problems == []
    assert browser.run("document.documentElement.scrollWidth") <= 390
    assert browser.run(INSIDE)
    smallest = browser.run(
        "Math.min(...[...document.querySelectorAll('svg text')].map(t =>"
        " parseFloat(getComputedStyle(t).fontSize)"
        " * t.ownerSVGElement.getBoundingClientRect().width"
        " / t.ownerSVGElement.viewBox.baseVal.width))"
    )
    assert smallest >= 11
    browser.screenshot(tmp_path / "phone.png")
    assert (tmp_path / "phone.png").stat().st_size > 20_000


def test_series_differ_in_shape_and_dash_as_well_as_in_colour(page: Path, browser: Browser) -> None:
    browser.open(page, 1200)
    shapes = browser.run(
        "[...document.querySelectorAll('#compression .legend .mark')].slice(0, 3)"
        ".map(n => n.getAttribute('d'))"
    )
    dashes = browser.run(
        "[...document.querySelectorAll('#compression .legend .line')].slice(0, 3)"
        ".map(n => n.getAttribute('stroke-dasharray'))"
    )
    assert len(set(shapes)) == len(set(dashes)) == 3


def test_a_sweep_that_has_measured_nothing_has_a_page(tmp_path: Path, browser: Browser) -> None:
    path = tmp_path / "report.html"
    write_page(path, CONFIG, [], [], [], None)
    assert "No emulator was measured" in path.read_text(encoding="utf-8")
    browser.open(path, 800)
    assert browser.problems == []


def test_scores_are_higher_where_they_are_better() -> None:
    rows = [a_row("p", plug_in_score=0.5, emulator_fine_tuned_score=0.4)]
    data = page_data(CONFIG, rows, summaries(rows), [], None)
    assert (data["unit"], data["lower"]) == ("mean task score", False)
    assert data["points"][0]["plug_in"] == [0.5, None]


def test_what_keeps_the_depth_says_so(tmp_path: Path) -> None:
    blocks = {"num_adapter_blocks": 4, "num_emulator_blocks": 4, "num_blocks": 16}
    rows = [a_row(f"{depth}", depth=depth, **blocks) for depth in (16, 8)]
    found = summaries(rows)
    write_page(tmp_path / "report.html", CONFIG, rows, found, [], found[0])
    page = (tmp_path / "report.html").read_text(encoding="utf-8")
    assert page.count("<small>as deep as the full model</small>") == 1
    assert "2-4-2 (uniform, as cut, as deep as the full model) is chosen" in page
