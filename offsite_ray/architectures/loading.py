# SPDX-License-Identifier: Apache-2.0
"""Loading with stock transformers: a config, a model, a tokenizer, from a directory or the hub."""

from __future__ import annotations

import contextlib
import json
import logging
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from safetensors import safe_open

from offsite_ray.architectures.bottleneck import (
    BOTTLENECK_FILE,
    BOTTLENECK_NAME,
    BOTTLENECK_TYPE,
    load_bottlenecks,
)
from offsite_ray.architectures.detection import model_class, resolve_architecture
from offsite_ray.architectures.families import used
from offsite_ray.architectures.packed import PACKED_TYPE, unpacked_state
from offsite_ray.errors import (
    FamilyError,
    IntegrityError,
    OffsiteError,
    StorageError,
    did_you_mean,
    first_line,
)

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping, Sequence

    from transformers import PreTrainedModel, PreTrainedTokenizerBase
    from transformers.configuration_utils import PretrainedConfig

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}
"""What ``--dtype`` names."""

_WRAPPED = (BOTTLENECK_TYPE, PACKED_TYPE)
"""Model types that only this package knows: stock models with something about their weights."""

_HUB_FILES = ("*.safetensors", "*.json", "*.txt", "*.model", "*.jinja")


def model_directory(name: str | Path, files: Sequence[str] = _HUB_FILES) -> Path:
    """Return the directory of a model: a local one, or a snapshot of a hub repository.

    Args:
        name: A directory, or the name of a repository.
        files: What is wanted of a repository.

    Raises:
        StorageError: There is neither.
    """
    path = Path(name)
    if path.is_dir():
        return path
    if str(name).count("/") != 1 or path.is_absolute() or str(name).startswith("."):
        raise StorageError(f"{name} is no directory; give the directory of a model")
    from huggingface_hub import snapshot_download

    try:
        return Path(snapshot_download(str(name), allow_patterns=list(files)))
    except Exception as error:
        raise StorageError(
            f"{name} is no directory, and cannot be had from the model hub: {first_line(error)}"
        ) from error


def load_config(directory: str | Path) -> PretrainedConfig:
    """Return the config of a model directory (of a wrapped one: its base model's).

    Raises:
        StorageError: There is no such directory, or no ``config.json`` in it.
        FamilyError: transformers does not know the model type.
    """
    from transformers import CONFIG_MAPPING

    values = config_values(directory)
    if values.get("model_type") in _WRAPPED:
        base = values.get("base_config")
        if not isinstance(base, dict):
            raise IntegrityError(f"{directory}/config.json lacks the base_config of what it wraps")
        values = base
    if "auto_map" in values:
        raise FamilyError(
            f"{directory} brings its own code (auto_map), which is never run; "
            "use a model that transformers itself has"
        )
    model_type = str(values.get("model_type"))
    if model_type not in CONFIG_MAPPING:
        raise FamilyError(
            f"{directory}/config.json has the model type {model_type!r}, which transformers does "
            f"not know{did_you_mean(model_type, CONFIG_MAPPING)}"
        )
    try:
        with quiet_transformers():
            return CONFIG_MAPPING[model_type].from_dict(values)
    except Exception as error:
        raise FamilyError(
            f"{directory}/config.json is refused by transformers: {first_line(error)}"
        ) from error


def config_values(directory: str | Path) -> dict[str, Any]:
    """Return what ``config.json`` holds; raise :class:`StorageError` where there is none."""
    file = Path(directory) / "config.json"
    if not Path(directory).is_dir():
        raise StorageError(f"{directory} is no directory; give the directory of a model or bundle")
    if not file.is_file():
        raise StorageError(f"{directory} has no config.json, so it is no model directory")
    try:
        values = json.loads(file.read_text(encoding="utf-8"))
    except (ValueError, OSError, RecursionError) as error:
        raise IntegrityError(f"{file} is no JSON: {error}") from error
    if not isinstance(values, dict):
        raise IntegrityError(f"{file} holds no JSON object")
    return values


def load_model(
    directory: str | Path,
    *,
    dtype: torch.dtype | None = None,
    device: str | torch.device | None = None,
    auto_class: str = "AutoModelForCausalLM",
    dropout: bool = True,
) -> PreTrainedModel:
    """Return the model of a directory in evaluation mode, every tensor accounted for.

    Args:
        directory: A full model, an emulator bundle or a plugged-in model.
        dtype: Of the weights in memory; by default as stored.
        device: Where to put it; by default as transformers does (CPU).
        auto_class: The class of transformers that has the right head.
        dropout: False sets every dropout rate to zero, for training that can be repeated.

    Raises:
        IntegrityError: A tensor is missing, unknown, truncated, or of the wrong shape.
    """
    config = load_config(directory)
    if not dropout:
        drop_dropout(config)
    cls, values = model_class(config, auto_class), config_values(directory)
    try:
        with quiet_transformers():
            model, info = cls.from_pretrained(
                **_source(Path(directory), values),
                config=config,
                dtype=dtype or "auto",
                use_safetensors=True,
                local_files_only=True,
                ignore_mismatched_sizes=True,  # reported below, by name
                output_loading_info=True,
            )
    except OffsiteError:
        raise
    except Exception as error:
        raise IntegrityError(
            f"the weights in {directory} cannot be loaded: {first_line(error)}"
        ) from error
    info["unexpected_keys"] = used(config.model_type, info["unexpected_keys"])
    for problem in ("missing_keys", "unexpected_keys", "mismatched_keys"):
        if info[problem]:
            example = sorted(map(str, info[problem]))[0]
            raise IntegrityError(
                f"{directory} does not fit its config.json: {problem.replace('_', ' ')}, "
                f"e.g. {example}"
            )
    if values.get("model_type") == BOTTLENECK_TYPE:
        _add_bottlenecks(model, config, values.get("blocks"), Path(directory) / BOTTLENECK_FILE)
    model.eval()
    return model if device is None else model.to(device)  # type: ignore[no-any-return]


def _source(directory: Path, values: Mapping[str, Any]) -> dict[str, Any]:
    """Return where ``from_pretrained`` is to take the weights from, as its arguments."""
    if values.get("model_type") != PACKED_TYPE:
        return {"pretrained_model_name_or_path": str(directory)}
    from transformers import GenerationConfig

    source: dict[str, Any] = {
        "pretrained_model_name_or_path": None,
        "state_dict": unpacked_state(directory, values),
    }
    if (directory / "generation_config.json").is_file():
        source["generation_config"] = GenerationConfig.from_pretrained(str(directory))
    return source


def _add_bottlenecks(
    model: PreTrainedModel, config: PretrainedConfig, blocks: str | None, file: Path
) -> None:
    """Attach to a model in place what lies beside its weights, every tensor accounted for."""
    try:
        with safe_open(file, "pt") as saved:
            names = set(saved.keys())
        load_bottlenecks(model, resolve_architecture(config, blocks), file)
    except Exception as error:
        raise IntegrityError(f"{file} cannot be loaded: {first_line(error)}") from error
    if odd := names ^ {n for n, _ in model.named_parameters() if f".{BOTTLENECK_NAME}." in n}:
        raise IntegrityError(f"{file}: tensor {min(odd)!r} is missing or of no bottleneck")


def drop_dropout(config: PretrainedConfig) -> None:
    """Set every dropout rate of a config to zero, in place."""
    for name, value in config.to_dict().items():
        if isinstance(value, float) and ("drop" in name):
            setattr(config, name, 0.0)


def load_tokenizer(directory: str | Path) -> PreTrainedTokenizerBase:
    """Return the tokenizer of a model directory.

    Raises:
        StorageError: The directory has none that transformers can read.
    """
    from transformers import AutoTokenizer

    if not Path(directory).is_dir():
        raise StorageError(f"{directory} is no directory; give one with a tokenizer in it")
    try:
        with quiet_transformers():
            tokenizer = AutoTokenizer.from_pretrained(
                str(directory),
                config=_base_config(directory),
                local_files_only=True,
                trust_remote_code=False,
            )
    except Exception as error:
        raise StorageError(f"{directory} has no usable tokenizer: {first_line(error)}") from error
    if tokenizer.pad_token_id is None:
        tokenizer.pad_token = tokenizer.eos_token
    return tokenizer


def _base_config(directory: str | Path) -> PretrainedConfig | None:
    """Return the config of what a directory wraps; None where transformers reads it itself.

    For some model types it has a tokenizer class of its own, whatever the tokenizer's files say.
    """
    if not (Path(directory) / "config.json").is_file():
        return None
    wrapped = config_values(directory).get("model_type") in _WRAPPED
    return load_config(directory) if wrapped else None


@contextlib.contextmanager
def quiet_transformers() -> Iterator[None]:
    """Keep transformers' loading reports and bars to itself: what is wrong is raised instead."""
    from transformers.utils import logging as hf_logging

    logger = logging.getLogger("transformers")
    level, bar = logger.level, hf_logging.is_progress_bar_enabled()
    logger.setLevel(logging.CRITICAL)
    hf_logging.disable_progress_bar()
    try:
        yield
    finally:
        logger.setLevel(level)
        if bar:
            hf_logging.enable_progress_bar()
