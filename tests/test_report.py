# SPDX-License-Identifier: Apache-2.0
"""The report: what it says, that it stands alone, and that it leaves nothing half written."""

from __future__ import annotations

import math
import re
import struct
import subprocess
import sys
from html.parser import HTMLParser
from typing import TYPE_CHECKING

import pytest

from offsite_ray.errors import StorageError
from offsite_ray.report import (
    Artefact,
    result_sentence,
    settings_rows,
    terminal_table,
    write_report,
)
from offsite_ray.report_plots import panels_of
from offsite_ray.results import (
    SETTINGS,
    EvalRecord,
    EvaluationResult,
    Gaps,
    Perplexity,
    SettingResult,
    StepRecord,
    TrainingHistory,
)

if TYPE_CHECKING:
    from pathlib import Path

NATS = dict(zip(SETTINGS, (3.621, 4.872, 2.913, 3.404, 3.045, 3.006), strict=True))
DASH = "\N{EN DASH}"
VOID = {"meta", "rect", "path", "circle", "use", "br", "link", "img", "input"}


def measured(nats: float, accuracy: float | None = 0.5) -> SettingResult:
    perplexity = Perplexity(
        nats_per_token=nats, nats_per_byte=nats / 4, num_tokens=100, num_bytes=400
    )
    metrics = {} if accuracy is None else {"toy": {"acc": accuracy, "acc_stderr": 0.021}}
    return SettingResult(perplexity=perplexity, tasks=metrics)


def an_evaluation(**changes: object) -> EvaluationResult:
    values: dict[str, object] = {
        "settings": {name: measured(nats) for name, nats in NATS.items()},
        "gap_metric": "nats_per_token",
        "gaps": Gaps(utility=0.132, privacy=0.359),
        "task_gaps": {"toy": Gaps(utility=0.041, privacy=-0.017)},
        "bound_share": 0.934,
        "versions": {"torch": "2.9.0"},
        "date": "2025-01-31T12:00:00Z",
        "seconds": 3725.0,
    }
    return EvaluationResult(**{**values, **changes})  # type: ignore[arg-type]


def a_history(steps: int = 20, parts: tuple[str, ...] = ("loss", "hidden")) -> TrainingHistory:
    losses = [{part: 3.0 / (step + 1) + len(part) for part in parts} for step in range(steps)]
    return TrainingHistory(
        steps=tuple(
            StepRecord(step=step + 1, losses=loss, learning_rate=0.1)
            for step, loss in enumerate(losses)
        ),
        evaluations=(EvalRecord(step=0, losses=losses[0]), EvalRecord(step=9, losses=losses[1])),
        seconds=75.0,
        num_tokens=12_345,
        peak_memory_bytes=3 * 1024**3,
    )


class Checker(HTMLParser):
    """Keeps the text and every address, and fails on a tag that is not closed."""

    def __init__(self) -> None:
        super().__init__()
        self.open: list[str] = []
        self.tags: list[str] = []
        self.ids: list[str] = []
        self.addresses: list[str] = []
        self.text = ""

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.ids += [value or "" for name, value in attrs if name == "id"]
        names = {"src", "href", "srcset", "action", "data"}
        self.addresses += [value or "" for name, value in attrs if name in names]
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.handle_starttag(tag, attrs)
        if tag not in VOID:
            self.open.pop()

    def handle_endtag(self, tag: str) -> None:
        if tag not in VOID:
            assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        if self.open and self.open[-1] != "style":
            self.text += data + "\n"


def parsed(page: Path) -> Checker:
    checker = Checker()
    checker.feed(page.read_text(encoding="utf-8"))
    checker.close()
    assert checker.open == []
    return checker


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    return write_report(
        tmp_path_factory.mktemp("report") / "new" / "folder",
        an_evaluation(),
        title="Tuning <b>far</b> & away",
        histories={"Distillation": a_history(), "Fine-tuning $x$": a_history(1200, ("loss",))},
        artefacts=[
            Artefact(name="Emulator bundle", path="bundle", size_bytes=1_572_864, seconds=2.5),
            Artefact(name="Adapter bundle", peak_memory_bytes=1024, note="a <note>"),
        ],
        notes=["First <script>alert(1)</script>.", "Second."],
        facts={"Plan": "2-8-2", "Versions": "mine"},
    )


def test_the_page_asks_nothing_of_the_network(whole: tuple[Path, Path]) -> None:
    source = whole[0].read_text(encoding="utf-8")
    assert not re.search(r"https?:|//[a-z]|@import|url\((?!#)", source)
    page = parsed(whole[0])
    assert all(address.startswith("#") for address in page.addresses)
    assert not {"script", "link", "img", "iframe", "object"} & set(page.tags)
    assert page.tags.count("svg") == 6 + 2 + 3  # bars, swatches, panels
    assert "prefers-color-scheme: dark" in source


def test_every_reference_inside_the_page_has_one_target(whole: tuple[Path, Path]) -> None:
    source, page = whole[0].read_text(encoding="utf-8"), parsed(whole[0])
    used = {*(a[1:] for a in page.addresses), *re.findall(r"url\(#([^)]*)\)", source)}
    assert used
    assert used <= set(page.ids)
    assert len(page.ids) == len(set(page.ids))


def test_the_page_has_every_figure(whole: tuple[Path, Path]) -> None:
    text = parsed(whole[0]).text
    for nats in NATS.values():
        assert text.count(f"{nats:.3f}\n") == 2  # table and chart
        assert f"{math.exp(nats):.2f}" in text
        assert f"{nats / 4:.3f}" in text
    assert text.count("0.500 ± 0.021") == 6
    assert "0.041" in text
    assert "\N{MINUS SIGN}0.017" in text
    assert "The plug-in reaches 93% of the bound's gain" in text


def test_the_page_has_costs_and_facts(whole: tuple[Path, Path]) -> None:
    text = parsed(whole[0]).text
    assert "1.5 MiB" in text
    assert "2.5 s" in text
    assert "1.0 KiB" in text
    assert "20 steps, 1 min 15 s, 12,345 tokens, peak memory 3.0 GiB\n" in text
    assert "training curve in means of 3 steps" in text
    assert "1 h 02 min" in text
    assert "2025-01-31T12:00:00Z" in text
    assert "mine" in text
    assert "torch 2.9.0" not in text  # the caller's own line stands


def test_text_is_escaped(whole: tuple[Path, Path]) -> None:
    page = parsed(whole[0])
    assert "b" not in page.tags
    assert "Tuning <b>far</b> & away" in page.text
    assert "First <script>alert(1)</script>." in page.text
    assert "a <note>" in page.text
    assert "Fine-tuning $x$" in page.text


def test_the_picture_is_a_png_of_its_size(whole: tuple[Path, Path]) -> None:
    data = whole[1].read_bytes()
    assert data[:8] == b"\x89PNG\r\n\x1a\n"
    assert struct.unpack(">II", data[16:24]) == (1600, 1000)
    assert 20_000 < len(data) < 1_000_000


def test_the_folder_has_the_two_files_only(whole: tuple[Path, Path]) -> None:
    assert sorted(whole[0].parent.iterdir()) == sorted(whole)
    assert [path.name for path in whole] == ["report.html", "report.png"]


def test_what_was_not_measured_is_a_dash(tmp_path: Path) -> None:
    settings: dict[str, SettingResult | None] = dict.fromkeys(SETTINGS)
    settings |= {"full_zero_shot": measured(3.5), "plug_in": measured(3.1, accuracy=None)}
    evaluation = an_evaluation(settings=settings, gaps=Gaps(), task_gaps={}, bound_share=None)
    html, _ = write_report(tmp_path, evaluation, title="Partly")
    text = parsed(html).text
    assert text.count(DASH + "\n") == 4 * 4 + 1
    assert "None" not in text
    assert "nan" not in text
    assert "Utility gap" not in text
    assert "Loss curves" not in text
    rows = {row.name: row for row in settings_rows(evaluation)}
    assert list(rows) == list(SETTINGS)
    assert rows["bound"].perplexity is None
    assert rows["plug_in"].scores == {"toy": None}


def test_nothing_measured_still_makes_a_report(tmp_path: Path) -> None:
    evaluation = EvaluationResult(settings={}, gap_metric="nats_per_token", gaps=Gaps())
    html, png = write_report(tmp_path, evaluation, title="Empty")
    assert "too few settings were measured" in html.read_text(encoding="utf-8").lower()
    assert png.stat().st_size > 5_000


def test_scores_are_drawn_where_there_is_no_text(tmp_path: Path) -> None:
    settings = {
        name: SettingResult(tasks={"toy": {"acc": 0.25, "f1": 0.9}, "other": {"f1": 0.5}})
        for name in SETTINGS
    }
    evaluation = an_evaluation(settings=settings, gap_metric="task_score")
    text = parsed(write_report(tmp_path, evaluation, title="Tasks")[0]).text
    assert "Mean task score (higher is better)" in text
    assert text.count("0.375") == 6
    assert "in the mean task score" in text


def test_what_is_not_finite_is_drawn_and_said(tmp_path: Path) -> None:
    settings = {"plug_in": measured(800.0), "bound": measured(math.inf), "full_zero_shot": None}
    broken = TrainingHistory(
        steps=tuple(
            StepRecord(step=step, losses={"loss": loss}, learning_rate=0.1)
            for step, loss in enumerate((900.0, math.nan, math.inf, 1.0))
        )
    )
    html, _ = write_report(
        tmp_path, an_evaluation(settings=settings), title="Broken", histories={"Run": broken}
    )
    text = parsed(html).text
    assert "∞" in text
    assert "800.000" in text
    assert "log scale" in text


@pytest.mark.parametrize("in_the_way", ["", "report.html", "report.png"])
def test_a_folder_that_cannot_be_written(tmp_path: Path, in_the_way: str) -> None:
    out = tmp_path / "out"
    if in_the_way:
        (out / in_the_way).mkdir(parents=True)
    else:
        out.write_text("a file")
    before = sorted(tmp_path.rglob("*"))
    with pytest.raises(StorageError, match=r"cannot write the report to .*out'"):
        write_report(out, an_evaluation(), title="Nowhere")
    assert sorted(tmp_path.rglob("*")) == before


def test_no_space_left(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from pathlib import Path as AnyPath

    write = AnyPath.write_bytes

    def full(path: Path, data: bytes) -> int:
        write(path, data[:10])
        raise OSError(28, "No space left on device")

    html, _ = write_report(tmp_path, an_evaluation(), title="The old one")
    monkeypatch.setattr(AnyPath, "write_bytes", full)
    with pytest.raises(StorageError, match="No space left on device"):
        write_report(tmp_path, an_evaluation(), title="The new one")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["report.html", "report.png"]
    assert "The old one" in html.read_text(encoding="utf-8")


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({}, "reaches 93% of the bound's gain; the utility gap is 0.132 nats per token; "),
        ({"bound_share": 1.042}, "reaches 104% of"),
        ({"bound_share": -0.12}, "worse than the full model zero-shot (\N{MINUS SIGN}12% of the"),
        ({"bound_share": -0.001}, "reaches 0% of"),
        ({"bound_share": None, "fine_tuned_share": 0.8}, "reaches 80% of full fine-tuning's gain"),
        (
            {"gaps": Gaps(utility=-0.02, privacy=-0.044)},
            "the utility gap is negative, \N{MINUS SIGN}0.020 nats per token "
            "(the plug-in is better than full fine-tuning); the privacy gap is negative, "
            "\N{MINUS SIGN}0.044 nats per token (the plug-in is worse than the tuned emulator).",
        ),
        ({"gaps": Gaps(privacy=-0.0001)}, "gain; the privacy gap is 0.000 nats per token."),
    ],
)
def test_the_sentence(changes: dict[str, object], said: str) -> None:
    assert said in result_sentence(an_evaluation(**changes))


def test_panels_leave_out_a_sum_that_is_its_only_part() -> None:
    same = TrainingHistory(
        steps=(StepRecord(step=1, losses={"loss": 2.0, "hidden": 2.0}, learning_rate=0.1),)
    )
    assert [panel.part for panel in panels_of("run", same)] == ["hidden"]
    assert [panel.part for panel in panels_of("run", a_history())] == ["loss", "hidden"]
    assert panels_of("run", TrainingHistory()) == []


def test_a_long_curve_is_thinned_to_means() -> None:
    (panel,) = panels_of("run", a_history(1200, ("loss",)))
    assert panel.window == 3
    assert len(panel.training) == 400
    assert panel.training[0] == pytest.approx((2.0, (3.0 + 1.5 + 1.0) / 3 + 4))


def test_the_table_of_the_terminal() -> None:
    from rich.console import Console

    settings = {name: measured(nats) for name, nats in NATS.items()} | {"bound": None}
    settings["plug_in"] = SettingResult(tasks={"[red]": {"acc": 0.123}})
    console = Console(width=120, file=None, color_system=None)
    with console.capture() as capture:
        console.print(terminal_table(an_evaluation(settings=settings)))
    text = capture.get()
    assert "[red]" in text
    assert "0.123" in text
    assert f"{3.621 / 4 / math.log(2):.3f}" in text
    assert "the utility gap is 0.132" in text
    assert DASH in next(line for line in text.splitlines() if "Bound" in line)


def test_importing_the_module_is_light() -> None:
    heavy = ("matplotlib", "jinja2", "rich", "torch", "ray")
    code = f"import sys, offsite_ray.report; print([m for m in {heavy} if m in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
