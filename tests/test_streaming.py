"""However it is cut into pieces, a streamed text is the text decoded at once, up to the first stop string."""

from __future__ import annotations

import itertools
from collections.abc import Sequence

import pytest
import qwen_vocabulary
from hypothesis import given, settings
from hypothesis import strategies as st
from qwen_vocabulary import TEXTS

from qwen_jax.errors import QwenJaxError
from qwen_jax.streaming import ByteStream, StopStrings, WindowStream, cut_at_stop
from qwen_jax.tokenizer import Tokenizer


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Tokenizer:
    return Tokenizer.from_folder(qwen_vocabulary.write_tokenizer_json(tmp_path_factory.mktemp("tokenizer")))


def streamed(tokenizer: Tokenizer, pieces: Sequence[Sequence[int]], skip_special: bool = True) -> list[str]:
    stream = tokenizer.stream(skip_special=skip_special)
    return [stream.push(ids) for ids in pieces] + [stream.flush()]


@pytest.mark.parametrize("name", TEXTS)
def test_every_split_of_a_text(name: str, tokenizer: Tokenizer) -> None:
    ids = tokenizer.encode(TEXTS[name])
    whole = tokenizer.decode(ids)
    assert "".join(streamed(tokenizer, [[index] for index in ids])) == whole
    for cut in range(len(ids) + 1):
        first, second, rest = streamed(tokenizer, [ids[:cut], ids[cut:]])
        assert first + second == whole
        assert rest == ""


def test_half_a_character_is_held_until_it_is_whole(tokenizer: Tokenizer) -> None:
    text = "𓂀👩‍👩"
    ids = tokenizer.encode(text)
    assert len(ids) > len(text), "this text must split characters over tokens"
    stream = tokenizer.stream()
    shown = ""
    for index in ids:
        piece = stream.push([index])
        assert "\ufffd" not in piece
        shown += piece
        assert text.startswith(shown)
    assert shown == text
    assert stream.flush() == ""


def test_a_character_never_finished_is_one_replacement_character(tokenizer: Tokenizer) -> None:
    ids = tokenizer.encode("𓂀")
    stream = tokenizer.stream()
    assert stream.push(ids[:-1]) == ""
    assert stream.flush() == tokenizer.decode(ids[:-1]) == "\ufffd"
    assert stream.push(tokenizer.encode("again")) == "again"


def test_a_real_replacement_character_appears_at_once(tokenizer: Tokenizer) -> None:
    stream = tokenizer.stream()
    assert stream.push(tokenizer.encode("a\ufffd")) == "a\ufffd"


# Any ids at all, mostly bytes that are no UTF-8: special ones, ids beyond the tokenizer, bytes out of order.
ids_of_any_kind = st.lists(
    st.integers(0, 255) | st.integers(0, 152_063) | st.integers(151_640, 151_670), max_size=40
)


@settings(max_examples=300, deadline=None)
@given(ids=ids_of_any_kind, cuts=st.lists(st.integers(0, 40)), skip_special=st.booleans())
def test_any_ids_in_any_pieces(
    tokenizer: Tokenizer, ids: list[int], cuts: list[int], skip_special: bool
) -> None:
    bounds = [0, *sorted(cuts), len(ids)]
    pieces = [ids[start:stop] for start, stop in itertools.pairwise(bounds)]
    assert "".join(streamed(tokenizer, pieces, skip_special)) == tokenizer.decode(ids, skip_special)


def test_the_work_per_token_does_not_grow() -> None:
    looked_up = []

    def token_bytes(index: int) -> bytes:
        looked_up.append(index)
        return b"ab"

    stream = ByteStream(token_bytes)
    for index in range(1000):
        assert stream.push([index]) == "ab"
    assert len(looked_up) == 1000

    decoded = []

    def decode(ids: list[int]) -> str:
        decoded.append(len(ids))
        return "\ufffd" * len(ids)

    window = WindowStream(decode, lambda index: True)
    assert len("".join(window.push([index]) for index in range(1000)) + window.flush()) == 1000
    assert max(decoded) <= 8


STOPS = st.lists(st.text(alphabet="ab", min_size=1, max_size=5), max_size=4)


def first_stop_by_definition(text: str, stops: Sequence[str]) -> str:
    """Reads character by character until one of the stop strings stands at the end."""
    for end in range(len(text) + 1):
        hits = [stop for stop in stops if text[:end].endswith(stop)]
        if hits:
            return text[: end - max(map(len, hits))]
    return text


@settings(max_examples=500, deadline=None)
@given(pieces=st.lists(st.text(alphabet="abc", max_size=6)), stops=STOPS)
def test_stop_strings_in_any_pieces(pieces: list[str], stops: list[str]) -> None:
    whole = "".join(pieces)
    expected = first_stop_by_definition(whole, stops)
    assert cut_at_stop(whole, stops) == expected

    stream = StopStrings(stops)
    shown = ""
    for number, piece in enumerate(pieces):
        shown += stream.push(piece)
        assert expected.startswith(shown)
        seen = "".join(pieces[: number + 1])
        assert (stream.hit is not None) == any(stop in seen for stop in stops), "a hit is told at once"
        # What is held back could still become a stop string; one character less could not.
        held = expected[len(shown) :] if stream.hit else seen[len(shown) :]
        assert stream.hit or not held or any(stop.startswith(held) for stop in stops)
    assert shown + stream.flush() == expected
    assert stream.hit is None or whole[len(expected) :].startswith(stream.hit)


@settings(max_examples=100, deadline=None)
@given(
    text=st.text(alphabet="aé漢👩\u200d \n", max_size=30),
    stops=st.lists(st.sampled_from(["漢", "👩\u200d", "\n\n", "é "])),
)
def test_tokens_to_text_to_stop(tokenizer: Tokenizer, text: str, stops: list[str]) -> None:
    ids = tokenizer.encode(text)
    stream, stop = tokenizer.stream(), StopStrings(stops)
    shown = "".join(stop.push(stream.push([index])) for index in ids)
    shown += stop.push(stream.flush()) + stop.flush()
    assert shown == cut_at_stop(tokenizer.decode(ids), stops)


def test_after_a_hit_nothing_comes() -> None:
    stop = StopStrings(["END"])
    assert stop.push("one E") == "one "
    assert stop.push("Nothing E") == "ENothing "
    assert stop.push("ND two") == ""
    assert stop.hit == "END"
    assert stop.push("three") == ""
    assert stop.flush() == ""


def test_one_text_is_one_stop_string_not_its_letters() -> None:
    assert cut_at_stop("abc END", "END") == "abc "


@pytest.mark.parametrize("stops", [[""], ["a", ""], [3]])
def test_empty_stop_strings_are_refused(stops: list) -> None:
    with pytest.raises(QwenJaxError, match="stop string"):
        StopStrings(stops)
    with pytest.raises(QwenJaxError, match="stop string"):
        cut_at_stop("a", stops)
