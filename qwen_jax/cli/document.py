"""One document and the questions about it: which text is prefilled once, and what stands behind it for each question."""

from __future__ import annotations

import dataclasses
from typing import TYPE_CHECKING

from qwen_jax.errors import QwenJaxError

if TYPE_CHECKING:
    from qwen_jax.context import Document
    from qwen_jax.tokenizer import Tokenizer

# Stand-ins that no template changes, and that no template holds.
_DOCUMENT, _QUESTION = "QWENJAXDOCUMENT", "QWENJAXQUESTION"
_BETWEEN = "\n\n"


@dataclasses.dataclass(frozen=True)
class Frame:
    """A prompt with two holes: `before` DOCUMENT `between` QUESTION `after`."""

    before: str = ""
    between: str = ""
    after: str = ""

    def document(self, text: str) -> str:
        """What is prefilled once."""
        return self.before + text + self.between

    def question(self, text: str) -> str:
        """What stands behind it; blanks around a question would change where tokens end, and are dropped in a chat."""
        return text if self == RAW else text.strip() + self.after


RAW = Frame()


def chat_frame(tokenizer: Tokenizer) -> Frame:
    """The frame of one user message made of a document, an empty line and a question, as the chat template renders it.

    The seam lies behind the empty line, where Qwen's tokenizer always ends a token if the question starts with a
    letter: document and question tokenized apart give the tokens of the whole.

    Raises:
        QwenJaxError: no chat template, or one that does not show the message once and whole.
    """
    text = tokenizer.apply_chat_template(
        [{"role": "user", "content": _DOCUMENT + _BETWEEN + _QUESTION}], add_generation_prompt=True
    )
    before, _, rest = text.partition(_DOCUMENT)
    between, _, after = rest.partition(_QUESTION)
    if text != before + _DOCUMENT + between + _QUESTION + after or _QUESTION in after or _DOCUMENT in after:
        raise QwenJaxError(
            "the chat template does not show a message once and whole, so it cannot be cut at the question: use --raw"
        )
    return Frame(before, between, after)


def frame_of(document: Document, tokenizer: Tokenizer, frame: Frame) -> Frame:
    """The frame a saved document was made in, `frame` or RAW, told by how it begins."""
    head = document.token_ids[: len(tokenizer.encode(frame.before)) + 1].tolist()
    return frame if tokenizer.decode(head, skip_special=False).startswith(frame.before) else RAW
