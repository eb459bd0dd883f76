# SPDX-License-Identifier: Apache-2.0
"""Configurations of the verbs that make artefacts or look into them, and of the demo."""

from __future__ import annotations

from dataclasses import dataclass

from offsite_ray.config.ranges import check_least
from offsite_ray.errors import ConfigError


@dataclass(frozen=True, kw_only=True, slots=True)
class CompressConfig:
    """Make an emulator bundle out of a full model."""

    model: str
    """Directory of the full model, or its name on the hub."""
    plan: str
    """Split plan: '2-8-2', 'adapter=0,1,30,31 keep=8', 'spread=4 keep=8', or every index, as
    'adapter=0,1,30,31 emulator=2,5-9'."""
    out: str
    """Directory to write the emulator bundle to."""
    select: str = "uniform"
    """How the kept blocks of a plan that only numbers them are chosen: 'uniform', 'tail', or with
    `calibration` 'block_influence', 'angular', 'cka_cluster', 'cka_cluster_shared', 'greedy' or
    'layer_replace'."""
    calibration: tuple[str, ...] = ()
    """Text or prepared data for a method that looks at what the full model does with it."""
    calibration_sequences: int = 128
    """Sequences of it, drawn by the seed."""
    calibration_seq_len: int | None = None
    """Tokens in each; by default as many as the model takes, up to 1024."""
    harmonizer_rank: int = 16
    """Inner channels of what `--select layer_replace` puts in the place of a dropped block."""
    harmonizer_steps: int = 200
    """Training steps of these."""
    compress: str = "none"
    """What becomes of the matrices of the kept blocks: 'prune:0.5', 'prune:2:4', 'quantize:8',
    'low_rank:0.5', or with `calibration` 'low_rank_aware:0.5' and 'gradient_preserving:0.5:1';
    several are joined by '+', in order."""
    blocks: str | None = None
    """Path of the block list in a model whose family is in no table, e.g. 'model.layers'."""
    seed: int = 0
    """Seed of what is drawn: the sequences of the calibration, and harmonizers."""

    def __post_init__(self) -> None:
        """Check ranges; raise :class:`ConfigError`."""
        check_least(self, 1, "calibration_sequences", "harmonizer_rank", "harmonizer_steps")
        check_least(self, 2, "calibration_seq_len")


@dataclass(frozen=True, kw_only=True, slots=True)
class UnpackConfig:
    """Write a packed emulator bundle as a stock model."""

    bundle: str
    """Emulator bundle whose matrices are packed (`compress --compress quantize:8`)."""
    out: str
    """Directory to write the unpacked bundle to."""


@dataclass(frozen=True, kw_only=True, slots=True)
class PrepareConfig:
    """Tokenise text and pack it into blocks of equal length, as Parquet."""

    tokenizer: str
    """Directory of the tokenizer: a model or a bundle."""
    text: tuple[str, ...]
    """Files (.txt, .jsonl, .parquet), directories of them, or the name of a dataset."""
    out: str
    """Directory to write the prepared data to; like `text`, a path or a URI (s3://, gs://)."""
    block_size: int = 512
    """Tokens in a block."""
    seed: int | None = None
    """Seed of a random order of the documents; by default they stay as they are."""
    num_workers: int = 0
    """Ray Data workers; 0 prepares in this process, without Ray."""

    def __post_init__(self) -> None:
        """Check ranges; raise :class:`ConfigError`."""
        if self.seed is not None and not 0 <= self.seed < 2**32:
            raise ConfigError(f"seed={self.seed} must be at least 0 and below 2**32")
        if self.num_workers < 0:
            raise ConfigError(f"num_workers={self.num_workers} must be 0 (no Ray) or more")


@dataclass(frozen=True, kw_only=True, slots=True)
class PlugInConfig:
    """Put an adapter bundle into the full model."""

    model: str
    """Directory of the full model, or its name on the hub."""
    adapter: str
    """Adapter bundle that came back from the data owner."""
    out: str
    """Directory to write the plugged-in model to."""
    verbose: bool = False
    """Print a line for each replaced tensor."""


@dataclass(frozen=True, kw_only=True, slots=True)
class InspectConfig:
    """Say what is in a bundle, an adapter, a plugged-in model or a full model."""

    path: str
    """Directory to look into."""
    blocks: str | None = None
    """Path of the block list in a full model whose family is in no table."""


@dataclass(frozen=True, kw_only=True, slots=True)
class VerifyConfig:
    """Check that a bundle is whole and unaltered."""

    path: str
    """Directory to check."""
    model: str | None = None
    """Full model that the bundle must belong to."""


@dataclass(frozen=True, kw_only=True, slots=True)
class DemoConfig:
    """Run the whole loop on this machine, without downloads."""

    out: str = "demo-out"
    """Directory for every artefact and the report."""
    foundation: str | None = None
    """Full model to use; by default the one under examples/foundation/."""
    scale: float = 1.0
    """Share of the training steps to run; below 1 is quick and shows less."""
