# SPDX-License-Identifier: Apache-2.0
"""Checkpoints of the exact shape of real ones, with random weights, written in a stream.

    python -m benchmarks.checkpoints model opt-6.7b DIR          a full model
    python -m benchmarks.checkpoints tiny opt-6.7b DIR           the same in kilobytes
    python -m benchmarks.checkpoints adapter BUNDLE DIR          an adapter bundle of whole blocks

The benchmark of compress, plug-in and verify runs these in processes of their own.
"""

from __future__ import annotations

import sys
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Mapping, Sequence

PIECE_BYTES = 16 * 2**20


@dataclass(frozen=True, kw_only=True, slots=True)
class Checkpoint:
    """A model to write, and the split plan that it is measured with."""

    name: str
    title: str
    """What a table calls it."""
    family: str
    plan: str
    config: Mapping[str, Any]
    """Of the published model."""
    tiny: Mapping[str, Any] = field(default_factory=dict)
    """What makes a model of kilobytes of it, with as many blocks: what runs before any weights."""
    shard_bytes: int = 2 * 10**9
    """Of a file of weights, at most."""


_CHECKPOINTS = (
    Checkpoint(
        name="opt-6.7b",
        title="OPT-6.7B",
        family="opt",
        plan="2-18-2",
        config={
            "vocab_size": 50272,
            "hidden_size": 4096,
            "word_embed_proj_dim": 4096,
            "ffn_dim": 16384,
            "num_hidden_layers": 32,
            "num_attention_heads": 32,
            "max_position_embeddings": 2048,
        },
        tiny={"vocab_size": 64, "hidden_size": 32, "word_embed_proj_dim": 32, "ffn_dim": 64},
    ),
    Checkpoint(
        name="bloom-7.1b",
        title="BLOOM-7.1B",
        family="bloom",
        plan="2-18-2",
        config={"vocab_size": 250880, "hidden_size": 4096, "n_layer": 30, "n_head": 32},
        tiny={"vocab_size": 64, "hidden_size": 32},
    ),
    Checkpoint(
        name="llama-2-7b",
        title="Llama-2-7B",
        family="llama",
        plan="2-18-2",
        config={
            "vocab_size": 32000,
            "hidden_size": 4096,
            "intermediate_size": 11008,
            "num_hidden_layers": 32,
            "num_attention_heads": 32,
            "max_position_embeddings": 4096,
        },
        tiny={"vocab_size": 64, "hidden_size": 32, "intermediate_size": 64},
    ),
    Checkpoint(
        name="tiny",
        title="a tiny OPT, which only shows that the benchmark runs",
        family="opt",
        plan="1-2-1",
        config={
            "vocab_size": 512,
            "hidden_size": 64,
            "word_embed_proj_dim": 64,
            "ffn_dim": 256,
            "num_hidden_layers": 8,
            "num_attention_heads": 4,
            "max_position_embeddings": 64,
        },
        shard_bytes=200_000,
    ),
)

CHECKPOINTS = {row.name: row for row in _CHECKPOINTS}
"""What ``--shape`` names."""


def write_checkpoint(checkpoint: Checkpoint, directory: Path, *, tiny: bool = False) -> None:
    """Write a model of random weights in bf16; its directory appears once it is whole."""
    from transformers import AutoConfig

    from offsite_ray.architectures import empty_model
    from offsite_ray.bundle import TensorSpec, atomic_directory, write_model

    sizes = {**checkpoint.config, **(checkpoint.tiny if tiny else {})}
    config = AutoConfig.for_model(checkpoint.family, dtype="bfloat16", **sizes)
    model = empty_model(config)
    config.architectures = [type(model).__name__]
    tied = set(model.all_tied_weights_keys)
    specs = [
        TensorSpec(
            name=name,
            dtype="BF16",
            shape=tuple(tensor.shape),
            pieces=random_bf16(seed, tensor.numel()),
        )
        for seed, (name, tensor) in enumerate(model.state_dict().items())
        if name not in tied
    ]
    with atomic_directory(directory) as tmp:
        config.save_pretrained(str(tmp))
        write_model(tmp, specs, checkpoint.shard_bytes)


def write_random_adapter(bundle_dir: Path, out: Path) -> None:
    """Write an adapter bundle of random tensors, as full fine-tuning of a bundle leaves one."""
    from offsite_ray.adapter import write_adapter
    from offsite_ray.architectures import parameter_names
    from offsite_ray.bundle import TensorSpec, write_file
    from offsite_ray.emulator import open_bundle
    from offsite_ray.finetuning.host import host_of_bundle
    from offsite_ray.finetuning.methods import ADAPTER_FILE

    bundle = open_bundle(bundle_dir)
    host = host_of_bundle(bundle)
    trained = parameter_names(host.config, host.arch, host.weights.tensors)
    infos = [host.weights.tensors[name] for name in host.block_names if name in trained]
    specs = [
        TensorSpec(
            name=host.full_name(info.name),
            dtype=info.dtype,
            shape=info.shape,
            pieces=random_bf16(10_000 + seed, info.nbytes // 2),
        )
        for seed, info in enumerate(infos)
    ]

    def save(directory: Path) -> dict[str, str]:
        return {ADAPTER_FILE: write_file(directory / ADAPTER_FILE, specs)}

    write_adapter(bundle, out, save, {"method": "full"}, {})


def random_bf16(seed: int, count: int) -> Callable[[], Iterator[bytes]]:
    """Return what gives that many numbers in bf16, of random sign and between 1/128 and 1/64."""
    import numpy as np

    def pieces() -> Iterator[bytes]:
        generator = np.random.default_rng(seed)
        for start in range(0, count, PIECE_BYTES // 2):
            size = min(PIECE_BYTES // 2, count - start)
            bits = np.frombuffer(generator.bytes(2 * size), dtype=np.uint16)
            yield ((bits & np.uint16(0x807F)) | np.uint16(0x3C00)).tobytes()

    return pieces


def main(argv: Sequence[str]) -> None:
    """Write what the words ask for; see the module's text."""
    what, source, target = argv
    if what == "adapter":
        write_random_adapter(Path(source), Path(target))
    else:
        write_checkpoint(CHECKPOINTS[source], Path(target), tiny=what == "tiny")


if __name__ == "__main__":
    main(sys.argv[1:])
