# SPDX-License-Identifier: Apache-2.0
"""Text of an answer while it grows, token by token, up to a stop string."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Sequence

    from transformers import PreTrainedTokenizerBase

_INCOMPLETE = "\N{REPLACEMENT CHARACTER}"
"""What bytes decode to that are not yet a whole character."""


_NEIGHBOURS = 4
"""Tokens of a prompt that the text of the next one may hang on."""


class GrowingText:
    """Decodes tokens so that the pieces, put together, are the text of all of them.

    A token's text may hang on its neighbours (spaces, characters of several bytes), so new tokens
    are decoded behind some old ones, of which only as many are kept as that takes. What could be
    the beginning of a stop string is held back until it is known not to be.
    """

    def __init__(
        self,
        tokenizer: PreTrainedTokenizerBase,
        stop: Sequence[str] = (),
        prompt: Sequence[int] = (),
    ) -> None:
        """Begin with no token of the answer.

        Args:
            tokenizer: Of the model.
            stop: Strings at the first of which the text ends.
            prompt: What the answer continues: some tokenizers drop the space before a first word.
        """
        self._tokenizer, self._stop = tokenizer, tuple(stop)
        before = list(prompt[-_NEIGHBOURS:])
        if self._decode(before).endswith(_INCOMPLETE):
            before = []
        self._tokens, self._known = before, len(before)
        self._held = ""
        self.stopped = False

    def add(self, token: int) -> str:
        """Add a token; return the text that is certain now."""
        self._tokens.append(token)
        before = self._decode(self._tokens[: self._known])
        after = self._decode(self._tokens)
        if after.endswith(_INCOMPLETE):
            return ""
        new = after[len(before) :]
        self._tokens = self._tokens[self._known :]
        self._known = len(self._tokens)
        return self._up_to_stop(new)

    def end(self) -> str:
        """Return what was held back, at the end of the text."""
        before = self._decode(self._tokens[: self._known])
        rest = self._up_to_stop(self._decode(self._tokens)[len(before) :])
        held, self._held = self._held, ""
        return rest if self.stopped else rest + held

    def _decode(self, tokens: Sequence[int]) -> str:
        text = self._tokenizer.decode(
            list(tokens), skip_special_tokens=True, clean_up_tokenization_spaces=False
        )
        assert isinstance(text, str)
        return text

    def _up_to_stop(self, new: str) -> str:
        text = self._held + new
        places = [place for stop in self._stop if (place := text.find(stop)) >= 0]
        if places:
            self.stopped, self._held = True, ""
            return text[: min(places)]
        held = max((_overlap(text, stop) for stop in self._stop), default=0)
        self._held = text[len(text) - held :]
        return text[: len(text) - held]


def _overlap(text: str, stop: str) -> int:
    """Return the length of the longest end of a text that a stop string begins with."""
    longest = min(len(text), len(stop) - 1)
    return next((size for size in range(longest, 0, -1) if text.endswith(stop[:size])), 0)
