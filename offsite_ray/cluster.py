# SPDX-License-Identifier: Apache-2.0
"""The Ray cluster that work runs on: the one at hand, or one of this process for the time being.

Work that falls into parts is done on Ray Data. What streams through the cluster is only which part
to do and what became of it; the parts themselves are files.
"""

from __future__ import annotations

import contextlib
import json
import logging
import math
import os
import signal
import threading
from collections import Counter
from typing import TYPE_CHECKING, Any

from offsite_ray import errors
from offsite_ray.errors import ClusterError, ConfigError, first_line
from offsite_ray.results import to_plain

if TYPE_CHECKING:
    from collections.abc import Callable, Generator, Iterator, Mapping

_MAX_ATTEMPTS = 4
"""At a part whose workers are lost. Ray Data itself would never end where a part kills them all."""


@contextlib.contextmanager
def embedded_ray(num_workers: int) -> Iterator[None]:
    """Use the Ray cluster at hand, or run one in this process for the time being.

    A cluster is at hand where this process is connected to one, or ``RAY_ADDRESS`` names one.

    Args:
        num_workers: Workers of Ray Train or Ray Data that will run; 0: of neither.
    """
    import ray

    if ray.is_initialized():
        yield
        return
    # A worker that only waits for its first step takes a core of Ray's count, not of the machine.
    local: dict[str, Any] = {
        "num_cpus": max(num_workers + 1, os.cpu_count() or 1),
        # The state of actors is known to the dashboard alone, and Ray Train cleans up by it. Where
        # there are no such workers, its dozen processes would only keep the first trial waiting.
        "include_dashboard": num_workers > 0,
    }
    _start(**local)
    try:
        yield
    finally:
        ray.shutdown()


@contextlib.contextmanager
def serving_ray(
    num_replicas: tuple[int, int], num_cpus: float, num_gpus: float
) -> Iterator[str | None]:
    """Use the Ray cluster at hand, or run one in this process while something is served.

    Args:
        num_replicas: That there are at least, and at most.
        num_cpus: Of a replica.
        num_gpus: Of a replica.

    Yields:
        The directory of Ray's logs on this node, if it is known.

    Raises:
        ConfigError: The cluster can never hold the replicas that there are at least.
    """
    import ray

    logs, (least, most), ours = None, num_replicas, not ray.is_initialized()
    if ours:
        # Store and ingress take none, and Serve's own actors next to none.
        local: dict[str, Any] = {
            "num_cpus": max(math.ceil(most * num_cpus) + 1, os.cpu_count() or 1),
        }
        logs = os.path.join(_start(**local).address_info["session_dir"], "logs")
    try:
        who = "a replica needs" if least == 1 else f"{least} replicas need"
        _check_there(who, least * num_cpus, "CPU", "--num-cpus")
        _check_there(who, least * num_gpus, "GPU", "--num-gpus")
        yield logs
    finally:
        if ours:
            ray.shutdown()


def _start(**local: Any) -> Any:
    """Connect to the cluster that ``RAY_ADDRESS`` names, or run one as told; return its context."""
    import ray

    # "local", or Ray would join the cluster that was last started on this machine, whoever's it is.
    given = {} if os.environ.get("RAY_ADDRESS") else {"address": "local", **local}
    try:
        with _own_sigterm():
            return ray.init(log_to_driver=False, logging_level=logging.ERROR, **given)
    except Exception as error:  # Ray's own, of many kinds
        where = os.environ.get("RAY_ADDRESS", "this machine")
        raise ClusterError(
            f"no Ray at {where}: {first_line(error)}; see that it is up and takes your token "
            "(RAY_AUTH_TOKEN), and that the machine is not too busy to start one"
        ) from error


@contextlib.contextmanager
def _own_sigterm() -> Iterator[None]:
    """Have SIGTERM end this process as before the block, or as Ctrl-C does where nobody handled it.

    Ray's handler aborts the process three seconds later, when it may still be tidying up.
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return

    def end(number: int, _: Any) -> None:
        raise SystemExit(128 + number)

    before = signal.getsignal(signal.SIGTERM)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, end if before is signal.SIG_DFL else before)


def check_room(num_workers: int, *, gpu: bool) -> None:
    """Refuse a run that the cluster can never hold; raise :class:`ConfigError`."""
    kind = "GPU" if gpu else "CPU"
    _check_there(f"{num_workers} workers need", num_workers, kind, "--num-workers")


def _check_there(who_needs: str, wanted: float, kind: str, flag: str) -> None:
    import ray

    there = ray.cluster_resources().get(kind, 0)
    if there < wanted:
        raise ConfigError(
            f"{who_needs} {wanted:g} {kind}s, and the Ray cluster has {there:g}; lower {flag} or "
            "add nodes"
        )


class Attempts:
    """Counts how often each part was begun, as no worker can that was lost over it."""

    def __init__(self) -> None:
        """Begin with none."""
        self._begun: Counter[int] = Counter()

    def begin(self, part: int) -> int:
        """Count an attempt at a part, and return how many there were."""
        self._begun[part] += 1
        return self._begun[part]


def count_attempts() -> Any:
    """Return what counts attempts for all workers: :class:`Attempts`, as an actor."""
    import ray

    return ray.remote(Attempts).options(num_cpus=0, max_restarts=-1, max_task_retries=-1).remote()


def attempt(row: Mapping[str, Any], attempts: Any, work: Callable[[int], Any]) -> dict[str, str]:
    """Do a part on a worker; what it raises is a value too, for Ray makes pages out of it.

    Args:
        row: ``{"part": number, "name": what it is called}``.
        attempts: From :func:`count_attempts`.
        work: Does the part of a number, and returns what :func:`to_plain` makes plain.
    """
    import ray

    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    part = int(row["part"])
    try:
        if ray.get(attempts.begin.remote(part)) > _MAX_ATTEMPTS:
            raise ClusterError(
                f"{_MAX_ATTEMPTS} workers died over {row['name']}, out of memory or killed; lower "
                "--num-workers, or give them more memory"
            )
        done = work(part)
    except Exception as error:
        return {"done": "", "error": str(error), "kind": type(error).__name__}
    return {"done": json.dumps(to_plain(done)), "error": "", "kind": ""}


def done_parts(
    what: str, names: Mapping[int, str], do: Any, **options: Any
) -> Generator[Any, None, None]:
    """Yield what :func:`attempt` made of each part, as JSON holds it, in any order.

    Args:
        what: What is done, for an error: ``"preparing"``.
        names: Number of each part to what it is called.
        do: Function of a row, or class whose instances are, that calls :func:`attempt`.
        options: Of ``Dataset.map``: where it runs, on what.

    Raises:
        OffsiteError: What a worker raised; the same as in this process.
        ClusterError: Workers were lost, or failed without one of these.
    """
    from ray.data import DataContext, from_items
    from ray.exceptions import RayError

    context = DataContext.get_current().copy()
    context.enable_progress_bars = False
    context.print_on_execution_start = False
    items = [{"part": part, "name": name} for part, name in names.items()]
    with _quiet_ray_data(), DataContext.current(context):
        parts = from_items(items, override_num_blocks=len(items)).map(do, **options)
        # A generator, though typed as an iterator: closed, it stops the workers at once.
        rows: Any = iter(parts.iter_rows())
        with contextlib.closing(rows):
            try:
                for row in rows:
                    yield _result(what, row)
            except RayError as error:
                # The page that Ray makes of an error ends with the error.
                last = str(error).strip().splitlines()[-1][:500]
                raise ClusterError(f"{what} on Ray failed: {last}") from error


def _result(what: str, row: Mapping[str, str]) -> Any:
    if not row["kind"]:
        return json.loads(row["done"])
    known = getattr(errors, row["kind"], None)
    if known is None:
        raise ClusterError(f"{what} on Ray failed: {row['kind']}: {row['error']}")
    raise known(row["error"])


@contextlib.contextmanager
def _quiet_ray_data() -> Iterator[None]:
    """Keep Ray Data's news from the terminal; its log files have them."""
    import ray.data  # noqa: F401  # sets up its log

    handlers = [
        handler
        for handler in logging.getLogger("ray.data").handlers
        if isinstance(handler, logging.StreamHandler)
    ]
    levels = [handler.level for handler in handlers]
    for handler in handlers:
        handler.setLevel(logging.CRITICAL)
    try:
        yield
    finally:
        for handler, level in zip(handlers, levels, strict=True):
            handler.setLevel(level)
