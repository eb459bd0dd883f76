# SPDX-License-Identifier: Apache-2.0
"""What a sweep refuses before anything runs, so that no mistake is found trial by trial."""

from __future__ import annotations

from dataclasses import asdict, fields
from pathlib import Path
from typing import TYPE_CHECKING, Any

from offsite_ray.architectures import empty_model
from offsite_ray.bundle import digest_file, digest_plain, fingerprint, open_weights, write_json
from offsite_ray.config import DistillConfig, EvaluateConfig, FinetuneConfig
from offsite_ray.distillation.losses import DISTILLATION_LOSSES
from offsite_ray.errors import ConfigError, StorageError
from offsite_ray.evaluation.settings import open_yardstick
from offsite_ray.finetuning.methods import finetuning_method
from offsite_ray.results import to_plain
from offsite_ray.tune.emulators import wants_text
from offsite_ray.tune.folders import read_record
from offsite_ray.tune.halving import check_proxy
from offsite_ray.tune.presets import PRESETS, without_methods
from offsite_ray.tune.space import Range, may_distil, parse_space, stage_fields
from offsite_ray.uris import without_secrets

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from transformers.configuration_utils import PretrainedConfig

    from offsite_ray.architectures import Architecture, Notice
    from offsite_ray.config import SweepConfig
    from offsite_ray.tune.folders import Folders
    from offsite_ray.tune.space import Variant

_MEASURING = (
    "model", "blocks", "text", "tasks", "task_data", "task_path", "task_limit", "seq_len",
    "batch_size", "dtype",
)  # fmt: skip
"""Fields of an evaluation that a sweep gives every job."""


_FREE_TO_CHANGE = frozenset(
    {
        "out", "space", "preset", "search", "num_points", "seeds", "baseline", "objectives",
        "privacy_weight", "early_stop", "grace_steps", "reduction_factor", "proxy",
        "max_concurrent", "num_cpus", "num_gpus", "retries", "keep_bundles", "dry_run",
    }
)  # fmt: skip
"""Settings that a sweep that goes on may change: its results stay comparable."""


def check_measuring(config: SweepConfig, model: Path, model_config: PretrainedConfig) -> None:
    """Read the texts and the tasks that every job is measured with, as an evaluation does.

    Raises:
        OffsiteError: One of them cannot be read, or the model has fewer positions.
    """
    measuring = EvaluateConfig(**{name: getattr(config, name) for name in _MEASURING})
    open_yardstick(measuring, model, model_config)


def check_same(config: SweepConfig, folders: Folders, model: Path) -> None:
    """Refuse to go on with a sweep of other settings, another model or other texts.

    Where nothing came of those settings they are replaced, and what was made for them is removed.

    Raises:
        StorageError: The results would not compare.
    """
    plain = without_secrets(to_plain(config) | {"contents": _contents(config, model)})
    before = read_record(folders.settings)
    other = None if before is None else _first_other(before, plain)
    if other is not None and folders.began:
        raise StorageError(
            f"{folders.root} is a sweep with {other}; go on with the same, or choose another --out"
        )
    if other is not None:
        folders.clear()
    write_json(folders.settings, plain)


def _first_other(before: Mapping[str, Any], now: Mapping[str, Any]) -> str | None:
    """Return in words the first setting that may not change and did; None if there is none.

    The same model or text may have another name.
    """
    held, contents = before.get("contents", {}), now["contents"]
    for name in sorted(set(now) - _FREE_TO_CHANGE - {"contents"}):
        same = name in contents and held.get(name) == contents[name]
        if same or (name not in contents and before.get(name) == now[name]):
            continue
        if before.get(name) == now[name]:
            return f"other contents of {now[name]}"
        return f"{name}={before.get(name)!r}, not {now[name]!r}"
    return None


def _contents(config: SweepConfig, model: Path) -> dict[str, list[str]]:
    """Return by setting a digest of the full model, and of each text that is one local file."""
    tasks = (entry.partition("=") for entry in config.task_data)
    return {
        "model": [digest_plain(asdict(fingerprint(model, open_weights(model), {})))],
        "private": [_content(source) for source in config.private],
        "public": [_content(source) for source in config.public],
        "text": [_content(source) for source in config.text],
        "task_data": [f"{task}={_content(file)}" for task, _, file in tasks],
    }


def _content(source: str) -> str:
    return digest_file(Path(source)) if Path(source).is_file() else source


def trainable_variants(
    config: SweepConfig, model_config: PretrainedConfig, arch: Architecture, notice: Notice
) -> list[Variant]:
    """Return the space; of a preset, without fine-tuning methods that have nothing to train.

    Raises:
        ConfigError: The space is none, or asks by itself for such a method.
    """
    plain = config.space or {}
    preset = PRESETS[config.preset].variants(arch.num_blocks) if config.preset else ()
    variants = parse_space(plain, preset)
    baseline = stage_fields("finetune", config.baseline or {}).get("method")
    asked = _methods(variants) | ({str(baseline)} if baseline is not None else set())
    refused = _untrainable(sorted(asked), model_config, arch)
    if refused and config.preset:
        variants = parse_space(plain, without_methods(preset, refused))
    for name, why in refused.items():
        if name in _methods(variants) or name == baseline:
            raise ConfigError(f"finetune.method={name} cannot be swept: {why}")
        notice(f"{config.preset} leaves out finetune.method={name}: {why}")
    return variants


def _methods(variants: Sequence[Variant]) -> set[str]:
    knobs = (variant.get("finetune.method", ()) for variant in variants)
    return {str(value) for knob in knobs if not isinstance(knob, Range) for value in knob}


def _untrainable(
    methods: Sequence[str], model_config: PretrainedConfig, arch: Architecture
) -> dict[str, str]:
    """Return the methods that have nothing to train in the blocks of a model, and why."""
    found = {}
    for name in methods:
        row = finetuning_method(name)
        model = empty_model(model_config, arch.family.auto_class)
        model.requires_grad_(False)
        config = FinetuneConfig(bundle="-", data=("-",), out="-", method=name)
        try:
            row.prepare(model, arch, range(arch.num_blocks), config)
        except ConfigError as error:
            found[name] = str(error)
    return found


def check_space(variants: Sequence[Variant], config: SweepConfig) -> None:
    """Refuse a space that does not go with what else is asked for.

    Raises:
        ConfigError: It takes public text where there is none, its workers cannot be counted, or
            trials are to be stopped that cannot be.
    """
    check_proxy(config.proxy)
    if config.early_stop and config.proxy in DISTILLATION_LOSSES:
        _check_compared(variants, config.proxy)
    if not config.public:
        _check_without_text(variants)
    workers = workers_per_trial(variants)
    if config.early_stop and workers["distill"]:
        raise ConfigError(
            f"early_stop with distill.num_workers={workers['distill']}: what trains in workers "
            "of its own cannot be stopped early; leave distill.num_workers at 0, or early_stop out"
        )


def _check_compared(variants: Sequence[Variant], proxy: str) -> None:
    """Refuse to compare distillations by a part of the loss that none of them has."""
    name = f"{proxy}_weight"
    default = {field.name: field.default for field in fields(DistillConfig)}[name]
    knobs = [v.get(f"distill.{name}", (default,)) for v in variants if may_distil(v)]
    if all(knob == (0,) for knob in knobs):
        raise ConfigError(
            f"proxy={proxy} compares nothing: no distillation of this space has a {name} but 0"
        )


def workers_per_trial(variants: Sequence[Variant]) -> dict[str, int]:
    """Return the most Ray Train workers that each training of a trial asks for.

    Raises:
        ConfigError: They are a range.
    """
    most = {"distill": 0, "finetune": 0}
    for variant in variants:
        for stage, known in most.items():
            if stage == "distill" and not may_distil(variant):
                continue
            name = f"{stage}.num_workers"
            knob = variant.get(name, ())
            if isinstance(knob, Range):
                raise ConfigError(
                    f"{name} is a range, and what a trial takes must be known before; list values"
                )
            most[stage] = max([known, *(value for value in knob if isinstance(value, int))])
    return most


def _check_without_text(variants: Sequence[Variant]) -> None:
    """Refuse a space that takes public text where there is none."""
    if any(map(may_distil, variants)):
        raise ConfigError("the space distils; give the text for it as public: [FILE]")
    for variant in variants:
        for field in ("select", "compress"):
            knob = variant.get(f"compress.{field}", ())
            for value in () if isinstance(knob, Range) else knob:
                if wants_text({field: value, "calibration": variant.get("compress.calibration")}):
                    raise ConfigError(
                        f"{field}: {value} looks at what the full model does with text; give it "
                        "some as public: [FILE]"
                    )
