# SPDX-License-Identifier: Apache-2.0
"""What of a sweep is drawn as one line, and where on it: points that differ in one number alone."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from offsite_ray.compression import parse_compression
from offsite_ray.errors import ConfigError

if TYPE_CHECKING:
    from collections.abc import Container, Iterable, Iterator, Mapping, Sequence

BLOCKS = "emulator blocks"
"""Axis of the lines over how many blocks of the middle are kept; others are named by a word."""

_WIDE = 50
"""How many times the smallest number of an axis the largest is, above which orders count."""

_BOTH_ENDS = "both ends"


def placement(row: Mapping[str, Any]) -> str:
    """Return where the adapter blocks are: bottom, top, both ends, or spread over the depth."""
    if not row["adapter_blocks"]:
        return "unknown"
    runs = _runs(row["adapter_blocks"])
    bottom, top = runs[0][0] == 0, runs[-1][-1] == row["num_blocks"] - 1
    if len(runs) == 1:
        return "bottom" if bottom else "top" if top else "middle"
    return _BOTH_ENDS if len(runs) == 2 and bottom and top else "spread"


def placements(rows: Iterable[Mapping[str, Any]]) -> dict[str | None, str]:
    """Return the placement of every set of adapter blocks, no two of as many by the same name.

    Where two would be, their blocks are named too; of those at both ends the even one keeps its
    word, so that it stays on the line of other numbers.
    """
    words = {row["adapter_blocks"]: placement(row) for row in rows}
    alike = Counter((word, _count(blocks)) for blocks, word in words.items())
    return {
        blocks: word if alike[word, _count(blocks)] == 1 else _told_apart(word, blocks or "")
        for blocks, word in words.items()
    }


def _told_apart(word: str, blocks: str) -> str:
    if word != _BOTH_ENDS:
        return f"{word} ({blocks})"
    bottom, top = map(len, _runs(blocks))
    return word if bottom == top else f"{word} ({bottom} + {top})"


def _count(blocks: str | None) -> int:
    return len(blocks.split(",")) if blocks else 0


def _runs(blocks: str) -> list[list[int]]:
    """Return runs of neighbours in a list of indices such as ``"0,1,14"``."""
    runs: list[list[int]] = []
    for index in map(int, blocks.split(",")):
        if runs and runs[-1][-1] == index - 1:
            runs[-1].append(index)
        else:
            runs.append([index])
    return runs


def kinds(points: Sequence[Mapping[str, Any]], utility_gap: str) -> dict[str, list[str]]:
    """Return what is one line over the steps of distillation: its name to the ids of its points.

    An emulator that is not distilled begins the line of every way to distil it.
    """
    bases: dict[str, list[Mapping[str, Any]]] = {}
    for point in points:
        known = point[utility_gap][0] is not None and point["privacy_gap"][0] is not None
        if known and point["competes"]:
            bases.setdefault(_base(point), []).append(point)
    found: dict[str, list[str]] = {}
    for base, members in bases.items():
        start = [point["id"] for point in members if not point["steps"]]
        ways: dict[str, list[str]] = {}
        for point in members:
            if point["steps"]:
                way = ", ".join(point["others"].get("distill", ()))
                ways.setdefault(way, []).append(point["id"])
        for way, distilled in (ways or {"": []}).items():
            found[", ".join(filter(None, (base, way)))] = [*start, *distilled]
    return found


def _base(point: Mapping[str, Any]) -> str:
    """Return what an emulator is but for its distillation, in words."""
    parts = _parts(point)
    said = (parts[name] for name in ("blocks", "select", "compress"))
    rest = (parts[name] for name in ("placement", "method", "rate", "compression", "finetuning"))
    return ", ".join(filter(None, (*said, point["deep"], *rest)))


def _parts(point: Mapping[str, Any]) -> dict[str, str]:
    """Return every setting of a point by its kind, in words; empty where it goes without saying."""
    rate, others = point["learning_rate"], point["others"]
    return {
        "select": point["plan"] if point["select"] == "explicit" else point["select"],
        "compress": "" if point["compress"] == "none" else point["compress"],
        "blocks": f"{point['emulator_blocks']} emulator blocks",
        "steps": f"{point['steps']} steps" if point["steps"] else "not distilled",
        "placement": f"{point['adapter_blocks']} adapter blocks, {point['placement']}",
        "method": "" if point["method"] == "full" else point["method"],
        "rate": "" if rate is None else f"lr {rate:g}",
        "compression": ", ".join(others.get("compress", ())),
        "distillation": ", ".join(others.get("distill", ())),
        "finetuning": ", ".join(others.get("finetune", ())),
    }


@dataclass(frozen=True, kw_only=True, slots=True)
class _Line:
    """What the points of a line have in common: everything but one number."""

    axis: str
    """What the number is."""
    parts: tuple[tuple[str, str], ...]
    """All else, as :func:`_parts` has it; a word stands in the place of the number."""


def compression(
    points: Sequence[Mapping[str, Any]], *, lower: bool
) -> dict[str, list[dict[str, Any]]]:
    """Return how emulators compare as less of the middle is left: Figure 4 of the paper.

    ``lines`` join those that differ in the number of emulator blocks alone, or in one number of
    their compression. ``rows`` have the emulators that are on no line, beside the uncompressed ones
    that are like them otherwise, the best plug-in first. So every emulator that is measured is
    somewhere.

    Args:
        points: As the page has them.
        lower: Whether less is better.
    """
    drawn = {
        point["id"]: point
        for point in points
        if point["plug_in"][0] is not None or point["emulator_fine_tuned"][0] is not None
    }
    parts = {name: _parts(point) for name, point in drawn.items()}
    found: dict[_Line, list[tuple[float, str]]] = {}
    for name, point in drawn.items():
        for line, x in _lines_through(point, parts[name]):
            found.setdefault(line, []).append((x, name))
    lines = {line: sorted(on) for line, on in found.items() if len({x for x, _ in on}) > 1}
    lined = {name for on in lines.values() for _, name in on}
    kinds_known = next(iter(parts.values()), {})
    shared = {kind for kind in kinds_known if len({own[kind] for own in parts.values()}) == 1}
    ranked = sorted(drawn, key=lambda name: _rank(drawn[name]["plug_in"][0], lower=lower))
    plain = [_line(line, on, shared) for line, on in lines.items()]
    return {
        "lines": sorted(plain, key=lambda of: (of["axis"] != BLOCKS, of["rest"], of["name"])),
        "rows": _rows({name: parts[name] for name in ranked}, lined, shared),
    }


def _rank(value: float | None, *, lower: bool) -> tuple[bool, float]:
    """Return what sorts the better value first, and an unknown one last."""
    return (value is None, 0.0 if value is None else value if lower else -value)


def _lines_through(
    point: Mapping[str, Any], parts: Mapping[str, str]
) -> Iterator[tuple[_Line, float]]:
    """Give every line on which a point may be, and where on it."""

    def all_but(kind: str, text: str) -> tuple[tuple[str, str], ...]:
        return tuple({**parts, kind: text}.items())

    # The mean of the seeds that were lucky is beside no line of means of all.
    if not point["competes"]:
        return
    # An explicit plan says more than how many blocks it keeps.
    if point["emulator_blocks"] is not None and point["select"] != "explicit":
        yield _Line(axis=BLOCKS, parts=all_but("blocks", "")), point["emulator_blocks"]
    for word, blanked, x in numbers(point["compress"]):
        yield _Line(axis=word, parts=all_but("compress", blanked)), x


def numbers(text: str) -> list[tuple[str, str, float]]:
    """Return each number of a compression: its word, the text with the word instead, the number.

    ``"low_rank:0.3+quantize:4"`` has ``("RATIO", "low_rank:RATIO+quantize:4", 0.3)`` and
    ``("BITS", "low_rank:0.3+quantize:BITS", 4.0)``.
    """
    try:
        steps = parse_compression(text).steps
    except ConfigError:
        # Of another version of the program: the report still has what was measured.
        return []
    given = [
        # The numbers that were given are the first parameters; the others follow from them.
        list(zip(map(str.upper, step.parameters), map(float, part.split(":")[1:]), strict=False))
        for step, part in zip(steps, text.split("+"), strict=False)
    ]

    def without(blank: tuple[int, int]) -> str:
        parts = []
        for i, (step, pairs) in enumerate(zip(steps, given, strict=True)):
            texts = [word if (i, j) == blank else f"{x:g}" for j, (word, x) in enumerate(pairs)]
            parts.append(":".join((step.method, *texts)))
        return "+".join(parts)

    return [
        (word, without((i, j)), x)
        for i, pairs in enumerate(given)
        for j, (word, x) in enumerate(pairs)
    ]


def _line(line: _Line, on: Sequence[tuple[float, str]], shared: set[str]) -> dict[str, Any]:
    """Return a line as plain values, named by what tells it from the others."""
    parts, (low, high) = dict(line.parts), (on[0][0], on[-1][0])
    name, said = parts["compress"], {"compress"}
    if line.axis == BLOCKS:
        name = ", ".join(filter(None, (f"{parts['select']} drop", parts["compress"])))
        said = {"compress", "select"}
    return {
        "name": name,
        "rest": _told(parts, said | shared),
        "axis": line.axis,
        "log": line.axis != BLOCKS and low > 0 and high / low >= _WIDE,
        "points": [[x, point] for x, point in on],
    }


def _rows(
    parts: Mapping[str, Mapping[str, str]], lined: Container[str], shared: set[str]
) -> list[dict[str, Any]]:
    """Return the points on no line, and what they are to be compared with, in groups of the like.

    Args:
        parts: Of each point, in the order of the rows.
        lined: The points that are on a line.
        shared: Kinds of settings that are the same for all points, and are not told.
    """
    groups: dict[str, list[str]] = {}
    for name, own in parts.items():
        groups.setdefault(_told(own, {"select", "compress"}), []).append(name)
    found = []
    for members in groups.values():
        shown = [name for name in members if name not in lined or not parts[name]["compress"]]
        if all(name in lined for name in shown):
            continue
        of = parts[shown[0]]
        rest = _told(of, {"select", "compress"} | shared)
        rows = [
            [", ".join(filter(None, (parts[name]["select"], parts[name]["compress"]))), name]
            for name in shown
        ]
        found.append({"name": rest, "rows": rows})
    return found


def _told(parts: Mapping[str, str], but: Container[str]) -> str:
    return ", ".join(text for kind, text in parts.items() if text and kind not in but)
