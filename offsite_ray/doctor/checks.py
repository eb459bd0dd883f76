# SPDX-License-Identifier: Apache-2.0
"""What is checked: a table of checks, how each one judges, and how its faults are mended."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

from offsite_ray.results import bytes_text

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence

    from offsite_ray.config import DoctorConfig
    from offsite_ray.doctor.facts import Facts

Verdict = Literal["ok", "warning", "failed", "not measured"]

_GIB = 2**30
_SPILL_SHARE = 0.05
"""Free space of a disk below which Ray takes no more objects (local_fs_capacity_threshold)."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Finding:
    """What a check found."""

    check: str
    verdict: Verdict
    nodes: tuple[str, ...] = ()
    """Where; empty: of all of them together."""
    found: str
    mend: str | None = None
    """What to do about it."""


Fault = tuple[Verdict, str, str]
"""How bad, on which node (empty: of none alone), and what."""


@dataclass(frozen=True, slots=True)
class Check:
    """A row of the table."""

    name: str
    judge: Callable[[Sequence[Facts], DoctorConfig], Iterator[Fault]]
    """Yields faults, and with verdict ``"ok"`` what was seen."""
    mend: str


def judge(facts: Sequence[Facts], config: DoctorConfig) -> list[Finding]:
    """Return what the checks find, in their order: a finding each at least.

    Args:
        facts: Of the asking process first, then of the nodes; or of one machine alone.
        config: The limits.
    """
    return [finding for check in CHECKS for finding in _findings(check, facts, config)]


def _findings(check: Check, facts: Sequence[Facts], config: DoctorConfig) -> list[Finding]:
    """Return the findings of a check; equal ones of several nodes are one."""
    nodes: dict[tuple[Verdict, str], list[str]] = {}
    for verdict, node, found in check.judge(facts, config):
        nodes.setdefault((verdict, found), []).append(node)
    # What is well is worth saying only where nothing else is.
    wrong = any(verdict in ("failed", "warning") for verdict, _ in nodes)
    shown = {key: names for key, names in nodes.items() if not (wrong and key[0] == "ok")}
    return [
        Finding(
            check=check.name,
            verdict=verdict,
            nodes=tuple(filter(None, names)) if verdict != "ok" else (),
            found=found,
            mend=check.mend if verdict in ("failed", "warning") else None,
        )
        for (verdict, found), names in (shown or _NOTHING).items()
    ]


_NOTHING: dict[tuple[Verdict, str], list[str]] = {("not measured", "not measured"): []}


def examined(facts: Sequence[Facts]) -> list[Facts]:
    """Return the facts of nodes: without those of who asks, which is none that work runs on."""
    return [one for one in facts if one.num_cpus is not None]


def _nodes(facts: Sequence[Facts], config: DoctorConfig) -> Iterator[Fault]:
    nodes = examined(facts)
    for one in nodes:
        if one.problem is not None:
            yield "failed", one.node, one.problem
    yield "ok", "", f"all {len(nodes)} answered" if len(nodes) > 1 else "this one answered"


def _versions(facts: Sequence[Facts], config: DoctorConfig) -> Iterator[Fault]:
    wanted: dict[str, tuple[str, str]] = {}
    for one in facts:
        for name, version in (one.versions or {}).items():
            if version is not None:
                wanted.setdefault(name, (version, one.node))
    for one in facts:
        apart = []
        for name, version in (one.versions or {}).items():
            if version is None and one.num_cpus is not None:
                apart.append(f"{name} is missing")
            elif version is not None and _public(version) != _public(wanted[name][0]):
                apart.append(f"{name} {version}, but {wanted[name][0]} on {wanted[name][1]}")
        if apart:
            yield "failed", one.node, "; ".join(apart)
    if wanted:
        yield "ok", "", f"{len(wanted)}, the same wherever they were looked at"


def _public(version: str) -> str:
    """Return a version without its local part: builds of one version are as good as each other."""
    return version.partition("+")[0]


def _torch_gpus(facts: Sequence[Facts], config: DoctorConfig) -> Iterator[Fault]:
    for one in facts:
        if one.num_torch_gpus is None:
            continue
        there = len(one.gpus or ())
        if one.num_torch_gpus < there:
            verdict: Verdict = "warning" if one.num_torch_gpus else "failed"
            yield verdict, one.node, f"torch sees {one.num_torch_gpus} of {there} GPUs"
    known = [one.num_torch_gpus for one in facts if one.num_torch_gpus is not None]
    if known:
        yield "ok", "", f"torch sees {sum(known)}, all there are" if sum(known) else "none there"


def _ray_gpus(facts: Sequence[Facts], config: DoctorConfig) -> Iterator[Fault]:
    counted = 0.0
    for one in facts:
        if one.num_ray_gpus is None or one.num_torch_gpus is None:
            continue
        counted += one.num_ray_gpus
        if one.num_ray_gpus != one.num_torch_gpus:
            verdict: Verdict = "failed" if one.num_ray_gpus > one.num_torch_gpus else "warning"
            yield (
                verdict,
                one.node,
                f"Ray counts {one.num_ray_gpus:g} GPUs, torch sees {one.num_torch_gpus}",
            )
    if any(one.num_ray_gpus is not None for one in facts):
        yield "ok", "", f"Ray counts {counted:g}"
    else:
        yield "not measured", "", "no cluster"


def _memory(facts: Sequence[Facts], config: DoctorConfig) -> Iterator[Fault]:
    free = {one.node: one.free_memory_bytes for one in facts if one.free_memory_bytes is not None}
    for node, size in free.items():
        if size < config.min_free_memory_gib * _GIB:
            wanted = f"{config.min_free_memory_gib:g} GiB"
            yield "failed", node, f"{bytes_text(size)} free, less than {wanted}"
    if free:
        yield "ok", "", f"at least {bytes_text(min(free.values()))} free"


def _disk(facts: Sequence[Facts], config: DoctorConfig) -> Iterator[Fault]:
    disks = [(one.node, disk) for one in facts for disk in one.disks]
    for node, disk in disks:
        free = f"{bytes_text(disk.free_bytes)} of {bytes_text(disk.total_bytes)} free"
        if disk.free_bytes < config.min_free_disk_gib * _GIB:
            wanted = f"{config.min_free_disk_gib:g} GiB"
            yield "failed", node, f"{disk.path}: {free}, less than {wanted}"
        elif disk.for_ray and disk.free_bytes < _SPILL_SHARE * disk.total_bytes:
            share = f"less than {_SPILL_SHARE:.0%}, where Ray takes no more objects"
            yield "failed", node, f"{disk.path}: {free}, {share}"
    if disks:
        least = min(disk.free_bytes for _, disk in disks)
        yield "ok", "", f"at least {bytes_text(least)} free"


def _storage(facts: Sequence[Facts], config: DoctorConfig) -> Iterator[Fault]:
    tried = [(one.node, one.storage) for one in facts if one.storage is not None]
    for node, storage in tried:
        if storage.problem is not None:
            yield "failed", node, storage.problem
    if tried:
        yield "ok", "", f"written, read and removed on {len(tried)}"
    elif config.storage is None:
        yield "not measured", "", "no --storage was given"


def _shared(facts: Sequence[Facts], config: DoctorConfig) -> Iterator[Fault]:
    known = {one.node: one.storage.shared for one in facts if one.storage is not None}
    for node, shared in known.items():
        if shared is False:
            yield "failed", node, "what another node has written is not there"
    if any(known.values()):
        yield "ok", "", f"{sum(map(bool, known.values()))} see what another has written"


def _compiler(facts: Sequence[Facts], config: DoctorConfig) -> Iterator[Fault]:
    for one in facts:
        if one.extension is None:
            continue
        missing = ", ".join(one.extension.missing)
        if one.num_torch_gpus:
            yield "ok", "", "not needed on GPUs"
        elif missing and not one.extension.compiled:
            yield "failed", one.node, f"missing: {missing}"
        elif missing:
            yield "warning", one.node, f"missing: {missing}; it is compiled, until the next update"
        else:
            yield "ok", "", "there"


def _extension(facts: Sequence[Facts], config: DoctorConfig) -> Iterator[Fault]:
    for one in facts:
        if one.extension is None:
            continue
        if one.num_torch_gpus:
            yield "ok", "", "not needed on GPUs"
        elif one.extension.compiled:
            yield "ok", "", "compiled"
        else:
            yield "warning", one.node, "not compiled yet"


def _authentication(facts: Sequence[Facts], config: DoctorConfig) -> Iterator[Fault]:
    opened = Counter(one.open_dashboard for one in facts if one.open_dashboard is not None)
    on_ray = [one for one in facts if one.num_ray_gpus is not None]
    if not (opened or on_ray):
        yield "not measured", "", "no cluster"
        return
    if opened[True]:
        yield "failed", "", "the dashboard runs the jobs of whoever reaches it, without a token"
    for one in on_ray:
        if one.auth_mode != "token" and one.versions is not None:
            verdict: Verdict = "failed" if one.auth_mode == "disabled" else "warning"
            yield verdict, one.node, f"RAY_AUTH_MODE is {one.auth_mode or 'not set'}"
    if opened[False]:
        yield "ok", "", "the dashboard refuses who has no token"
    elif not opened:
        yield "not measured", "", "no dashboard answers"


def _clock(facts: Sequence[Facts], config: DoctorConfig) -> Iterator[Fault]:
    worst = 0.0
    for one in facts:
        if one.clock_ahead_s is None or one.round_trip_s is None:
            continue
        ahead, within = one.clock_ahead_s, one.round_trip_s
        worst = max(worst, abs(ahead))
        if abs(ahead) - within > config.max_clock_skew:
            side = "ahead of" if ahead > 0 else "behind"
            yield "failed", one.node, f"{abs(ahead):.1f} s {side} the asking node's"
        elif within > config.max_clock_skew:
            yield "not measured", one.node, f"the node took {within:.1f} s to tell the time"
        else:
            yield "ok", "", f"at most {config.max_clock_skew:g} s apart"


CHECKS = (
    Check(
        "nodes",
        _nodes,
        "see that it is up ('ray list nodes'), that its Python has offsite-ray and what it "
        "requires, and what its logs say; a node that hangs is ended and started anew",
    ),
    Check(
        "versions",
        _versions,
        "use one image for every node, or 'pip install NAME==VERSION' there",
    ),
    Check(
        "GPUs in torch",
        _torch_gpus,
        "install the build of torch for CUDA and a driver that is new enough for it; unset "
        "CUDA_VISIBLE_DEVICES where it hides some",
    ),
    Check(
        "GPUs in Ray",
        _ray_gpus,
        "start the node with --num-gpus as many as it has (on Kubernetes: its limits)",
    ),
    Check(
        "memory",
        _memory,
        "end what else runs there, raise the container's limit, or lower --min-free-memory-gib",
    ),
    Check(
        "disk",
        _disk,
        "remove what is not needed, mount a larger disk there (ray start --temp-dir for Ray's "
        "files), or lower --min-free-disk-gib",
    ),
    Check(
        "storage",
        _storage,
        "mount it on this node at this path, writable for the user that Ray runs as; of an object "
        "store, give the node its endpoint and keys (AWS_ACCESS_KEY_ID, ...)",
    ),
    Check(
        "storage shared",
        _shared,
        "mount one and the same file system at this path on every node, or use an object store",
    ),
    Check(
        "compiler",
        _compiler,
        "install g++, ninja and Python's headers, and have them on the PATH that Ray is started "
        "with (Debian, Ubuntu: apt install g++ ninja-build python3-dev)",
    ),
    Check(
        "extension",
        _extension,
        "nothing, if the first distillation on CPUs may take a minute longer; else run there: "
        "python -c 'from offsite_ray.train.extension import build_extension as b; b()'",
    ),
    Check(
        "authentication",
        _authentication,
        "start every node with RAY_AUTH_MODE=token and RAY_AUTH_TOKEN_PATH, the same token for "
        "all ('ray get-auth-token --generate' makes one)",
    ),
    Check(
        "clock",
        _clock,
        "keep the clocks by NTP (systemctl enable --now systemd-timesyncd, or chrony)",
    ),
)
"""Every check, in the order in which to mend."""
