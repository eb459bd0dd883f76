# SPDX-License-Identifier: Apache-2.0
"""The head of a causal language model, a few tokens at a time.

Logits are by far the largest tensor of a step: vocabulary times tokens. Here they exist for one
piece of the tokens only, in the forward pass, and so does their gradient: what is kept for the
backward pass is the gradient of the hidden states, as small as these. This needs a head that does
not train, and losses that are sums over tokens.
"""

from __future__ import annotations

import copy
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from offsite_ray.data import IGNORED
from offsite_ray.training.devices import device_type

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

_CPU_PIECE = 2**24
"""Logits that exist at once, 64 MiB in float32: the head's weights are read anew for each piece."""
_GPU_PIECE = 2**25
"""The same on a GPU: 128 MiB in float32."""


class Head:
    """What a causal language model does with the hidden states behind its last norm.

    The model's own code runs, on a copy of the model whose base is replaced by given hidden states;
    so scaled and soft-capped logits come out as the model makes them.
    """

    def __init__(self, language_model: Any) -> None:
        """Take a model of transformers; its modules are shared, not copied."""
        self._given = _Given()
        self._model = copy.copy(language_model)
        modules = dict(language_model._modules)
        modules[language_model.base_model_prefix] = self._given
        self._model._modules = modules
        self.vocab_size: int = language_model.config.get_text_config().vocab_size

    def __call__(self, hidden: Tensor) -> Tensor:
        """Return the logits ``(N, V)`` of hidden states ``(N, H)``."""
        self._given.hidden = hidden[None]
        try:
            # Not through __call__: hooks on the whole model are not for this part of it.
            output = type(self._model).forward(self._model, use_cache=False)
        finally:
            self._given.hidden = None
        logits: Tensor = output.logits
        return logits[0]


class _Given(nn.Module):
    """Stands where a base model would be, and returns what it was given."""

    hidden: Tensor | None = None

    @property
    def decoder(self) -> _Given:
        """Where a model asks its base for the decoder: this too."""
        return self

    def forward(self, *_: Any, **__: Any) -> Any:
        """Return the hidden states as a base model does."""
        return _Output(self.hidden)


class _Output(tuple[Any, ...]):
    """A base model's output: the hidden states, and None for whatever else is asked of it."""

    def __new__(cls, hidden: Tensor | None) -> _Output:
        return super().__new__(cls, (hidden,))

    @property
    def last_hidden_state(self) -> Tensor | None:
        hidden: Tensor | None = self[0]
        return hidden

    def __getattr__(self, name: str) -> None:
        if name.startswith("__"):
            raise AttributeError(name)


def next_tokens(labels: Tensor) -> Tensor:
    """Return what is to be predicted at each position ``(B, T)``: -100 where nothing is."""
    return functional.pad(labels[:, 1:], (0, 1), value=IGNORED)


def head_losses(
    head: Head,
    hidden: Tensor,
    teacher: Tensor | None,
    targets: Tensor,
    losses: Mapping[str, Callable[[Tensor, Tensor | None, Tensor], Tensor]],
) -> dict[str, Tensor]:
    """Return losses on the logits, each a sum over tokens, without the logits of all tokens.

    Args:
        head: Of a model whose head does not train.
        hidden: ``(B, T, H)``, behind the last norm.
        teacher: ``(B, T, H)`` or None: what the teacher's logits are made of, without gradient.
        targets: ``(B, T)`` from :func:`next_tokens`.
        losses: Name to ``(logits (N, V) float32, teacher's or None, targets (N,)) -> sum``.

    Returns:
        Name to 0-d float32; the gradient goes to ``hidden``.
    """
    flat = hidden.flatten(0, 1)
    frozen = None if teacher is None else teacher.detach().flatten(0, 1)
    sums = _HeadLosses.apply(  # type: ignore[no-untyped-call]
        flat, frozen, targets.flatten(), head, tuple(losses.values())
    )
    return dict(zip(losses, sums, strict=True))


class _HeadLosses(torch.autograd.Function):
    """Sums of losses over pieces; each piece's gradient is taken at once, while its logits live."""

    @staticmethod
    def forward(
        ctx: Any,
        hidden: Tensor,
        teacher: Tensor | None,
        targets: Tensor,
        head: Head,
        losses: tuple[Callable[[Tensor, Tensor | None, Tensor], Tensor], ...],
    ) -> tuple[Tensor, ...]:
        trains = ctx.needs_input_grad[0]
        sums = [hidden.new_zeros((), dtype=torch.float32) for _ in losses]
        grads = [torch.empty_like(hidden) for _ in losses] if trains else []
        rows = _rows(hidden, head, teacher)
        for begin in range(0, len(hidden), rows):
            part = slice(begin, begin + rows)
            other = None if teacher is None else head(teacher[part]).float()
            piece = hidden[part].detach().requires_grad_(trains)
            with torch.set_grad_enabled(trains):
                logits = head(piece).float()
                values = [loss(logits, other, targets[part]) for loss in losses]
            for i, value in enumerate(values):
                sums[i] += value.detach()
                if trains:
                    last = i + 1 == len(values)
                    (grad,) = torch.autograd.grad(value, piece, retain_graph=not last)
                    grads[i][part] = grad
        ctx.save_for_backward(*grads)
        return tuple(sums)

    @staticmethod
    def backward(ctx: Any, *outer: Tensor) -> tuple[Tensor | None, ...]:
        total: Tensor | None = None
        for scale, grad in zip(outer, ctx.saved_tensors, strict=True):
            part = grad * scale.to(grad.dtype)
            total = part if total is None else total.add_(part)
        return total, None, None, None, None


def _rows(hidden: Tensor, head: Head, teacher: Tensor | None) -> int:
    """Return how many tokens a piece has; the same on every worker for the same shapes."""
    elements = _CPU_PIECE if device_type(hidden) == "cpu" else _GPU_PIECE
    columns = head.vocab_size * (1 if teacher is None else 2)
    return max(1, elements // columns)
