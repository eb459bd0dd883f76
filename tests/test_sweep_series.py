# SPDX-License-Identifier: Apache-2.0
"""What of a sweep is joined into a line, and that whatever is on none is drawn beside it."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any

import pytest

from offsite_ray.compression import parse_compression
from offsite_ray.tune.page import page_data, write_page
from offsite_ray.tune.series import numbers, placement, placements
from offsite_ray.tune.table import COLUMNS, summaries
from tests.test_sweep_page import BOTH, CONFIG, INSIDE, TOP, a_point
from tests.test_sweep_results import a_row

if TYPE_CHECKING:
    from pathlib import Path

    from tests.browser import Browser


def distilled(name: str, steps: int, **settings: Any) -> dict[str, Any]:
    given = {"distill": {"max_steps": steps, **settings}} if steps else {}
    row = a_point(name, 4, steps, "uniform", 0)
    return {**row, "settings": json.dumps({"compress": {"plan": "2-4-2"}, **given, "finetune": {}})}


def data_of(rows: list[dict[str, Any]]) -> dict[str, Any]:
    return page_data(CONFIG, rows, summaries(rows), [], None)


def test_every_way_to_distil_is_a_line_that_begins_undistilled() -> None:
    rows = [distilled("none", 0), distilled("plain", 200, batch_size=8),
            *(distilled(f"w{steps}", steps, batch_size=8, lm_weight=0.0) for steps in (50, 200)),
            {**distilled("spread", 0), "adapter_blocks": "0,5,10,15"}]  # fmt: skip
    base = "4 emulator blocks, uniform, 4 adapter blocks"
    assert dict(data_of(rows)["kinds"]) == {
        f"{base}, both ends": ["none", "plain"],
        f"{base}, both ends, distill.lm_weight=0.0": ["none", "w50", "w200"],
        f"{base}, spread": ["spread"],
    }


def test_what_was_stopped_or_has_no_yardstick_is_on_no_line() -> None:
    lucky = distilled("lucky", 90)
    rows = [distilled("whole", 0), {**distilled("unbound", 50), "bound_gap": None}]
    rows += [lucky, {**lucky, "seed": 1, "status": "stopped"}]
    data = data_of(rows)
    assert data["utility"] == "bound_gap"
    assert [ids for _, ids in data["kinds"]] == [["whole"]]
    assert [point["stopped"] for point in data["points"]] == [0, 0, 1]
    unbound = [{**row, "bound_gap": None, "bound_nats": None} for row in rows]
    assert data_of(unbound)["utility"] == "utility_gap"


def test_bounds_and_full_fine_tuning_of_other_settings_are_not_mixed() -> None:
    def bound(rate: float, blocks: str, **finetune: Any) -> dict[str, Any]:
        return a_row(f"{rate}{blocks}{finetune}", role="bound", learning_rate=rate, bound_nats=3.0,
                     adapter_blocks=blocks, num_adapter_blocks=4, num_blocks=16,
                     settings=json.dumps({"finetune": finetune}))  # fmt: skip

    alone = [distilled("p", 0), bound(1e-5, BOTH, max_steps=9)]
    assert [line["kind"] for line in data_of(alone)["placements"]] == ["both ends"]
    rows = [distilled("p", 0), bound(1e-5, BOTH), bound(1e-5, TOP)]
    assert [line["kind"] for line in data_of(rows)["placements"]] == ["both ends", "top"]
    rows.append(bound(1e-3, BOTH, max_steps=9))
    assert [line["kind"] for line in data_of(rows)["placements"]] == [
        "both ends, lr 1e-05", "top, lr 1e-05", "both ends, lr 0.001, finetune.max_steps=9",
    ]  # fmt: skip
    rows = [
        a_row(point, seed, role="fine_tuned", full_fine_tuned_nats=nats)
        for point, seed, nats in (("good", 0, 3.0), ("good", 1, 3.5), ("bad", 0, 8.0))
    ]
    levels = data_of(rows)["yardsticks"]
    assert levels["full_fine_tuned"] == 3.25
    assert levels["full_fine_tuned_label"] == "full fine-tuning, best of 2"


def test_placements_that_share_a_word_are_not_joined() -> None:
    rows = [on_plan(plan, "none") for plan in ("1-4-3", "2-4-2", "3-4-1", "1-4-1")]
    longer = [{**row, "point": f"{row['point']}x", "distill_steps": 50} for row in rows]
    assert [ids for _, ids in data_of(rows + longer)["kinds"]] == [
        [f"{plan} none", f"{plan} nonex"] for plan in ("1-4-3", "2-4-2", "3-4-1", "1-4-1")
    ]
    rows = [{**row, "role": "bound", "bound_nats": 3.0} for row in rows]
    assert [line["kind"] for line in data_of(rows)["placements"]] == [
        "both ends (1 + 3)", "both ends", "both ends (3 + 1)", "both ends",
    ]  # fmt: skip
    spread = [{"adapter_blocks": blocks, "num_blocks": 16} for blocks in
              ("0,4,11,15", "0,5,10,15", "0,8,15", "5,6", "6,7", None)]  # fmt: skip
    assert placements(spread) == {
        "0,4,11,15": "spread (0,4,11,15)", "0,5,10,15": "spread (0,5,10,15)", "0,8,15": "spread",
        "5,6": "middle (5,6)", "6,7": "middle (6,7)", None: "unknown",
    }  # fmt: skip


@pytest.mark.parametrize(
    ("blocks", "where"),
    [
        ("0,1", "bottom"),
        ("14,15", "top"),
        ("0,15", "both ends"),
        ("5,6", "middle"),
        ("0,5,15", "spread"),
        ("0,5", "spread"),
        (None, "unknown"),
    ],
)
def test_placements_have_names(blocks: str | None, where: str) -> None:
    row = dict.fromkeys(COLUMNS) | {"adapter_blocks": blocks, "num_blocks": 16}
    assert placement(row) == where


def compressed(compress: str, name: str = "", **values: Any) -> dict[str, Any]:
    row = a_point(name or compress, 4, 0, values.pop("select", "uniform"), 0)
    return {**row, "compress": compress, "control": None, **values}


def on_plan(plan: str, compress: str = "none", **values: Any) -> dict[str, Any]:
    bottom, _, top = map(int, plan.split("-"))
    blocks = [*range(bottom), *range(16 - top, 16)]
    return compressed(compress, f"{plan} {compress}", plan=plan, num_adapter_blocks=bottom + top,
                      adapter_blocks=",".join(map(str, blocks)), **values)  # fmt: skip


TEXTS = ("none", "prune:0.5", "prune:2:4", "gradient_preserving:0.3:1", "gradient_preserving:0.5:1",
         "gradient_preserving:0.5:100", "low_rank:0.3+quantize:4")  # fmt: skip


def compressed_rows() -> list[dict[str, Any]]:
    """Return rows of every kind of text, of two selections, of three placements alike in a word."""
    rows = [compressed(text) for text in TEXTS]
    rows += [compressed(f"prune:{x}", f"tail {x}", select="tail") for x in (0.5, 0.7)]
    rows += [on_plan(plan) for plan in ("1-4-3", "3-4-1")]
    return [{**row, "plug_in_nats": row["plug_in_nats"] + i / 50} for i, row in enumerate(rows)]


def lines_of(rows: list[dict[str, Any]]) -> dict[str, list[Any]]:
    """Return the lines of Figure 4 by name, each with its axis and its points."""
    lines = data_of(rows)["compression"]["lines"]
    return {line["name"]: [line["axis"], line["points"]] for line in lines}


def rows_beside(rows: list[dict[str, Any]]) -> list[list[str]]:
    return [[name for name, _ in g["rows"]] for g in data_of(rows)["compression"]["rows"]]


def test_a_line_joins_what_differs_in_one_number() -> None:
    assert lines_of(compressed_rows()) == {
        "gradient_preserving:RATIO:1": [
            "RATIO", [[0.3, "gradient_preserving:0.3:1"], [0.5, "gradient_preserving:0.5:1"]],
        ],
        "gradient_preserving:0.5:PRIVACY": [
            "PRIVACY", [[1, "gradient_preserving:0.5:1"], [100, "gradient_preserving:0.5:100"]],
        ],
        "prune:RATIO": ["RATIO", [[0.5, "tail 0.5"], [0.7, "tail 0.7"]]],
    }  # fmt: skip
    found = data_of(compressed_rows())["compression"]["lines"]
    assert {line["name"]: line["log"] for line in found} == {
        "gradient_preserving:RATIO:1": False,
        "gradient_preserving:0.5:PRIVACY": True,
        "prune:RATIO": False,
    }


def test_selections_sizes_and_placements_are_lines_of_their_own() -> None:
    rows = [
        on_plan(plan, f"prune:{ratio}", select=select)
        | {"point": f"{select} {plan} {ratio}", "id": f"{select} {plan} {ratio}"}
        for plan in ("1-4-3", "2-4-2", "3-4-1")
        for select in ("uniform", "tail")
        for ratio in (0.5, 0.9)
    ]
    lines = data_of(rows)["compression"]["lines"]
    assert [(line["name"], line["rest"], len(line["points"])) for line in lines] == [
        ("prune:RATIO", f"{select}, 4 adapter blocks, {where}", 2)
        for select in ("tail", "uniform")
        for where in ("both ends", "both ends (1 + 3)", "both ends (3 + 1)")
    ]
    smaller = [{**row, "point": f"s{row['point']}", "num_emulator_blocks": 2} for row in rows[:2]]
    sized = data_of(rows[:2] + smaller)["compression"]["lines"]
    assert [(line["name"], line["rest"]) for line in sized] == [
        ("uniform drop, prune:0.5", ""),
        ("uniform drop, prune:0.9", ""),
        ("prune:RATIO", "2 emulator blocks"),
        ("prune:RATIO", "4 emulator blocks"),
    ]


def test_parts_of_a_composition_are_told_apart() -> None:
    texts = ("low_rank:0.3+quantize:4", "low_rank:0.5+quantize:4", "low_rank:0.3+quantize:8")
    rows = [compressed(text) for text in texts]
    assert lines_of(rows) == {
        "low_rank:RATIO+quantize:4": ["RATIO", [[0.3, texts[0]], [0.5, texts[1]]]],
        "low_rank:0.3+quantize:BITS": ["BITS", [[4, texts[0]], [8, texts[2]]]],
    }
    assert rows_beside(rows) == []


def test_what_is_on_no_line_is_in_a_row() -> None:
    both = ["uniform", "uniform, prune:0.5", "uniform, prune:2:4"]
    rows = compressed_rows()
    assert rows_beside(rows) == [[*both, "uniform, low_rank:0.3+quantize:4"], ["uniform"],
                                 ["uniform"]]  # fmt: skip
    assert rows_beside([rows[2], rows[1], rows[0]]) == [both]
    assert rows_beside([rows[0], compressed("gone:2")]) == [["uniform", "uniform, gone:2"]]
    found = data_of(rows)["compression"]
    shown = {point for line in found["lines"] for _, point in line["points"]}
    shown |= {point for group in found["rows"] for _, point in group["rows"]}
    assert shown == {row["point"] for row in rows}


@pytest.mark.parametrize(
    "text",
    ["prune:0.5", "prune:2:4", "quantize:4", "low_rank:0.3", "low_rank_aware:0.3",
     "gradient_preserving:0.3:1", "gradient_preserving:0.3:1:2", "prune:2:4+quantize:8"],
)  # fmt: skip
def test_the_numbers_of_every_compression_are_known(text: str) -> None:
    found = numbers(text)
    assert found
    assert {blanked.replace(word, f"{x:g}") for word, blanked, x in found} == {text}
    assert {word.lower() for word, _, _ in found} <= {
        name for step in parse_compression(text).steps for name in step.parameters
    }


@pytest.fixture(scope="module")
def compressions(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("compressions") / "report.html"
    rows = compressed_rows()
    rows[1] |= {"privacy_gap": -0.2, "emulator_fine_tuned_nats": rows[1]["plug_in_nats"] - 0.2}
    write_page(path, CONFIG, rows, summaries(rows), [], None)
    return path


@pytest.mark.parametrize("width", [390, 1200])
def test_every_compression_is_seen(compressions: Path, browser: Browser, width: int) -> None:
    browser.open(compressions, width)
    assert browser.problems == []
    assert browser.run("document.querySelectorAll('#compression figure').length") == 4
    ids = browser.run(
        "[...document.querySelectorAll('#compression .mark[data-id]')].map(n => n.dataset.id)"
    )
    assert set(ids) == {row["point"] for row in compressed_rows()}
    assert browser.run("document.documentElement.scrollWidth") <= width
    assert browser.run(INSIDE)
    rows = browser.run(
        "[...document.querySelectorAll('.row > span:first-child')].map(n => n.innerText)"
    )
    assert rows[1:5] == ["uniform", "uniform, prune:0.5", "uniform, prune:2:4",
                         "uniform, low_rank:0.3+quantize:4"]  # fmt: skip
    areas = "document.querySelector(`.row[data-id='%s'] .gap`).classList.contains('turned')"
    assert not browser.run(areas % "prune:2:4")
    assert browser.run(areas % "prune:0.5")


def gaps_of(*gaps: float) -> list[dict[str, Any]]:
    """Return rows of sizes 2, 4, ... that are ahead of their emulator by so much."""
    rows = [a_point(f"g{i}", 2 * i + 2, 0, "uniform", 0) for i in range(len(gaps))]
    return [
        {**row, "plug_in_nats": 3.0, "emulator_fine_tuned_nats": 3.0 + gap, "privacy_gap": gap}
        for row, gap in zip(rows, gaps, strict=True)
    ]


AREAS = """[...document.querySelectorAll('#compression .gap')].map(n => {
  const box = n.getBBox();
  return [n.classList.contains('turned'), box.x, box.width];
})"""
LEGEND = """[...document.querySelectorAll('#compression .legend span')].slice(3)
  .map(n => n.innerText.trim())"""


@pytest.mark.parametrize("score", [False, True])
def test_the_gap_is_cut_where_the_emulator_comes_ahead(
    tmp_path: Path, browser: Browser, score: bool
) -> None:
    path, rows = tmp_path / "report.html", gaps_of(0.1, -0.3, -0.2)
    if score:
        rows = [
            {**row, "plug_in_nats": None, "emulator_fine_tuned_nats": None, "bound_nats": None,
             "plug_in_score": 0.5, "emulator_fine_tuned_score": 0.5 - row["privacy_gap"]}
            for row in rows
        ]  # fmt: skip
    write_page(path, CONFIG, rows, summaries(rows), [], None)
    browser.open(path, 1200)
    assert browser.problems == []
    (kept, x, width), (lost, next_x, next_width), (last, _, last_width) = browser.run(AREAS)
    assert [kept, lost, last] == [False, True, True]
    assert next_x == pytest.approx(x + width, abs=0.1)
    assert next_width == pytest.approx(3 * width, rel=0.01)
    assert last_width == pytest.approx(4 * width, rel=0.01)
    stripes = browser.run(
        "[...document.querySelectorAll('#compression .stripes')].map(n => n.getBBox().x)"
    )
    assert len(stripes) == 2
    assert min(stripes) >= next_x - 1
    assert browser.run(LEGEND) == [
        "privacy gap",
        "emulator ahead: nothing protected",
    ]


def test_a_gap_below_zero_is_striped_over_the_steps_too(tmp_path: Path, browser: Browser) -> None:
    path, gaps = tmp_path / "report.html", (-0.3, 0.1, 0.2)
    rows = [{**distilled(f"d{i}", 50 * i), "privacy_gap": gap} for i, gap in enumerate(gaps)]
    write_page(path, CONFIG, rows, summaries(rows), [], None)
    browser.open(path, 1200)
    areas = "[...document.querySelectorAll('#knob .gap')].map(n => n.classList.contains('turned'))"
    assert browser.run(areas) == [True, False, False]


def test_emulators_that_differ_in_nothing_shown_have_a_page(
    tmp_path: Path, browser: Browser
) -> None:
    row = compressed("prune:0.5")
    rows, path = [row, {**row, "point": "again", "id": "again"}], tmp_path / "report.html"
    write_page(path, CONFIG, rows, summaries(rows), [], None)
    browser.open(path, 800)
    assert browser.problems == []
    assert browser.run("document.querySelectorAll('#compression .row[data-id]').length") == 2


def test_a_legend_has_the_areas_that_are_there(tmp_path: Path, browser: Browser) -> None:
    found = []
    for gaps in ((0.1, 0.2), (-0.1, -0.2)):
        rows, path = gaps_of(*gaps), tmp_path / "report.html"
        write_page(path, CONFIG, rows, summaries(rows), [], None)
        browser.open(path, 1200)
        found.append([len(browser.run(AREAS)), *browser.run(LEGEND)])
    assert found == [[1, "privacy gap"], [1, "emulator ahead: nothing protected"]]


def test_long_words_of_a_line_stay_on_a_phone(tmp_path: Path, browser: Browser) -> None:
    settings = {"finetune": {"eval_fraction": 0.123, "weight_decay": 0.25, "betas": [0.9, 0.999]}}
    rows = [distilled("p", 0)] + [
        a_row(name, role="bound", bound_nats=3.0, adapter_blocks=BOTH, num_adapter_blocks=4,
              num_blocks=16, settings=json.dumps(given))
        for name, given in (("plain", {"finetune": {}}), ("other", settings))
    ]  # fmt: skip
    write_page(tmp_path / "report.html", CONFIG, rows, summaries(rows), [], None)
    browser.open(tmp_path / "report.html", 390, 800)
    assert "finetune.weight_decay=0.25" in browser.run("document.body.innerText")
    assert browser.run("document.documentElement.scrollWidth") <= 390
