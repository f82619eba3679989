"""Where a prompt is cut between document and question: the two parts tokenized apart are the tokens of the whole."""

from __future__ import annotations

import pytest
import tokenizers
from tokenizers import decoders, models, pre_tokenizers, trainers

from qwen_jax.chat_template import ChatTemplate
from qwen_jax.cli.document import RAW, chat_frame
from qwen_jax.errors import QwenJaxError
from qwen_jax.tokenizer import QWEN2_WORDS, Tokenizer

DOCUMENTS = ["A river.", "ends in blanks  ", "ends in lines\n\n\n", "\tcode:\n    x = 1", "河川。"]
QUESTIONS = ["What is it?", "  why  ", "9 or 10?", "¿Qué?", "'s what", "**Who**?", "誰?"]


@pytest.fixture(scope="module")
def qwen(tmp_path_factory: pytest.TempPathFactory) -> Tokenizer:
    """Qwen's rules, and merges learnt from these very texts, so that whatever can merge across the seam does."""
    backend = tokenizers.Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(tokenizers.Regex(QWEN2_WORDS), behavior="isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    backend.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=4000, initial_alphabet=pre_tokenizers.ByteLevel.alphabet(), show_progress=False
    )
    joined = [f"{d}\n\n{q.strip()}" for d in DOCUMENTS for q in QUESTIONS]
    backend.train_from_iterator(joined, trainer)
    backend.add_special_tokens(["<|im_start|>", "<|im_end|>"])
    folder = tmp_path_factory.mktemp("qwen")
    backend.save(str(folder / "tokenizer.json"))
    return Tokenizer.from_folder(folder)


def with_template(tokenizer: Tokenizer, template: str) -> Tokenizer:
    tokenizer.chat_template = ChatTemplate({"default": template}, {}, "the test")
    return tokenizer


QWEN = (
    "{%- if messages[0]['role'] != 'system' %}{{- '<|im_start|>system\\nYou are Qwen.<|im_end|>\\n' }}{%- endif %}"
    "{%- for m in messages %}{{- '<|im_start|>' + m.role + '\\n' + m.content + '<|im_end|>' + '\\n' }}{%- endfor %}"
    "{%- if add_generation_prompt %}{{- '<|im_start|>assistant\\n' }}{%- endif %}"
)


@pytest.mark.parametrize("document", DOCUMENTS)
@pytest.mark.parametrize("question", QUESTIONS)
def test_the_seam_changes_no_token(qwen: Tokenizer, document: str, question: str) -> None:
    tokenizer = with_template(qwen, QWEN)
    frame = chat_frame(tokenizer)
    whole = tokenizer.apply_chat_template(f"{document}\n\n{question.strip()}")
    parts = frame.document(document), frame.question(question)
    assert "".join(parts) == whole
    assert len(tokenizer.encode(whole)) < len(whole) - 20  # merges happen
    assert tokenizer.encode(parts[0]) + tokenizer.encode(parts[1]) == tokenizer.encode(whole)


def test_a_template_that_trims_is_cut_all_the_same(qwen: Tokenizer) -> None:
    frame = chat_frame(with_template(qwen, "[{{ messages[0].content | trim }}]"))
    assert frame.document("a ") + frame.question(" b ") == "[a \n\nb]"


@pytest.mark.parametrize(
    "template",
    [
        "no message",
        "{{ messages[0].content }}{{ messages[0].content }}",
        "{{ messages[0].content | lower }}",
        "{{ messages[0].content[:20] }}",
    ],
)
def test_a_template_that_does_not_show_the_message_once(qwen: Tokenizer, template: str) -> None:
    with pytest.raises(QwenJaxError, match="cannot be cut at the question: use --raw"):
        chat_frame(with_template(qwen, template))


def test_raw_adds_nothing() -> None:
    assert RAW.document(" a\n") + RAW.question("\nb ") == " a\n\nb "
