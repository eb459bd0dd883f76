# SPDX-License-Identifier: Apache-2.0
"""The verbs, in the order of the loop. What a verb needs is imported when it runs, not before."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from offsite_ray import config as configs
from offsite_ray.cli.arguments import parse
from offsite_ray.cli.output import Outcome
from offsite_ray.cli.progress import tell
from offsite_ray.cli.recording import preparing_report, sweep_watch, training_report
from offsite_ray.cli.verb import Verb
from offsite_ray.errors import ConfigError, unknown_name
from offsite_ray.results import to_plain
from offsite_ray.uris import shown

if TYPE_CHECKING:
    from collections.abc import Callable

    from offsite_ray.results import Report


def _compress(config: configs.CompressConfig) -> Outcome:
    from offsite_ray.emulator import compress

    return Outcome(plain=to_plain(compress(config, tell)))


def _unpack(config: configs.UnpackConfig) -> Outcome:
    from offsite_ray.emulator import unpack

    return Outcome(plain=to_plain(unpack(config)))


def _prepare(config: configs.PrepareConfig) -> Outcome:
    from offsite_ray.data import prepare

    with preparing_report(config.num_workers) as report:
        result = prepare(config, tell, write_parts=_write_parts(config), report=report)
    return Outcome(plain=to_plain(result))


def _write_parts(config: configs.PrepareConfig) -> Callable[..., Any]:
    """Return what writes the parts of a text: this process, or the workers of Ray Data."""
    if config.num_workers == 0:
        from offsite_ray.data import write_here

        return write_here
    from offsite_ray.prepare import write_on_ray

    return partial(write_on_ray, num_workers=config.num_workers)


def _distill(config: configs.DistillConfig) -> Outcome:
    if config.dry_run:
        from offsite_ray.estimate import dry_run

        return Outcome(plain=to_plain(dry_run(config, notice=tell)))
    from offsite_ray.distillation import distill

    with training_report("distill", config) as report:
        result = distill(config, _fit(config), report, tell, _fill(config, report))
    return Outcome(plain=to_plain(result))


def _finetune(config: configs.FinetuneConfig) -> Outcome:
    from offsite_ray.finetuning import finetune

    with training_report("finetune", config) as report:
        result = finetune(config, _fit(config), report, tell)
    return Outcome(plain=to_plain(result))


def _fit(config: configs.TrainingConfig) -> Callable[..., Any]:
    """Return what runs the training: this process, or the workers of Ray Train."""
    if config.num_workers == 0:
        from offsite_ray.training import run_here

        return run_here
    from offsite_ray.train import run_on_ray

    return run_on_ray


def _fill(config: configs.DistillConfig, report: Report) -> Callable[..., Any]:
    """Return what writes a teacher cache: this process, or Ray's actors."""
    if config.num_workers == 0:
        from offsite_ray.distillation import fill_here

        return fill_here
    from offsite_ray.train import fill_on_ray

    return partial(fill_on_ray, report=report)


def _plug_in(config: configs.PlugInConfig) -> Outcome:
    from offsite_ray.plug_in import plug_in

    return Outcome(plain=to_plain(plug_in(config, tell)))


def _evaluate(config: configs.EvaluateConfig) -> Outcome:
    from offsite_ray.evaluation import evaluate
    from offsite_ray.report import terminal_table, write_report
    from offsite_ray.storage import replaced_files

    result = evaluate(config, tell)
    if config.report is not None:
        title = f"Offsite-tuning of {Path(shown(config.model)).resolve().name}"
        with replaced_files(config.report) as folder:
            page, _ = write_report(folder, result, title=title)
        tell(f"wrote {shown(config.report).rstrip('/')}/{page.name}")
    return Outcome(plain=result.to_json(), table=terminal_table(result))


def _sweep(config: configs.SweepConfig) -> Outcome:
    from offsite_ray.tune import dry_run, sweep

    if config.dry_run:
        return Outcome(plain=to_plain(dry_run(config, tell)))
    with sweep_watch() as watching:
        result = sweep(config, tell, watching)
    return Outcome(plain=to_plain(result))


def _serve(config: configs.ServeConfig) -> Outcome:
    from offsite_ray.cli.serving import serve

    return serve(config, tell)


def _submit(config: configs.SubmitConfig) -> Outcome:
    from offsite_ray.cli.submitting import ON_JOBS, run_as_job

    if config.verb in ON_JOBS:
        return ON_JOBS[config.verb](config, tell)
    if config.verb not in _AS_JOBS:
        raise ConfigError(unknown_name("verb to submit", config.verb, [*_AS_JOBS, *ON_JOBS]))
    words = ["--config", config.recipe or "", *config.words]
    asked = parse(VERBS[config.verb], words, VERBS).config
    return run_as_job(config, to_plain(asked), tell)


def _runs(config: configs.RunsConfig) -> Outcome:
    from offsite_ray.cli.listing import listed

    return listed(config)


def _estimate(config: configs.EstimateConfig) -> Outcome:
    from offsite_ray.estimate import estimate, estimate_tables

    result = estimate(config, tell)
    return Outcome(plain=to_plain(result), table=estimate_tables(result, config))


def _inspect(config: configs.InspectConfig) -> Outcome:
    from offsite_ray.inspection import inspect_path

    return Outcome(plain=to_plain(inspect_path(config.path, config.blocks)))


def _verify(config: configs.VerifyConfig) -> Outcome:
    from offsite_ray.inspection import verify

    return Outcome(plain=to_plain(verify(config)))


def _doctor(config: configs.DoctorConfig) -> Outcome:
    from offsite_ray.cli.doctoring import doctor

    return doctor(config, tell)


def _demo(config: configs.DemoConfig) -> Outcome:
    from offsite_ray.demo.run import run_demo
    from offsite_ray.report import terminal_table

    result = run_demo(config, tell)
    plain = {**to_plain(result), "evaluation": result.evaluation.to_json()}
    return Outcome(plain=plain, table=terminal_table(result.evaluation))


VERBS: dict[str, Verb] = {
    verb.name: verb
    for verb in (
        Verb(
            "compress",
            configs.CompressConfig,
            "make an emulator bundle out of a full model",
            _compress,
        ),
        Verb(
            "unpack",
            configs.UnpackConfig,
            "write a packed emulator bundle as a stock model",
            _unpack,
        ),
        Verb(
            "prepare",
            configs.PrepareConfig,
            "tokenise text and pack it into blocks, as Parquet",
            _prepare,
        ),
        Verb(
            "distill",
            configs.DistillConfig,
            "train the emulator blocks to stand in for the middle",
            _distill,
        ),
        Verb(
            "finetune",
            configs.FinetuneConfig,
            "train the adapter blocks of a bundle, or a full model as the baseline",
            _finetune,
        ),
        Verb(
            "plug-in",
            configs.PlugInConfig,
            "put an adapter bundle into the full model",
            _plug_in,
        ),
        Verb(
            "evaluate",
            configs.EvaluateConfig,
            "measure the five settings, the bound and the gaps",
            _evaluate,
        ),
        Verb(
            "sweep",
            configs.SweepConfig,
            "try many emulators beside their controls, on Ray Tune",
            _sweep,
        ),
        Verb(
            "serve",
            configs.ServeConfig,
            "serve plugged-in models to OpenAI clients, on Ray Serve",
            _serve,
        ),
        Verb(
            "submit",
            configs.SubmitConfig,
            "run a verb as a job of a Ray cluster, and see what became of it",
            _submit,
            recorded=False,
        ),
        Verb(
            "runs",
            configs.RunsConfig,
            "list runs: what became of them, what they made and took",
            _runs,
            recorded=False,
        ),
        Verb(
            "estimate",
            configs.EstimateConfig,
            "predict bytes, memory and time, before you pay for GPUs",
            _estimate,
        ),
        Verb(
            "inspect",
            configs.InspectConfig,
            "say what is in a bundle or a model",
            _inspect,
        ),
        Verb(
            "verify",
            configs.VerifyConfig,
            "check that a bundle is whole and unaltered",
            _verify,
        ),
        Verb(
            "doctor",
            configs.DoctorConfig,
            "check that a cluster, or this machine, is fit for it, and how to mend it",
            _doctor,
        ),
        Verb(
            "demo",
            configs.DemoConfig,
            "run the whole loop on this machine, without downloads",
            _demo,
        ),
    )
}
"""Name to verb."""

_AS_JOBS = [name for name in VERBS if name not in ("serve", "submit", "runs", "doctor", "demo")]
"""Those that can be submitted. What serves is deployed: ``serve deploy``; doctor has its
own --address."""
