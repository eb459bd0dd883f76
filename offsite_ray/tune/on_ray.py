# SPDX-License-Identifier: Apache-2.0
"""Jobs as trials of Ray Tune; the one module of a sweep that knows Ray.

What a job found goes to its own file, never through Ray: Tune decides where and when a job runs,
starts it again after a crash, and stops it. So nothing has to be restored from Tune's own state.
"""

from __future__ import annotations

import os
import shutil
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ray import tune
from ray.tune.schedulers import FIFOScheduler, TrialScheduler
from ray.tune.search import Searcher

from offsite_ray.cluster import embedded_ray
from offsite_ray.errors import ConfigError
from offsite_ray.tune.attempts import (
    Watch,
    end_failed,
    end_stopped,
    last_words,
    last_words_kept,
    try_job,
)
from offsite_ray.tune.bench import Shared
from offsite_ray.tune.folders import FINISHED, Folders
from offsite_ray.tune.plan import Job

if TYPE_CHECKING:
    from collections.abc import Mapping

    from offsite_ray.config import SweepConfig
    from offsite_ray.tune.folders import Record
    from offsite_ray.tune.halving import Halving
    from offsite_ray.tune.search import Source

_STEP, _LOSS = "distill_step", "held_out/"
"""Keys of what a trial reports: the steps done, and before the name of each part of the loss."""

_ENVIRONMENT = {
    # Its own files of results, and the report of them, beside those of the sweep.
    "TUNE_DISABLE_AUTO_CALLBACK_LOGGERS": "1",
    "RAY_AIR_NEW_OUTPUT": "0",
    "TUNE_WARN_EXCESSIVE_EXPERIMENT_CHECKPOINT_SYNC_THRESHOLD_S": "0",
    # A stopped trial that cannot be reused is waited for no longer.
    "TUNE_FUNCTION_THREAD_TIMEOUT_S": "5",
    # A trial runs in a thread, and an arena of one keeps what was freed in pieces of 64 MB, up to
    # some GB after some trials. Workers of a Ray that is started here have but the main arena.
    "MALLOC_ARENA_MAX": "1",
}
"""What Tune and the C library read; set where the user has not."""


def run_on_tune(
    source: Source,
    shared: Shared,
    watch: Watch,
    halving: Halving | None,
    config: SweepConfig,
    workers_per_trial: int,
) -> None:
    """Run jobs as trials of Ray Tune, until there are no more or the user interrupts.

    Args:
        source: Gives the jobs.
        shared: What they share.
        watch: Told what happens.
        halving: When to stop one early; None: never.
        config: Resources of a trial, and how often it is tried.
        workers_per_trial: Most workers of Ray Train that a trial asks for beside its own CPUs.

    Raises:
        ConfigError: The cluster can never hold a trial.
    """
    for name, value in _ENVIRONMENT.items():
        os.environ.setdefault(name, value)
    folders = Folders(Path(shared.root))
    shutil.rmtree(folders.ray, ignore_errors=True)
    with embedded_ray(workers_per_trial):
        tuner = tune.Tuner(
            tune.with_resources(_trial, {"CPU": config.num_cpus, "GPU": config.num_gpus}),
            tune_config=tune_config(
                _Jobs(source, shared, config.num_cpus),
                halving,
                concurrency(config, workers_per_trial),
            ),
            run_config=tune.RunConfig(
                name="tune",
                storage_path=str(folders.ray),
                verbose=0,
                failure_config=tune.FailureConfig(max_failures=config.retries),
                callbacks=[_Follower(source, shared, watch, config.retries)],
            ),
        )
        tuner.fit()
    shutil.rmtree(folders.ray, ignore_errors=True)


def tune_config(jobs: Searcher, halving: Halving | None, num_trials: int) -> tune.TuneConfig:
    """Return how Tune runs jobs, so many at a time."""
    return tune.TuneConfig(
        search_alg=jobs,
        scheduler=_Stopper(halving),
        num_samples=-1,
        max_concurrent_trials=num_trials,
        # A process that has imported torch is worth more than the trial that ran in it. But where
        # a stopped trial does not unwind in time, Tune takes its process from the next one, which
        # then ends in error, unseen by callbacks and not tried again.
        reuse_actors=halving is None,
    )


def concurrency(config: SweepConfig, workers_per_trial: int) -> int:
    """Return how many trials run at a time: as many as the cluster holds with their workers.

    Raises:
        ConfigError: It holds none.
    """
    import ray

    there = ray.cluster_resources()
    gpus = config.num_gpus + (workers_per_trial if there.get("GPU") else 0)
    needs = {"CPU": config.num_cpus + workers_per_trial, "GPU": gpus}
    rooms = [int(there.get(kind, 0) / need + 1e-9) for kind, need in needs.items() if need]
    if min(rooms) < 1:
        raise ConfigError(
            f"a trial needs {needs['CPU']:g} CPUs and {needs['GPU']:g} GPUs (its Ray Train workers "
            f"among them), and the Ray cluster has {there.get('CPU', 0):g} and "
            f"{there.get('GPU', 0):g}; lower num_cpus, num_gpus or distill.num_workers"
        )
    return min([*rooms, config.max_concurrent] if config.max_concurrent else rooms)


def _trial(given: dict[str, Any]) -> dict[str, Any]:
    """Run a job in a process of Ray; what is returned only says that it has ended."""
    import torch

    job, shared = Job.from_plain(given["job"]), Shared.from_plain(given["shared"])
    if not torch.cuda.is_available():
        torch.set_num_threads(max(1, int(given["num_cpus"])))

    def tell(step: int, losses: Mapping[str, float]) -> None:
        tune.report({_STEP: step, **{f"{_LOSS}{name}": loss for name, loss in losses.items()}})

    with last_words_kept(job, shared):
        return {_STEP: 0, "status": try_job(job, shared, tell)["status"]}


def _losses(result: Mapping[str, Any]) -> dict[str, float]:
    """Return the held-out losses that a trial reported; none where it only said that it ended."""
    return {n.removeprefix(_LOSS): v for n, v in result.items() if n.startswith(_LOSS)}


class _Jobs(Searcher):
    """Gives Tune the jobs of a source."""

    def __init__(self, source: Source, shared: Shared, num_cpus: float) -> None:
        super().__init__()
        self._source, self._num_cpus = source, num_cpus
        self._shared = shared.to_plain()

    def suggest(self, trial_id: str) -> Any:
        """Return the next job, None for now, or that there are no more."""
        job = self._source.next()
        if job is None:
            return Searcher.FINISHED if self._source.exhausted else None
        return {"job": job.to_plain(), "shared": self._shared, "num_cpus": self._num_cpus}

    def on_trial_complete(self, trial_id: str, result: Any = None, error: bool = False) -> None:
        """Learn nothing here: records are read from their files."""

    def save(self, checkpoint_path: str) -> None:
        """Save nothing: the sweep's directory has it all."""

    def restore(self, checkpoint_path: str) -> None:
        """Restore nothing."""


class _Stopper(FIFOScheduler):
    """Stops distillations that are behind; controls run to their end."""

    def __init__(self, halving: Halving | None) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self._halving = halving

    def on_trial_result(self, tune_controller: Any, trial: Any, result: dict[str, Any]) -> str:
        """Return whether a trial goes on."""
        losses = _losses(result)
        if self._halving is None or not losses:
            return TrialScheduler.CONTINUE
        job = Job.from_plain(trial.config["job"])
        stops = self._halving.stops(job, result[_STEP], losses)
        return TrialScheduler.STOP if stops else TrialScheduler.CONTINUE


class _Follower(tune.Callback):
    """Follows the trials in the process that runs the sweep."""

    def __init__(self, source: Source, shared: Shared, watch: Watch, retries: int) -> None:
        self._source, self._shared, self._watch = source, shared, watch
        self._retries = retries

    def __getstate__(self) -> dict[str, Any]:
        """Save nothing: Tune pickles what it was given, and who is told may hold locks."""
        return {}

    def on_trial_start(self, iteration: int, trials: Any, trial: Any, **info: Any) -> None:
        """Tell of a trial that is at work."""
        self._watch.started(Job.from_plain(trial.config["job"]))

    def on_trial_result(
        self, iteration: int, trials: Any, trial: Any, result: dict[str, Any], **info: Any
    ) -> None:
        """Tell of an evaluation of a distillation."""
        losses = _losses(result)
        if losses and not result.get("done"):
            self._watch.evaluated(Job.from_plain(trial.config["job"]), result[_STEP], losses)

    def on_trial_complete(self, iteration: int, trials: Any, trial: Any, **info: Any) -> None:
        """Tell of a trial that has ended: by itself, or stopped early."""
        job = Job.from_plain(trial.config["job"])
        record = Folders(Path(self._shared.root)).record(job.id)
        self._ended(record or end_stopped(job, self._shared))

    def on_trial_error(self, iteration: int, trials: Any, trial: Any, **info: Any) -> None:
        """Tell of a trial that crashed as often as it was tried."""
        job = Job.from_plain(trial.config["job"])
        record = Folders(Path(self._shared.root)).record(job.id)
        if record is None or record["status"] != FINISHED:
            said = last_words(job, self._shared)
            record = end_failed(job, self._shared, said, attempts=self._retries + 1)
        self._ended(record)

    def _ended(self, record: Record) -> None:
        self._source.told(record)
        self._watch.ended(record)
