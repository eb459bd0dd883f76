# SPDX-License-Identifier: Apache-2.0
"""The models that are measured: sizes of real ones, with random weights."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

from offsite_ray.config import CompressConfig


@dataclass(frozen=True, kw_only=True, slots=True)
class Shape:
    """A model of OPT's or GPT-2's architecture, and the split plan that it is measured with."""

    name: str
    title: str
    """What a table calls it."""
    family: Literal["opt", "gpt2"]
    plan: str
    num_blocks: int
    width: int
    ffn: int
    """Width of the feed-forward."""
    heads: int
    vocab: int = 50272
    positions: int = 2048

    @property
    def linears(self) -> tuple[tuple[int, int], ...]:
        """Inputs and outputs of a block's matrices: those that attention feeds on, then three."""
        h, f = self.width, self.ffn
        attention = ((h, h), (h, h), (h, h)) if self.family == "opt" else ((h, 3 * h),)
        return (*attention, (h, h), (h, f), (f, h))

    @property
    def block_parameters(self) -> int:
        """Matrices, their biases, and two norms."""
        return sum(i * o + o for i, o in self.linears) + 4 * self.width

    @property
    def other_parameters(self) -> int:
        """Embeddings (OPT has two positions more than it says) and last norm; the head is tied."""
        positions = self.positions + (2 if self.family == "opt" else 0)
        return (self.vocab + positions + 2) * self.width


_SHAPES = (
    Shape(
        name="opt-24x1024",
        title="OPT, 24 blocks of width 1024",
        family="opt",
        plan="2-8-2",
        num_blocks=24,
        width=1024,
        ffn=4096,
        heads=16,
    ),
    Shape(
        name="opt-1.3b",
        title="OPT-1.3B",
        family="opt",
        plan="2-8-2",
        num_blocks=24,
        width=2048,
        ffn=8192,
        heads=32,
    ),
    Shape(
        name="opt-6.7b",
        title="OPT-6.7B",
        family="opt",
        plan="2-18-2",
        num_blocks=32,
        width=4096,
        ffn=16384,
        heads=32,
    ),
    Shape(
        name="opt-24x512",
        title="OPT, 24 blocks of width 512",
        family="opt",
        plan="2-8-2",
        num_blocks=24,
        width=512,
        ffn=2048,
        heads=8,
    ),
    Shape(
        name="opt-8x256",
        title="OPT, 8 blocks of width 256",
        family="opt",
        plan="1-2-1",
        num_blocks=8,
        width=256,
        ffn=1024,
        heads=8,
        vocab=4096,
        positions=512,
    ),
    Shape(
        name="gpt2-xl",
        title="GPT2-XL",
        family="gpt2",
        plan="2-16-2",
        num_blocks=48,
        width=1600,
        ffn=6400,
        heads=25,
        vocab=50257,
        positions=1024,
    ),
    Shape(
        name="tiny",
        title="a tiny OPT, which only shows that the benchmark runs",
        family="opt",
        plan="1-2-1",
        num_blocks=6,
        width=64,
        ffn=256,
        heads=4,
        vocab=512,
        positions=512,
    ),
)

SHAPES = {shape.name: shape for shape in _SHAPES}
"""What ``--shape`` names."""


def write_model(shape: Shape, dtype: str, model_dir: str, bundle_dir: str) -> None:
    """Write a model of random weights, stored in ``fp32`` or ``bf16``, and a bundle of it."""
    from transformers import AutoConfig, AutoModelForCausalLM

    from offsite_ray.architectures import DTYPES
    from offsite_ray.architectures.loading import quiet_transformers
    from offsite_ray.emulator import compress

    sizes: dict[str, Any] = {
        "vocab_size": shape.vocab,
        "hidden_size": shape.width,
        "num_hidden_layers": shape.num_blocks,
        "num_attention_heads": shape.heads,
        "max_position_embeddings": shape.positions,
        "tie_word_embeddings": True,
        "bos_token_id": 2,
        "eos_token_id": 2,
        "ffn_dim" if shape.family == "opt" else "n_inner": shape.ffn,
    }
    if shape.family == "opt":
        sizes["word_embed_proj_dim"] = shape.width
    config = AutoConfig.for_model(shape.family, **sizes)
    auto: Any = AutoModelForCausalLM
    with quiet_transformers():
        auto.from_config(config, dtype=DTYPES[dtype]).save_pretrained(model_dir)
    compress(CompressConfig(model=model_dir, plan=shape.plan, out=bundle_dir))
