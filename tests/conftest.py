# SPDX-License-Identifier: Apache-2.0
"""What every test shares: one thread a process, no network, one Ray cluster, real data if present.

The environment is set before anything heavy is imported, because torch, transformers and Ray read
it at import, and the processes that tests start inherit it.
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
from xdist.scheduler import LoadScopeScheduling

if TYPE_CHECKING:
    from collections.abc import Generator, Iterator

    from tests.browser import Browser
    from tests.deployed import Deployed
    from tests.loops import Loop
    from tests.stores import Store

os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("RAY_TRAIN_WORKER_GROUP_START_TIMEOUT_S", "180")
os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["RAY_USAGE_STATS_ENABLED"] = "0"
# Ray's workers would give way to the tests beside them, and theirs take longest.
os.environ.setdefault("RAY_worker_niceness", "0")
os.environ["TOKENIZERS_PARALLELISM"] = "false"

ROOT = Path(__file__).resolve().parent.parent
REAL_DATA = "OFFSITE_RAY_REAL_DATA"
ON_RAY = frozenset(
    f"test_{name}.py"
    for name in (
        "bench_distill",
        "bench_prepare",
        "demo",
        "doctor_on_ray",
        "drills_on_ray",
        "monitoring",
        "prepare",
        "served_access",
        "served_application",
        "served_clients",
        "served_deploy",
        "served_faults",
        "served_page",
        "signals",
        "submit",
        "sweep_on_ray",
        "teacher_cache",
        "train",
    )
)
"""Files with tests that start Ray, in the fixture below or in a process of their own.

Not test_readme.py: most of its commands need no Ray, and together they take as long as all drills.
"""
_NO_REASON = ("", "unconditional skip")


def pytest_configure() -> None:
    import torch
    from hypothesis import settings

    torch.set_num_threads(1)
    # An example that waits for a busy machine is no failure.
    settings.register_profile("untimed", deadline=None)
    settings.load_profile("untimed")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Begin with what starts Ray, which takes longest."""
    items.sort(key=lambda item: item.path.name not in ON_RAY)
    for item in items:
        if "ray_cluster" in getattr(item, "fixturenames", ()) and item.path.name not in ON_RAY:
            raise pytest.UsageError(f"{item.path.name} uses Ray: add it to ON_RAY in {__file__}")


class OneRay(LoadScopeScheduling):  # type: ignore[misc]  # ships no types
    """Gives a process of xdist whole files, and all those on Ray to the same one.

    So they share one cluster, and what a file prepares is prepared once.
    """

    def _split_scope(self, nodeid: str) -> str:
        file = nodeid.partition("::")[0]
        return "ray" if file.rpartition("/")[2] in ON_RAY else file


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config: pytest.Config, log: Any) -> OneRay:
    """Take files in the order above, and not those with most tests first."""
    config.option.loadscopereorder = False
    return OneRay(config, log)


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport() -> Generator[None, pytest.TestReport, pytest.TestReport]:
    """Fail a test that skips without saying why."""
    report = yield
    if report.skipped and isinstance(report.longrepr, tuple):
        path, line, message = report.longrepr
        if message.removeprefix("Skipped").strip(": ") in _NO_REASON:
            report.outcome = "failed"
            report.longrepr = f"{path}:{line}: skipped without a reason"
    return report


@pytest.fixture(scope="session")
def ray_cluster() -> Iterator[None]:
    """Run a local Ray with three logical CPUs, until the last test is done."""
    import ray

    ray.init(address="local", num_cpus=3, log_to_driver=False, configure_logging=False)
    yield
    ray.shutdown()


@pytest.fixture
def dataset_cache(
    tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Keep what datasets makes of local files out of the user's own cache."""
    cache = tmp_path_factory.mktemp("cache")
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", cache)


@pytest.fixture
def empty_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Return where a machine that has fetched nothing yet keeps what it fetches."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return tmp_path / "cache/offsite_ray"


@pytest.fixture(scope="module")
def store() -> Iterator[Store]:
    """Give a file of tests an S3 server of this machine."""
    from tests.stores import Store

    with Store() as running:
        yield running


@pytest.fixture(scope="session")
def real_data() -> Path:
    """Return the folder with real data and models, which is not part of the project."""
    directory = Path(os.environ.get(REAL_DATA, ROOT.parent / "shared"))
    if not (directory / "data").is_dir():
        pytest.skip(f"no real data: {directory}/data does not exist; point {REAL_DATA} to it")
    return directory


@pytest.fixture(scope="session")
def real_model(real_data: Path) -> Path:
    """Return a small model that was pretrained."""
    directory = real_data / "models" / "fm16"
    if not directory.is_dir():
        pytest.skip(f"no real model: {directory} does not exist")
    return directory


@pytest.fixture(scope="session")
def loop(tmp_path_factory: pytest.TempPathFactory) -> Loop:
    """Return a tiny GPT-2 with bundles and texts; only read."""
    from tests.loops import make_loop

    return make_loop(tmp_path_factory.mktemp("loop"))


@pytest.fixture(scope="session")
def served(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Deployed]:
    """Give a running application to all tests that only use it."""
    from tests.deployed import deployed, make_served

    root = tmp_path_factory.mktemp("served")
    with deployed(make_served(root), root / "state") as running:
        yield running


@pytest.fixture(scope="session")
def browser(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Browser]:
    """Give one browser to all tests of pages."""
    from tests.browser import Browser

    with Browser(tmp_path_factory.mktemp("profile")) as started:
        yield started
