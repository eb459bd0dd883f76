# SPDX-License-Identifier: Apache-2.0
"""Measuring a node from a process on it."""

from __future__ import annotations

import contextlib
import os
import shutil
import subprocess
import sys
import tempfile
import threading
import time
import urllib.error
import urllib.request
import uuid
from functools import partial
from importlib import metadata
from pathlib import Path
from typing import TYPE_CHECKING, TypeVar

from offsite_ray import __version__
from offsite_ray.doctor.facts import Disk, Extension, Facts, Gpu, Storage
from offsite_ray.errors import first_line
from offsite_ray.storage import place_of, reason
from offsite_ray.uris import is_uri

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence

    from offsite_ray.storage import Place

T = TypeVar("T")

PACKAGES = (
    "accelerate",
    "blake3",
    "datasets",
    "deepspeed",
    "fastapi",
    "fastapi-offline",
    "huggingface_hub",
    "jinja2",
    "lm-eval",
    "markupsafe",
    "matplotlib",
    "numpy",
    "peft",
    "pyarrow",
    "pydantic",
    "pyyaml",
    "ray",
    "rich",
    "safetensors",
    "tensorboardX",
    "tokenizers",
    "torch",
    "transformers",
)
"""What this package requires; a node may have its code without what pip knows of it."""

_ANSWER_S = 20.0
"""That a GPU's driver and a dashboard have to answer."""
_CGROUP = Path("/sys/fs/cgroup")


def measure(
    node: str,
    storage: str | None,
    timeout: float,
    marker: str | None = None,
    ray_folder: str | None = None,
) -> Facts:
    """Measure the machine of this process.

    Args:
        node: What to call it.
        storage: Path or URI to write to.
        timeout: Seconds that the storage has for it.
        marker: Name of a file there that another process has written.
        ray_folder: Where Ray keeps its session, if it runs.
    """
    tried = _started(partial(try_storage, storage, marker)) if storage else None
    extension, num_torch_gpus, problem = _torch()
    folders = [tempfile.gettempdir(), *([extension.file] if extension else [])]
    memory, free_memory = _memory()
    told = tried(timeout) if tried else None
    if storage and told and not is_uri(storage):  # of one that hangs nothing is asked here
        folders.append(storage)
    return Facts(
        node=node,
        problem=problem,
        versions=versions(),
        num_cpus=os.cpu_count(),
        memory_bytes=memory,
        free_memory_bytes=free_memory,
        gpus=_gpus(),
        num_torch_gpus=num_torch_gpus,
        disks=_disks(ray_folder, folders),
        storage=tried and (told or Storage(problem=f"no answer within {timeout:g} s")),
        extension=extension,
        auth_mode=os.environ.get("RAY_AUTH_MODE"),
    )


def versions() -> dict[str, str | None]:
    """Return the versions that this process would import."""
    found: dict[str, str | None] = {
        "python": "{}.{}".format(*sys.version_info),
        "offsite-ray": __version__,
    }
    for name in PACKAGES:
        found[name] = None
        with contextlib.suppress(metadata.PackageNotFoundError):
            found[name] = metadata.version(name)
    return found


def clock_time() -> float:
    """Return what the clock of this node says, in seconds since 1970."""
    return time.time()


def asked_without_token(dashboard: str) -> bool | None:
    """Return whether a dashboard tells its jobs to who has no token; None: nobody answers."""
    jobs = f"{dashboard.rstrip('/')}/api/jobs/"
    try:
        with urllib.request.urlopen(jobs, timeout=_ANSWER_S) as answer:
            return True if answer.url == jobs else None  # else a proxy sends us to its login
    except urllib.error.HTTPError as error:
        return False if error.code in (401, 403) else None
    except OSError:
        return None


@contextlib.contextmanager
def marked(storage: str | None, timeout: float) -> Iterator[str | None]:
    """Have a file on the storage until the block ends; its name, or None where it cannot be."""
    name = _new_name()
    if storage is None or not _started(partial(_wrote, storage, name))(timeout):
        yield None
        return
    try:
        yield name
    finally:
        _started(partial(_removed, storage, name))(timeout)


def try_storage(storage: str, marker: str | None) -> Storage:
    """Write a small file, read it and remove it; look for another one."""
    name = _new_name()
    try:
        folder = place_of(storage)
        place = folder.below(name)
        _write(place, name)
        try:
            with place.filesystem.open_input_stream(place.path) as stream:
                if stream.read() != name.encode():
                    return Storage(problem="it reads otherwise than it was written")
        finally:
            place.filesystem.delete_file(place.path)
        return Storage(shared=None if marker is None else folder.below(marker).is_file())
    except Exception as error:  # of whatever filesystem
        return Storage(problem=reason(error))


def _write(place: Place, text: str) -> None:
    with place.filesystem.open_output_stream(place.path) as stream:
        stream.write(text.encode())


def _wrote(storage: str, name: str) -> bool:
    """Write a file; return whether it was. Why it was not, each node finds out itself."""
    with contextlib.suppress(Exception):
        _write(place_of(storage).below(name), name)
        return True
    return False


def _removed(storage: str, name: str) -> bool:
    with contextlib.suppress(Exception):
        place = place_of(storage).below(name)
        place.filesystem.delete_file(place.path)
        return True
    return False


def _new_name() -> str:
    return f".offsite-ray-doctor-{uuid.uuid4().hex}"


def _started(work: Callable[[], T]) -> Callable[[float], T | None]:
    """Do something in a thread of its own; return what waits for it, so many seconds at most."""
    found: list[T] = []
    thread = threading.Thread(target=lambda: found.append(work()), daemon=True)
    thread.start()

    def wait(timeout: float) -> T | None:
        thread.join(timeout)
        return found[0] if found else None

    return wait


def _torch() -> tuple[Extension | None, int | None, str | None]:
    """Return what needs torch: the extension, the GPUs that it sees, and why it is not known."""
    try:
        import torch

        from offsite_ray.train.extension import compiled_extension, missing_tools

        file = compiled_extension()
    except Exception as error:  # whatever a broken installation raises
        return None, None, f"training cannot be imported: {first_line(error)}"
    extension = Extension(file=str(file), compiled=file.is_file(), missing=missing_tools())
    return extension, torch.cuda.device_count() if torch.cuda.is_available() else 0, None


def _gpus() -> tuple[Gpu, ...] | None:
    query = ["--query-gpu=name,memory.total,memory.free", "--format=csv,noheader,nounits"]
    try:
        told = subprocess.run(
            ["nvidia-smi", *query], capture_output=True, text=True, check=True, timeout=_ANSWER_S
        )
    except (OSError, subprocess.SubprocessError):
        return None
    return gpus_of(told.stdout)


def gpus_of(table: str) -> tuple[Gpu, ...]:
    """Return the GPUs of a table of ``nvidia-smi``, in MiB; of some it does not know the memory."""
    rows = (line.rsplit(",", 2) for line in table.splitlines() if line.count(",") >= 2)

    def size(cell: str) -> int | None:
        return int(cell) * 2**20 if cell.strip().isdigit() else None

    return tuple(Gpu(name=n.strip(), total_bytes=size(t), free_bytes=size(f)) for n, t, f in rows)


def _memory() -> tuple[int | None, int | None]:
    """Return the memory that this process may have and what is free of it, in bytes."""
    found = _numbers(Path("/proc/meminfo"), 1024)
    total, free = found.get("MemTotal:"), found.get("MemAvailable:")
    with contextlib.suppress(OSError, ValueError):  # no container, or no limit ("max")
        limit = int((_CGROUP / "memory.max").read_text())
        used = int((_CGROUP / "memory.current").read_text())
        used -= _numbers(_CGROUP / "memory.stat").get("inactive_file", 0)
        total = min(limit, total or limit)
        free = max(0, min(limit - used, free or limit))
    return total, free


def _numbers(file: Path, unit: int = 1) -> dict[str, int]:
    """Return the numbers of a file with a name and a number in each line."""
    try:
        lines = [line.split() for line in file.read_text().splitlines()]
    except OSError:
        return {}
    return {words[0]: int(words[1]) * unit for words in lines if len(words) > 1}


def _disks(ray_folder: str | None, folders: Sequence[str]) -> tuple[Disk, ...]:
    """Return the file systems that folders are on, each once; those that are nowhere are not."""
    found: dict[int, Disk] = {}
    for folder in [ray_folder, *folders]:
        if folder is None:
            continue
        with contextlib.suppress(OSError):
            there = next(p for p in (Path(folder), *Path(folder).parents) if p.exists())
            usage = shutil.disk_usage(there)
            disk = Disk(
                path=str(there),
                total_bytes=usage.total,
                free_bytes=usage.free,
                for_ray=folder == ray_folder,
            )
            found.setdefault(there.stat().st_dev, disk)
    return tuple(found.values())
