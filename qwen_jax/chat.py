"""A conversation that continues from its cache: each turn prefills only what is new."""

from __future__ import annotations

from collections.abc import Generator, Iterator

import numpy as np

from qwen_jax.answer import Generation
from qwen_jax.llm import LLM
from qwen_jax.sampling import SamplingParams

Message = dict[str, str]


class Chat:
    """A conversation through the checkpoint's chat template.

    The template is rendered anew each turn; the longest common beginning with what the cache holds is kept, the rest is
    prefilled. So a template that rewrites earlier turns costs time, never correctness.

    Attributes:
        messages: the turns so far, {"role", "content"} each.
    """

    def __init__(self, llm: LLM, system: str | None = None):
        """Starts empty, or with a system message.

        Raises:
            QwenJaxError: the checkpoint has no tokenizer or no chat template.
        """
        self._llm = llm
        self.messages: list[Message] = [] if system is None else [{"role": "system", "content": system}]
        self._context = llm.new_context()
        llm.render([*self.messages, {"role": "user", "content": ""}])

    def send(self, text: str, params: SamplingParams | None = None) -> Generation:
        """The answer to the next user message; the conversation grows by both turns. Raises what `LLM.generate` raises."""
        turn = self._turn(text, params)
        while True:
            try:
                next(turn)
            except StopIteration as end:
                return end.value

    def stream(self, text: str, params: SamplingParams | None = None) -> Iterator[str]:
        """Like `send`, yielding the answer as it grows. A turn that is abandoned half-way leaves the conversation as it was."""
        yield from self._turn(text, params)

    def _turn(self, text: str, params: SamplingParams | None) -> Generator[str, None, Generation]:
        messages = [*self.messages, {"role": "user", "content": text}]
        ids = self._llm.token_ids(self._llm.render(messages))
        if self._context.lost:
            self._context = self._llm.new_context()
        held = self._context.token_ids[: len(ids) - 1]  # one token at least must run, to have logits
        different = np.flatnonzero(held != ids[: len(held)])
        self._context.token_ids = held[: different[0]] if len(different) else held
        answer = yield from self._llm.run_context(self._context, ids[len(self._context) :], params)
        # The newest token was sampled, never run: it is not in the cache.
        self._context.token_ids = np.concatenate([ids, np.array(answer.token_ids[:-1], np.int32)])
        self.messages = [*messages, {"role": "assistant", "content": answer.text}]
        return answer
