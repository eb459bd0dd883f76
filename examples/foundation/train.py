# SPDX-License-Identifier: Apache-2.0
"""Train the small foundation model of the demo on text that every CPython carries.

    python examples/foundation/train.py --out foundation --compile    # half an hour on two cores
    python examples/foundation/train.py --out foundation --steps 50    # to see it run

The text is the standard library: its sources with their docstrings and the prose of
``pydoc_data.topics``, without its test suites. One document in 32 is held out by a hash of its
path.
The model is a Llama of 16 narrow blocks, so that there is a stack to split.
"""

from __future__ import annotations

import argparse
import json
import math
import platform
import sys
import sysconfig
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import tokenizers
import torch
import transformers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from offsite_ray.demo.texts import Document, held_out, standard_library

if TYPE_CHECKING:
    from collections.abc import Iterator

END_OF_TEXT = "<|endoftext|>"


@dataclass(frozen=True, kw_only=True, slots=True)
class Recipe:
    """Everything that decides the result, apart from the text."""

    steps: int = 1500
    """Optimizer steps."""
    batch_size: int = 32
    """Sequences in a step."""
    seq_len: int = 256
    """Tokens in a sequence."""
    vocab_size: int = 4096
    """Byte-level BPE tokens, the end of text among them."""
    num_blocks: int = 16
    """Blocks of the stack."""
    hidden_size: int = 128
    """Width of the residual stream."""
    intermediate_size: int = 352
    """Width of the gated MLP."""
    num_heads: int = 4
    """Attention heads."""
    learning_rate: float = 3e-3
    """Peak rate of AdamW, and of Muon with updates scaled to AdamW's RMS."""
    warmup_steps: int = 60
    """Steps of linear warm-up."""
    decay_fraction: float = 0.4
    """Share of the steps at the end over which the rate falls linearly to zero."""
    weight_decay: float = 0.1
    """Decoupled decay of the matrices."""
    seed: int = 0
    """Seed of initialisation and data order."""


def main() -> None:
    """Read the command line, train, write the model directory and its record."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--out", type=Path, required=True, help="model directory to write")
    parser.add_argument("--steps", type=int, default=Recipe.__dataclass_fields__["steps"].default)
    parser.add_argument("--save-every", type=int, default=250, help="steps between saves")
    parser.add_argument(
        "--compile", action="store_true", help="torch.compile; pays off after 2 min"
    )
    options = parser.parse_args()
    recipe = Recipe(steps=options.steps)
    train_text, held_out_text = held_out(standard_library(), one_in=32)
    tokenizer = train_tokenizer(train_text, recipe.vocab_size)
    tokens = {
        "train": encode(tokenizer, train_text),
        "held_out": encode(tokenizer, held_out_text),
    }
    model = build_model(recipe)
    start = time.perf_counter()

    def save(step: int) -> None:
        log = record(recipe, model, tokens, held_out_text, step, start)
        write(options.out, model, tokenizer, log)

    train(model, recipe, tokens["train"], save, options.save_every, compiled=options.compile)
    save(recipe.steps)


def train_tokenizer(documents: list[Document], vocab_size: int) -> PreTrainedTokenizerFast:
    """Return a byte-level BPE tokenizer of ``vocab_size`` tokens."""
    bpe = tokenizers.Tokenizer(tokenizers.models.BPE())
    bpe.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.decoder = tokenizers.decoders.ByteLevel()
    trainer = tokenizers.trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=[END_OF_TEXT],
        initial_alphabet=tokenizers.pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    bpe.train_from_iterator((d.text for d in documents), trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=bpe, eos_token=END_OF_TEXT, pad_token=END_OF_TEXT, bos_token=None
    )


def encode(tokenizer: PreTrainedTokenizerFast, documents: list[Document]) -> torch.Tensor:
    """Return every document's tokens in one row ``(N,)``, each document ended."""
    rows = tokenizer([d.text for d in documents], add_special_tokens=False)["input_ids"]
    return torch.tensor([token for row in rows for token in (*row, tokenizer.eos_token_id)])


def build_model(recipe: Recipe) -> LlamaForCausalLM:
    """Return the model with freshly drawn weights."""
    torch.manual_seed(recipe.seed)
    config = LlamaConfig(
        vocab_size=recipe.vocab_size,
        hidden_size=recipe.hidden_size,
        intermediate_size=recipe.intermediate_size,
        num_hidden_layers=recipe.num_blocks,
        num_attention_heads=recipe.num_heads,
        num_key_value_heads=recipe.num_heads,
        max_position_embeddings=1024,
        tie_word_embeddings=True,
        bos_token_id=0,
        eos_token_id=0,
        pad_token_id=0,
        use_cache=False,
    )
    return LlamaForCausalLM(config)


def optimizers(model: LlamaForCausalLM, recipe: Recipe) -> list[torch.optim.Optimizer]:
    """Return Muon for the matrices of the blocks and AdamW for everything else."""
    matrices = [p for p in model.model.layers.parameters() if p.ndim == 2]
    chosen = {id(p) for p in matrices}
    rest = [p for p in model.parameters() if id(p) not in chosen]
    return [
        torch.optim.Muon(
            matrices,
            lr=recipe.learning_rate,
            weight_decay=recipe.weight_decay,
            adjust_lr_fn="match_rms_adamw",
        ),
        torch.optim.AdamW(
            rest, lr=recipe.learning_rate, betas=(0.9, 0.95), weight_decay=0.0, fused=True
        ),
    ]


def rate(step: int, recipe: Recipe) -> float:
    """Return the share of the peak learning rate for a step: warm-up, constant, linear decay."""
    decay_steps = max(1, round(recipe.decay_fraction * recipe.steps))
    return min(1.0, (step + 1) / recipe.warmup_steps, (recipe.steps - step) / decay_steps)


def batches(tokens: torch.Tensor, recipe: Recipe) -> Iterator[torch.Tensor]:
    """Yield batches ``(B, T)`` without end; each epoch is cut at another offset and shuffled."""
    generator = torch.Generator().manual_seed(recipe.seed)
    while True:
        offset = int(torch.randint(recipe.seq_len, (), generator=generator))
        rows = (len(tokens) - offset) // recipe.seq_len
        blocks = tokens[offset : offset + rows * recipe.seq_len].view(rows, recipe.seq_len)
        order = torch.randperm(rows, generator=generator)
        for start in range(0, rows - recipe.batch_size + 1, recipe.batch_size):
            yield blocks[order[start : start + recipe.batch_size]]


def train(
    model: LlamaForCausalLM,
    recipe: Recipe,
    tokens: torch.Tensor,
    save: Any,
    save_every: int,
    *,
    compiled: bool,
) -> None:
    """Train ``model`` in place, in bf16 autocast with float32 weights."""
    chosen = optimizers(model, recipe)
    forward = torch.compile(model) if compiled else model
    start = time.perf_counter()
    for step, batch in zip(range(recipe.steps), batches(tokens, recipe), strict=False):
        for optimizer in chosen:
            for group in optimizer.param_groups:
                group["lr"] = recipe.learning_rate * rate(step, recipe)
        with torch.autocast("cpu", dtype=torch.bfloat16):
            loss = forward(input_ids=batch, labels=batch).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        for optimizer in chosen:
            optimizer.step()
            optimizer.zero_grad()
        if step % 20 == 0:
            speed = (step + 1) * batch.numel() / (time.perf_counter() - start)
            print(f"step {step} loss {loss.item():.3f} {speed:,.0f} tokens/s", flush=True)
        if (step + 1) % save_every == 0 and step + 1 < recipe.steps:
            save(step + 1)


@torch.no_grad()
def held_out_loss(model: LlamaForCausalLM, tokens: torch.Tensor, seq_len: int) -> float:
    """Return the mean loss in nats per token; every token but the first is predicted once."""
    total = 0.0
    for start in range(0, len(tokens) - 1, seq_len):
        window = tokens[start : start + seq_len + 1][None]
        logits = model(input_ids=window[:, :-1]).logits.float()
        total += torch.nn.functional.cross_entropy(logits[0], window[0, 1:], reduction="sum").item()
    return total / (len(tokens) - 1)


def unigram_loss(train_tokens: torch.Tensor, held_out: torch.Tensor, vocab_size: int) -> float:
    """Return the loss of the model that knows token frequencies only, in nats per token."""
    counts = torch.bincount(train_tokens, minlength=vocab_size).float() + 1
    return -(counts / counts.sum()).log()[held_out[1:]].mean().item()


def record(
    recipe: Recipe,
    model: LlamaForCausalLM,
    tokens: dict[str, torch.Tensor],
    held_out_text: list[Document],
    step: int,
    start: float,
) -> dict[str, Any]:
    """Return what was done and what came out of it, for training.json."""
    nats = held_out_loss(model, tokens["held_out"], recipe.seq_len)
    unigram = unigram_loss(tokens["train"], tokens["held_out"], recipe.vocab_size)
    num_bytes = sum(len(d.text.encode()) for d in held_out_text)
    return {
        "recipe": asdict(recipe),
        "steps_done": step,
        "tokens_seen": step * recipe.batch_size * recipe.seq_len,
        "train_tokens": len(tokens["train"]),
        "parameters": sum(p.numel() for p in model.parameters()),
        "held_out": {
            "tokens": len(tokens["held_out"]),
            "nats_per_token": nats,
            "perplexity": math.exp(nats),
            "nats_per_byte": nats * (len(tokens["held_out"]) - 1) / num_bytes,
            "unigram_perplexity": math.exp(unigram),
        },
        "minutes": (time.perf_counter() - start) / 60,
        "machine": f"{platform.machine()}, {torch.get_num_threads()} threads",
        "text": {"stdlib": sysconfig.get_paths()["stdlib"].rsplit("/", 1)[-1]},
        "versions": {
            "python": sys.version.split()[0],
            "torch": torch.__version__,
            "transformers": transformers.__version__,
            "tokenizers": tokenizers.__version__,
        },
    }


def write(
    out: Path, model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast, log: dict[str, Any]
) -> None:
    """Write the model in bf16, its tokenizer and its record; print the held-out loss."""
    # Parameters, not the state dict, which has the tied head a second time.
    state = {name: tensor.to(torch.bfloat16) for name, tensor in model.named_parameters()}
    model.save_pretrained(out, state_dict=state)
    config = json.loads((out / "config.json").read_text())
    (out / "config.json").write_text(json.dumps({**config, "dtype": "bfloat16"}, indent=2) + "\n")
    tokenizer.save_pretrained(out)
    (out / "training.json").write_text(json.dumps(log, indent=2) + "\n")
    print(f"saved {out}: {json.dumps(log['held_out'])}", flush=True)


if __name__ == "__main__":
    main()
