# SPDX-License-Identifier: Apache-2.0
"""What TensorBoard's own files hold, read without TensorBoard."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path


def events(run: Path) -> Iterator[Any]:
    """Yield every event of a run, file after file."""
    from tensorboardX.event_file_writer import EventFileWriter  # noqa: F401  # it is installed
    from tensorboardX.proto.event_pb2 import Event

    for file in sorted(run.glob("events.*")):
        data, position = file.read_bytes(), 0
        while position < len(data):
            length = int.from_bytes(data[position : position + 8], "little")
            yield Event.FromString(data[position + 12 : position + 12 + length])
            position += 16 + length


def points(run: Path) -> dict[str, list[tuple[int, float]]]:
    """Return a run's points, ``(step, value)``, by name."""
    found: dict[str, list[tuple[int, float]]] = {}
    for event in events(run):
        for value in event.summary.value:
            found.setdefault(value.tag, []).append((event.step, value.simple_value))
    return found
