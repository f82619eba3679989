"""The real Qwen2.5 vocabulary through both kinds of folder, chat templates, and what is refused."""

from __future__ import annotations

import json
import re
import unicodedata
from pathlib import Path

import numpy as np
import pytest
import qwen_vocabulary
from hypothesis import given, settings
from hypothesis import strategies as st
from qwen_vocabulary import TEXTS
from tokenizers import Tokenizer as Backend
from tokenizers import decoders, models, pre_tokenizers, processors

from qwen_jax.errors import QwenJaxError
from qwen_jax.tokenizer import Tokenizer, TokenizerError


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return qwen_vocabulary.write_tokenizer_json(tmp_path_factory.mktemp("tokenizer_json"))


@pytest.fixture(scope="module")
def old_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return qwen_vocabulary.write_vocab_and_merges(tmp_path_factory.mktemp("vocab_and_merges"))


@pytest.fixture(scope="module")
def tokenizer(folder: Path) -> Tokenizer:
    return Tokenizer.from_folder(folder)


@pytest.fixture(scope="module")
def old_tokenizer(old_folder: Path) -> Tokenizer:
    return Tokenizer.from_folder(old_folder)


def test_hello_world(tokenizer: Tokenizer, old_tokenizer: Tokenizer) -> None:
    assert tokenizer.encode("Hello, world") == [9707, 11, 1879]
    assert old_tokenizer.encode("Hello, world") == [9707, 11, 1879]


@pytest.mark.parametrize("name", TEXTS)
def test_round_trip_and_both_folders_agree(name: str, tokenizer: Tokenizer, old_tokenizer: Tokenizer) -> None:
    text = TEXTS[name]
    ids = tokenizer.encode(text)
    assert tokenizer.decode(ids) == unicodedata.normalize("NFC", text)
    assert old_tokenizer.encode(text) == ids
    assert old_tokenizer.decode(ids) == tokenizer.decode(ids)


def test_ids_agree_with_tiktoken(tokenizer: Tokenizer) -> None:
    tiktoken = pytest.importorskip("tiktoken")
    load = pytest.importorskip("tiktoken.load")
    from transformers.models.qwen2.tokenization_qwen2 import PRETOKENIZE_REGEX

    ranks = load.load_tiktoken_bpe(qwen_vocabulary.ranks_file())
    oracle = tiktoken.Encoding("qwen", pat_str=PRETOKENIZE_REGEX, mergeable_ranks=ranks, special_tokens={})
    for text in TEXTS.values():
        assert tokenizer.encode(text) == oracle.encode_ordinary(unicodedata.normalize("NFC", text))


@settings(max_examples=200, deadline=None)
@given(text=st.text(max_size=60))
def test_any_text_round_trips(tokenizer: Tokenizer, old_tokenizer: Tokenizer, text: str) -> None:
    ids = tokenizer.encode(text)
    assert tokenizer.decode(ids, skip_special=False) == unicodedata.normalize("NFC", text)
    assert old_tokenizer.encode(text) == ids


def test_special_tokens(tokenizer: Tokenizer, old_tokenizer: Tokenizer) -> None:
    for one in (tokenizer, old_tokenizer):
        assert (one.eos_id, one.bos_id, one.pad_id) == (151_645, None, 151_643)
        assert one.vocab_size == 151_665
        assert one.special_ids == set(range(151_643, 151_657))
        text = "<|im_start|>user\nhi<tool_call><|im_end|>"
        ids = one.encode(text)
        assert ids == [151_644, 872, 198, 6023, 151_657, 151_645]
        assert one.decode(ids) == "user\nhi<tool_call>"
        assert one.decode(ids, skip_special=False) == text


def test_ids_of_the_padded_vocabulary_show_nothing(tokenizer: Tokenizer) -> None:
    assert tokenizer.decode([9707, 152_000, 11]) == "Hello,"


@pytest.mark.parametrize("bad", [[-1], [1 << 40], ["a"], [1.5]])
def test_ids_that_are_none_are_refused(tokenizer: Tokenizer, bad: list) -> None:
    with pytest.raises(TokenizerError, match="token ids must be integers"):
        tokenizer.decode(bad)
    with pytest.raises(TokenizerError, match="token ids must be integers"):
        tokenizer.stream().push(bad)


def test_numpy_ids(tokenizer: Tokenizer) -> None:
    ids = np.array([9707, 11, 1879], np.int32)
    assert tokenizer.decode(ids) == tokenizer.stream().push(ids) == "Hello, world"


def test_a_batch_is_its_rows(tokenizer: Tokenizer) -> None:
    texts = list(TEXTS.values())
    assert tokenizer.encode_batch(texts) == [tokenizer.encode(text) for text in texts]


def test_a_lone_surrogate_and_what_is_no_text_are_refused(tokenizer: Tokenizer) -> None:
    with pytest.raises(TokenizerError, match="lone surrogate at character 2"):
        tokenizer.encode("ab\ud800")
    with pytest.raises(TokenizerError, match="must be a str"):
        tokenizer.encode(b"bytes")  # type: ignore[arg-type]


@pytest.mark.parametrize("unit", ["a word, 3 numbers.\n", "x", " ", "\n", "汉"])
def test_long_texts_come_back(tokenizer: Tokenizer, unit: str) -> None:
    """Words of 400,000 characters among them."""
    text = unit * (400_000 // len(unit))
    assert tokenizer.decode(tokenizer.encode(text)) == text


def test_truncation_and_padding_saved_in_the_file_are_ignored(folder: Path, tmp_path: Path) -> None:
    backend = Backend.from_file(str(folder / "tokenizer.json"))
    backend.enable_truncation(max_length=2)
    backend.enable_padding(length=50)
    backend.save(str(tmp_path / "tokenizer.json"))
    assert Tokenizer.from_folder(tmp_path).encode("Hello, world") == [9707, 11, 1879]


# Small vocabularies: each of these folders is written in full by the test that reads it.


def write_words(folder: Path, config: dict | None = None) -> Path:
    """A word-level tokenizer: the kind whose pieces cannot be turned into bytes one by one."""
    backend = Backend(models.WordLevel({"<s>": 0, "one": 1, "two": 2, "three": 3}, unk_token="<s>"))
    backend.pre_tokenizer = pre_tokenizers.Whitespace()
    backend.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 0)])
    backend.add_special_tokens(["<s>"])
    backend.save(str(folder / "tokenizer.json"))
    if config is not None:
        (folder / "tokenizer_config.json").write_text(json.dumps(config))
    return folder


def test_nothing_is_added_unless_asked(tmp_path: Path) -> None:
    tokenizer = Tokenizer.from_folder(write_words(tmp_path))
    assert tokenizer.encode("two one") == [2, 1]
    assert tokenizer.encode("two one", add_special_tokens=True) == [0, 2, 1]


def test_a_tokenizer_that_is_not_byte_level_streams_too(tmp_path: Path) -> None:
    tokenizer = Tokenizer.from_folder(write_words(tmp_path))
    ids = [0, 1, 2, 0, 3, 3, 1]
    for skip in (True, False):
        stream = tokenizer.stream(skip_special=skip)
        pieces = [stream.push([index]) for index in ids] + [stream.flush()]
        assert "".join(pieces) == tokenizer.decode(ids, skip_special=skip)


@pytest.mark.parametrize("kind", ["metaspace", "byte fallback", "wrapped byte level"])
def test_decoders_of_other_kinds_stream_too(tmp_path: Path, kind: str) -> None:
    text = "Hello  world, 漢字 and 👩‍👩 again"
    if kind == "wrapped byte level":
        pieces = [chr(0x0120) if piece == " " else piece for piece in "one two".partition(" ")]
        text, decoder = "one two", decoders.Sequence([decoders.ByteLevel()])
    elif kind == "metaspace":
        pieces = [word for word in re.split("(?=▁)", "▁" + text.replace(" ", "▁")) if word]
        decoder = decoders.Metaspace()
    else:
        pieces = [f"<0x{byte:02X}>" if byte > 127 else chr(byte) for byte in text.encode()]
        decoder = decoders.Sequence([decoders.ByteFallback(), decoders.Fuse()])
    vocabulary = {piece: index for index, piece in enumerate(dict.fromkeys(pieces))}
    backend = Backend(models.WordLevel(vocabulary, unk_token=pieces[0]))
    backend.decoder = decoder
    backend.save(str(tmp_path / "tokenizer.json"))
    tokenizer = Tokenizer.from_folder(tmp_path)
    ids = [vocabulary[piece] for piece in pieces]
    assert tokenizer.decode(ids) == text
    stream = tokenizer.stream()
    shown = ""
    for index in ids:
        shown += stream.push([index])
        assert text.startswith(shown)
    assert shown + stream.flush() == text


def test_added_tokens_of_the_config_join_the_vocabulary(tmp_path: Path) -> None:
    config = {
        "added_tokens_decoder": {
            "4": {"__type": "AddedToken", "content": "<end>", "special": True},
            "5": {"content": "a tool", "special": False},
        },
        "eos_token": {"content": "<end>", "lstrip": False},
    }
    tokenizer = Tokenizer.from_folder(write_words(tmp_path, config))
    assert tokenizer.encode("one<end>two a tool") == [1, 4, 2, 5]
    assert tokenizer.eos_id == 4
    assert tokenizer.special_ids == {0, 4}
    assert tokenizer.vocab_size == 6


def one_line(error: pytest.ExceptionInfo[QwenJaxError]) -> str:
    message = str(error.value)
    assert "\n" not in message
    return message


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"eos_token": "<gone>"}, "eos_token '<gone>' is not in the vocabulary"),
        ({"eos_token": 7}, "eos_token must be a token, got 7"),
        ({"added_tokens_decoder": {"9": {"content": "x", "special": True}}}, "'x' should have id 9"),
        (
            {"added_tokens_decoder": {"3": {"content": "one"}}},
            "'one' should have id 3, but the vocabulary gives it 1",
        ),
        ({"added_tokens_decoder": ["x"]}, "not a table from id to token"),
        ([], "not a JSON object"),
        ({"chat_template": 3}, "chat_template must be a text or a list"),
        ({"chat_template": [{"name": "x"}]}, "chat_template must be a text or a list"),
    ],
)
def test_a_config_that_contradicts_the_vocabulary_is_refused(
    tmp_path: Path, config: dict, message: str
) -> None:
    with pytest.raises(QwenJaxError) as error:
        Tokenizer.from_folder(write_words(tmp_path, config))
    assert message in one_line(error)
    assert "tokenizer_config.json" in one_line(error)


def test_missing_and_broken_files_are_named(tmp_path: Path) -> None:
    with pytest.raises(TokenizerError, match=r"neither tokenizer\.json nor vocab\.json and merges\.txt"):
        Tokenizer.from_folder(tmp_path)
    (tmp_path / "vocab.json").write_text("{}")
    with pytest.raises(TokenizerError, match="no tokenizer"):
        Tokenizer.from_folder(tmp_path)
    (tmp_path / "merges.txt").write_text("a b\n")
    with pytest.raises(TokenizerError, match="not a BPE vocabulary") as error:
        Tokenizer.from_folder(tmp_path)
    assert "vocab.json" in one_line(error)
    (tmp_path / "tokenizer.json").write_text('{"model": ')
    with pytest.raises(TokenizerError, match=r"tokenizer\.json: not a tokenizer this can read") as error:
        Tokenizer.from_folder(tmp_path)
    one_line(error)
    write_words(tmp_path)
    (tmp_path / "tokenizer_config.json").write_text("{")
    with pytest.raises(QwenJaxError, match=r"tokenizer_config\.json: broken JSON") as error:
        Tokenizer.from_folder(tmp_path)
    one_line(error)


# Chat templates.

MESSAGES = [
    {"role": "user", "content": "Hi"},
    {"role": "assistant", "content": "Yes?"},
    {"role": "user", "content": "<b>"},
]


def test_the_chat_template_of_qwen(tokenizer: Tokenizer) -> None:
    system = "<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n"
    turn = "<|im_start|>user\nHi<|im_end|>\n"
    assert tokenizer.has_chat_template
    assert tokenizer.apply_chat_template("Hi") == system + turn + "<|im_start|>assistant\n"
    assert tokenizer.apply_chat_template(MESSAGES[:1], add_generation_prompt=False) == system + turn


RICH = """\
{%- if messages[0].role == 'system' %}{{ raise_exception('no system here') }}{% endif -%}
{{ bos_token }}|{{ eos_token }}|{{ extra }}|{{ tools | tojson }}|{{ messages | tojson(indent=1) }}
    {% for message in messages %}
    {% if loop.index > 2 %}{% break %}{% endif %}
{% generation %}{{ message.content }}{% endgeneration %};
    {% endfor %}
{% set ns = namespace(n=0) %}{% for m in messages %}{% set ns.n = ns.n + 1 %}{% endfor %}{{ ns.n }}
{{ strftime_now('%Y') | length }} {{ documents is none }} {{ add_generation_prompt }}
"""


def test_templates_render_as_in_transformers(tmp_path: Path) -> None:
    from transformers.utils.chat_template_utils import render_jinja_template

    config = {"eos_token": "three", "bos_token": {"content": "<s>"}, "chat_template": RICH}
    tokenizer = Tokenizer.from_folder(write_words(tmp_path, config))
    tools = [{"type": "function", "function": {"name": "é", "parameters": {"type": "object"}}}]
    ours = tokenizer.apply_chat_template(MESSAGES, extra=5, tools=tools)
    theirs, _ = render_jinja_template(
        [MESSAGES],
        tools=tools,
        chat_template=RICH,
        add_generation_prompt=True,
        extra=5,
        eos_token="three",
        bos_token="<s>",
    )
    assert ours == theirs[0]
    assert "<b>" in ours


def test_named_templates_and_their_files(tmp_path: Path) -> None:
    named = [{"name": "default", "template": "d"}, {"name": "tool_use", "template": "t{{ tools | length }}"}]
    write_words(tmp_path, {"chat_template": named})
    tokenizer = Tokenizer.from_folder(tmp_path)
    assert tokenizer.apply_chat_template("x") == "d"
    assert tokenizer.apply_chat_template("x", tools=[{}]) == "t1"
    assert tokenizer.apply_chat_template("x", template="tool_use", tools=[]) == "t0"
    with pytest.raises(QwenJaxError, match="no chat template 'rag'; there are: default, tool_use"):
        tokenizer.apply_chat_template("x", template="rag")

    (tmp_path / "chat_template.jinja").write_text("file {{ messages[0].content }}")
    (tmp_path / "additional_chat_templates").mkdir()
    (tmp_path / "additional_chat_templates" / "rag.jinja").write_text("rag")
    tokenizer = Tokenizer.from_folder(tmp_path)
    assert tokenizer.apply_chat_template("x") == "file x"
    assert tokenizer.apply_chat_template("x", template="rag") == "rag"


@pytest.mark.parametrize(
    ("template", "message"),
    [
        (None, "no chat template; give a plain prompt"),
        ("{% if %}", "line 1"),
        ("{{ raise_exception('roles\nmust alternate') }}", "roles must alternate"),
        ("{{ messages.append(1) }}", "failed on these messages"),
        ("{{ ''.__class__.__mro__ }}", "failed on these messages"),
        ("{{ messages[0]['missing'].deeper }}", "failed on these messages"),
    ],
)
def test_a_template_that_fails_gets_one_line(tmp_path: Path, template: str | None, message: str) -> None:
    tokenizer = Tokenizer.from_folder(write_words(tmp_path, {"chat_template": template}))
    with pytest.raises(QwenJaxError) as error:
        tokenizer.apply_chat_template("x")
    assert message in one_line(error)
    assert "tokenizer_config.json" in one_line(error)


def test_functions_are_not_taken_as_tools(tokenizer: Tokenizer) -> None:
    with pytest.raises(QwenJaxError, match="JSON schemas"):
        tokenizer.apply_chat_template("x", tools=[len])
