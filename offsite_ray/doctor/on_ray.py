# SPDX-License-Identifier: Apache-2.0
"""Measuring every node of a Ray cluster, each by a process there."""

from __future__ import annotations

import contextlib
import logging
import os
import socket
import time
from collections import Counter
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from offsite_ray.doctor.facts import Facts
from offsite_ray.doctor.measure import asked_without_token, clock_time, marked, measure, versions
from offsite_ray.errors import ClusterError, first_line
from offsite_ray.uris import is_uri

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Mapping, Sequence

_QUESTIONS = 3
"""After the time of a node; the quickest answer says most."""


def examine_ray(storage: str | None, timeout: float) -> tuple[Facts, ...]:
    """Measure this process's side of the cluster of ``RAY_ADDRESS``, and each node that is alive.

    Args:
        storage: Path or URI that every node is to write to.
        timeout: Seconds after which a node that has not answered counts as silent.

    Returns:
        What is known here, then a node each.

    Raises:
        ClusterError: No Ray answers.
    """
    import ray

    with _connected(timeout) as context, marked(storage, timeout / 2) as marker:
        dashboard = context.dashboard_url
        here = Facts(
            node="here",
            versions=versions(),
            open_dashboard=asked_without_token(_with_scheme(dashboard)) if dashboard else None,
        )
        session = context.address_info.get("session_dir")
        # Storage that hangs is found out on the node, before the node counts as silent.
        asked = (storage, timeout / 2, marker, session and str(Path(session).parent))
        nodes = [node for node in ray.nodes() if node["Alive"]]
        return (here, *_measured(nodes, asked, timeout))


@contextlib.contextmanager
def _connected(timeout: float) -> Iterator[Any]:
    """Connect to the cluster of ``RAY_ADDRESS`` until the block ends."""
    import ray
    from ray.exceptions import RayError

    address = os.environ["RAY_ADDRESS"]
    host, _, port = address.rpartition(":")
    try:
        if port.isdigit():  # Ray itself tries for more than ten minutes
            socket.create_connection((host, int(port)), timeout).close()
        context = ray.init(log_to_driver=False, logging_level=logging.ERROR)
    except (OSError, RuntimeError, ValueError, RayError) as error:
        raise ClusterError(
            f"no Ray answers at RAY_ADDRESS={address}: {first_line(error)}; is it up, and is the "
            "token that of the cluster (RAY_AUTH_TOKEN)? Without RAY_ADDRESS this machine alone is "
            "examined"
        ) from error
    try:
        yield context
    finally:
        ray.shutdown()


def _with_scheme(address: str) -> str:
    return address if is_uri(address) else f"http://{address}"


def _measured(
    nodes: Sequence[Mapping[str, Any]], asked: tuple[Any, ...], timeout: float
) -> list[Facts]:
    """Return the facts of nodes in their order; of those that are silent, that they are."""
    import ray
    from ray.exceptions import RayError

    names = _names(nodes)
    until = time.monotonic() + timeout
    waiting = {_on(node, measure).remote(names[node["NodeID"]], *asked): node for node in nodes}
    found = {
        node["NodeID"]: Facts(node=names[node["NodeID"]], problem=f"no answer within {timeout:g} s")
        for node in nodes
    }
    while waiting:
        # At least once more when the time is up: one may have taken it that is silent by now.
        left = max(0.0, until - time.monotonic())
        done, _ = ray.wait(list(waiting), num_returns=1, timeout=left)
        if not done:
            break
        for answer in done:
            node = waiting.pop(answer)
            try:
                facts = ray.get(answer)
            except RayError as error:
                # The page that Ray makes of an error ends with the error.
                said = str(error).strip().splitlines()[-1][:300]
                facts = replace(found[node["NodeID"]], problem=said)
            else:
                facts = _with_clock(facts, node, until)
            found[node["NodeID"]] = facts
    resources = {node["NodeID"]: node["Resources"] for node in nodes}
    return [
        replace(
            facts,
            num_cpus=resources[node].get("CPU", 0.0),
            num_ray_gpus=resources[node].get("GPU", 0.0),
        )
        for node, facts in found.items()
    ]


def _with_clock(facts: Facts, node: Mapping[str, Any], until: float) -> Facts:
    """Add how far a node's clock is ahead of this one, by the middle of a round trip."""
    import ray
    from ray.exceptions import RayError

    clock = _on(node, clock_time)
    for _ in range(_QUESTIONS):
        sent, began = time.time(), time.monotonic()
        try:
            told = ray.get(clock.remote(), timeout=max(0.0, until - began))
        except RayError:  # silent since, or the time is up
            break
        took = time.monotonic() - began
        if facts.round_trip_s is None or took < facts.round_trip_s:
            facts = replace(facts, clock_ahead_s=told - sent - took / 2, round_trip_s=took)
    return facts


def _on(node: Mapping[str, Any], function: Callable[..., Any]) -> Any:
    """Return a function as a task of a node, which takes nothing of what others could use."""
    import ray
    from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

    there = NodeAffinitySchedulingStrategy(node["NodeID"], soft=False)
    task: Any = ray.remote(function)
    return task.options(num_cpus=0, max_retries=0, scheduling_strategy=there)


def _names(nodes: Sequence[Mapping[str, Any]]) -> dict[str, str]:
    """Return what nodes are called: their own name or their machine's; with an id if need be."""
    names = {
        node["NodeID"]: node["NodeManagerHostname"]
        if node["NodeName"] == node["NodeManagerAddress"]
        else node["NodeName"]
        for node in nodes
    }
    times = Counter(names.values())
    return {key: f"{name} {key[:8]}" if times[name] > 1 else name for key, name in names.items()}
