# SPDX-License-Identifier: Apache-2.0
"""Model families: the sole owner of block lists, per-block config lists and block counts."""

from offsite_ray.architectures.detection import (
    Architecture,
    Notice,
    empty_model,
    get_blocks,
    model_class,
    resolve_architecture,
    set_blocks,
)
from offsite_ray.architectures.families import FAMILIES, Family
from offsite_ray.architectures.harmonizer import harmonizer, in_full
from offsite_ray.architectures.linear import feed_forward, linear_layers, linear_weights
from offsite_ray.architectures.loading import (
    DTYPES,
    config_values,
    drop_dropout,
    load_config,
    load_model,
    load_tokenizer,
    model_directory,
    quiet_transformers,
)
from offsite_ray.architectures.separation import check_separable
from offsite_ray.architectures.skeleton import BlockCall, Skeleton
from offsite_ray.architectures.standin import StandIn
from offsite_ray.architectures.surgery import (
    block_kinds,
    block_model,
    block_parameters,
    disk_state,
    kept_config,
    parameter_names,
    stored_alone,
)

__all__ = [
    "DTYPES",
    "FAMILIES",
    "Architecture",
    "BlockCall",
    "Family",
    "Notice",
    "Skeleton",
    "StandIn",
    "block_kinds",
    "block_model",
    "block_parameters",
    "check_separable",
    "config_values",
    "disk_state",
    "drop_dropout",
    "empty_model",
    "feed_forward",
    "get_blocks",
    "harmonizer",
    "in_full",
    "kept_config",
    "linear_layers",
    "linear_weights",
    "load_config",
    "load_model",
    "load_tokenizer",
    "model_class",
    "model_directory",
    "parameter_names",
    "quiet_transformers",
    "resolve_architecture",
    "set_blocks",
    "stored_alone",
]
