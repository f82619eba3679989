"""The host's side of one row being answered: ids and text collected block by block, stop strings watched."""

from __future__ import annotations

import dataclasses
from typing import Literal

import numpy as np

from qwen_jax.sampling import ResolvedSampling
from qwen_jax.streaming import StopStrings
from qwen_jax.tokenizer import Tokenizer

FinishReason = Literal["eos", "stop", "length"]


@dataclasses.dataclass(frozen=True)
class Generation:
    """One answer.

    Attributes:
        text: the answer without special tokens and without the stop string; "" when there is no tokenizer.
        token_ids: the sampled tokens, an end token included.
        finish_reason: "eos", "stop" (a stop string) or "length".
        prompt_tokens: tokens of the prompt, its prefix included.
    """

    text: str
    token_ids: list[int]
    finish_reason: FinishReason
    prompt_tokens: int


class Answer:
    """Takes a row's tokens as they come and turns them into text that is safe to show.

    Attributes:
        limit: most tokens to sample.
        token_ids: sampled so far.
        done: the row needs no more tokens.
    """

    def __init__(
        self, setting: ResolvedSampling, limit: int, prompt_tokens: int, tokenizer: Tokenizer | None
    ):
        self._eos = frozenset(setting.eos_token_ids)
        self.limit, self._prompt_tokens = limit, prompt_tokens
        self._stream = tokenizer.stream() if tokenizer else None
        self._stops = StopStrings(setting.stop)
        self._text: list[str] = []
        self._reason: FinishReason | None = None
        self.token_ids: list[int] = []

    @property
    def done(self) -> bool:
        return self._reason is not None

    def push(self, ids: np.ndarray) -> str:
        """Takes the next sampled ids and returns the text that can be shown now; ids after the end are dropped."""
        shown = ""
        for token in ids.tolist():
            if self.done:
                break
            self.token_ids.append(token)
            if self._stream:
                shown += self._stops.push(self._stream.push([token]))
            if self._stops.hit is not None:
                self._reason = "stop"
            elif token in self._eos:
                self._reason = "eos"
            elif len(self.token_ids) >= self.limit:
                self._reason = "length"
        if self._reason in ("eos", "length") and self._stream:
            shown += self._stops.push(self._stream.flush())
            shown += self._stops.flush()
        self._text.append(shown)
        return shown

    def result(self) -> Generation:
        """The finished answer."""
        assert self._reason is not None, "the row is still being answered"
        return Generation("".join(self._text), self.token_ids, self._reason, self._prompt_tokens)
