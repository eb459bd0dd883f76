# SPDX-License-Identifier: Apache-2.0
"""The quality table: means and spreads over seeds, and what they say."""

from __future__ import annotations

import math
import statistics
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from benchmarks.page import table

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping

BEGIN = "<!-- begin: written by benchmarks/quality.py -->"

UNDISTILLED = "undistilled"
SETTINGS = ("emulator_zero_shot", "emulator_fine_tuned", "plug_in")

_SPREADS = 2.0
"""A difference of means is beyond the spread from this many of its standard deviations on."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Mean:
    """A mean over seeds."""

    value: float
    spread: float | None
    """Standard deviation; None of one seed."""
    num_seeds: int


@dataclass(frozen=True, kw_only=True, slots=True)
class Gain:
    """What distillation does for the plug-in: nats per token fewer than undistilled."""

    value: float
    spread: float | None
    """Of the difference: the root of the sum of both variances."""

    @property
    def beyond(self) -> bool | None:
        """Whether it helps beyond the spread; None where the spread is not known."""
        return None if self.spread is None else self.value > _SPREADS * self.spread


def mean(values: Iterable[float]) -> Mean | None:
    """Return the mean over seeds; None of none."""
    known = list(values)
    if not known:
        return None
    spread = statistics.stdev(known) if len(known) > 1 else None
    return Mean(value=statistics.mean(known), spread=spread, num_seeds=len(known))


def of_setting(cells: Mapping[str, Mapping[str, Any] | None], setting: str) -> Mean | None:
    """Return the mean of a setting over the seeds that were measured."""
    return mean(cell[setting] for cell in cells.values() if cell is not None)


def gain(undistilled: Mean, distilled: Mean) -> Gain:
    """Return how much lower the second is."""
    spreads = (undistilled.spread, distilled.spread)
    known = [spread for spread in spreads if spread is not None]
    return Gain(
        value=undistilled.value - distilled.value,
        spread=math.hypot(*known) if len(known) == len(spreads) else None,
    )


def tables(result: Mapping[str, Any]) -> str:
    """Return everything as Markdown."""
    parts = [_conditions(result)]
    texts = list(result["full_zero_shot"])
    parts += [f"{_reference(result, text)}\n\n{_settings(result, text)}" for text in texts]
    parts += [f"{_verdict(result, text)}\n" for text in texts]
    parts += [_rates(result), _course(result, texts)]
    return "\n".join(parts)


def _conditions(result: Mapping[str, Any]) -> str:
    machine, recipe = result["machine"], result["recipe"]
    versions = ", ".join(f"{name} {number}" for name, number in result["versions"].items())
    last = max(result["tokens"].values())
    return (
        f"{machine['cpu']}, {machine['num_threads']} threads; {versions}; {result['date']}, commit "
        f"{result['commit'] or 'unknown'}. Plan {recipe['plan']}, {recipe['dtype']}; distilled on "
        f"{last:,} tokens ({recipe['distill_steps']} steps), tuned on {result['tune_tokens']:,} "
        f"tokens ({recipe['tune_steps']} steps, peak rate {recipe['tune_rate']:g}), sequences of "
        f"{recipe['seq_len']} tokens, {recipe['batch_size']} a step. Nats per token; mean and "
        f"standard deviation over seeds.\n"
    )


def _reference(result: Mapping[str, Any], text: str) -> str:
    full, bound = result["full_zero_shot"][text], result["bound"][text]
    shown = [
        f"full zero-shot {_cell(full, 'nats')}",
        f"bound {_cell(bound, 'bound')} (one seed)",
    ]
    gained = full is not None and bound is not None and bound["bound"] < full["nats"]
    said = "" if gained else " The tuning gains nothing here, not even in the bound."
    return f"**{text}**: {', '.join(shown)}.{said}"


def _cell(cell: Mapping[str, Any] | None, name: str) -> str:
    return "not measured" if cell is None else f"{cell[name]:.3f}"


def _settings(result: Mapping[str, Any], text: str) -> str:
    head = (
        "distilled by", "seeds", "emulator zero-shot", "emulator fine-tuned", "plug-in",
        "helps the plug-in by", "beyond the spread",
    )  # fmt: skip
    rows = []
    for loss, of_texts in result["tuned"].items():
        means = {setting: of_setting(of_texts[text], setting) for setting in SETTINGS}
        found = means["plug_in"]
        seeds = str(found.num_seeds) if found else "0"
        rows.append((loss, seeds, *(_mean(means[s]) for s in SETTINGS), *_gain(result, loss, text)))
    return table(head, rows)


def _mean(found: Mean | None) -> str:
    if found is None:
        return "not measured"
    return f"{found.value:.3f}" + ("" if found.spread is None else f" ± {found.spread:.3f}")


def gain_of(result: Mapping[str, Any], loss: str, text: str) -> Gain | None:
    """Return what distilling by a loss does for the plug-in on a text, if it was measured."""
    means = [of_setting(result["tuned"][row][text], "plug_in") for row in (UNDISTILLED, loss)]
    return gain(means[0], means[1]) if means[0] and means[1] else None


def _gain(result: Mapping[str, Any], loss: str, text: str) -> tuple[str, str]:
    found = None if loss == UNDISTILLED else gain_of(result, loss, text)
    if found is None:
        return "", ""
    spread = "" if found.spread is None else f" ± {found.spread:.3f}"
    beyond = {True: "yes", False: "no", None: "unknown"}[found.beyond]
    return f"{found.value:+.3f}{spread}", beyond


def _verdict(result: Mapping[str, Any], text: str) -> str:
    """Say which loss helps most, and whether that is beyond the spread."""
    gains = {
        loss: found
        for loss in result["tuned"]
        if loss != UNDISTILLED and (found := gain_of(result, loss, text)) is not None
    }
    if not gains:
        return f"{text}: not measured."
    best = max(gains, key=lambda loss: gains[loss].value)
    helpful = [loss for loss, found in gains.items() if found.beyond]
    tokens = max(result["tokens"].values())
    return (
        f"{text}: after {tokens:,} tokens of distillation the best plug-in is that of *{best}*, "
        f"{gains[best].value:+.3f} nats per token better than undistilled. Beyond the spread "
        f"(twice the standard deviation of the difference) distillation helps with: "
        f"{', '.join(helpful) or 'no loss'}."
    )


def _rates(result: Mapping[str, Any]) -> str:
    head = ("pilot", *(f"rate {rate:g}" for rate in result["recipe"]["rates"]), "chosen")
    rows = [
        (loss, *(_cell(cell, "nats") for cell in found.values()), f"{result['rates'][loss] or 0:g}")
        for loss, found in result["pilots"].items()
    ]
    return (
        f"Peak learning rates of distillation, chosen by {result['recipe']['pilot_steps']} steps "
        f"with seed 0 (emulator zero-shot on public text):\n\n{table(head, rows)}"
    )


def _course(result: Mapping[str, Any], texts: list[str]) -> str:
    """Show what is reached after how many tokens."""
    marks = list(result["tokens"].items())
    columns = [f"{tokens:,}" for _, tokens in marks]
    public = [
        (loss, *(_public(result, loss, mark) for mark, _ in marks)) for loss in result["rates"]
    ]
    parts = [
        "By tokens of distillation. Emulator zero-shot on held-out public text:\n",
        table(("distilled by", *columns), public),
    ]
    for text in texts:
        rows = [
            (loss, *(_mean(_plug_in(result, loss, text, mark)) for mark, _ in marks))
            for loss in result["rates"]
        ]
        seeds = ", ".join(map(str, result["recipe"]["course_seeds"]))
        parts += [
            f"Plug-in on {text}, seed {seeds}:\n",
            table(("distilled by", *columns), rows),
            _best_by_tokens(result, text),
        ]
    return "\n".join(parts)


def _best_by_tokens(result: Mapping[str, Any], text: str) -> str:
    """Say which loss has the best plug-in after how many tokens."""
    best = []
    for mark, tokens in result["tokens"].items():
        plug_ins = {loss: _plug_in(result, loss, text, mark) for loss in result["rates"]}
        known = {loss: found.value for loss, found in plug_ins.items() if found is not None}
        if known:
            best.append(f"*{min(known, key=known.__getitem__)}* after {tokens:,}")
    return f"Best per token: {', '.join(best) or 'not measured'}.\n"


def _public(result: Mapping[str, Any], loss: str, mark: str) -> str:
    cells = result["distilled"][loss].values()
    return _mean(mean(cell["nats"][mark] for cell in cells if cell is not None))


def _plug_in(result: Mapping[str, Any], loss: str, text: str, mark: str) -> Mean | None:
    """Return the plug-in after some steps, of the seeds that were measured after all marks."""
    course = result["course"]
    cells = course[mark][loss][text] if mark in course else result["tuned"][loss][text]
    seeds = {str(seed) for seed in result["recipe"]["course_seeds"]}
    return of_setting({seed: cell for seed, cell in cells.items() if seed in seeds}, "plug_in")
