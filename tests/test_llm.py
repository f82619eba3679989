"""`LLM`, documents and chat, on a random model whose tokens are bytes."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Iterator
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from qwen_jax import LLM, Chat, QwenJaxError, SamplingParams, cache
from qwen_jax.config import DualChunk
from tests import tiny_checkpoint
from tests.compiled import programs_of
from tests.tiny_model import CONFIG, random_model

DCA = CONFIG.dual_chunk
assert DCA is not None
S, L0 = DCA.chunk_len, DCA.original_max_position_embeddings
GREEDY = SamplingParams(max_new_tokens=12, greedy=True, ignore_eos=True)
SAMPLED = SamplingParams(max_new_tokens=12, temperature=1.5, top_k=40, top_p=0.95, seed=3, ignore_eos=True)
rng = np.random.default_rng(0)
ROWS = [rng.integers(0, CONFIG.vocab_size, n) for n in (5, 2 * S + 9, S)]


@pytest.fixture(scope="module")
def llm() -> LLM:
    return LLM(random_model(), max_len=256, prefill_chunk=32)


@pytest.fixture(scope="module")
def text_llm(tmp_path_factory: pytest.TempPathFactory) -> LLM:
    return LLM(tiny_checkpoint.write(tmp_path_factory.mktemp("llm") / "ckpt"), max_len=512)


@pytest.mark.parametrize("params", [GREEDY, SAMPLED], ids=["greedy", "sampled"])
def test_each_row_of_a_batch_gives_the_tokens_it_gives_alone(llm: LLM, params: SamplingParams) -> None:
    together = llm.generate(ROWS, params)
    assert [g.token_ids for g in together] == [llm.generate(row, params).token_ids for row in ROWS]
    assert len({tuple(g.token_ids) for g in together}) == len(ROWS)


def test_greedy_decoding_follows_the_full_forward_pass(llm: LLM) -> None:
    """While the temperature is 1 throughout, prefill and decode must pick what `model(tokens)` picks token by token."""
    tokens = list(ROWS[0])
    answer = llm.generate(tokens, GREEDY).token_ids
    padded = jnp.zeros((1, L0), jnp.int32)
    for token in answer:
        logits = llm.model(padded.at[0, : len(tokens)].set(jnp.array(tokens)), jnp.array([len(tokens)]))
        assert int(logits[0, len(tokens) - 1].argmax()) == token
        tokens.append(token)


def test_a_first_answer_compiles_four_programs(caplog: pytest.LogCaptureFixture) -> None:
    """And nothing for operations dispatched one by one, each of which would be another, and hold up the first token."""
    llm = LLM(random_model(), max_len=256)
    programs = programs_of(lambda: llm.generate(ROWS[0], GREEDY), caplog)
    assert programs == ["empty_cache", "_prefill_piece", "first_token", "_decode_block"]


def test_seeds_differ_and_repeat(llm: LLM) -> None:
    answers = [
        llm.generate(ROWS[0], SamplingParams(max_new_tokens=12, temperature=1.5, seed=s)).token_ids
        for s in (1, 2, 1)
    ]
    assert answers[0] == answers[2] != answers[1]


def test_repetition_penalty_forbids_what_was_said(llm: LLM) -> None:
    params = SamplingParams(max_new_tokens=12, greedy=True, repetition_penalty=1e6, ignore_eos=True)
    answer = llm.generate(ROWS[0], params).token_ids
    assert len(set(answer)) == len(answer)
    assert not set(answer) & set(ROWS[0].tolist())


def test_an_end_token_ends_a_row_and_leaves_the_others_alone(llm: LLM) -> None:
    plain = [g.token_ids for g in llm.generate(ROWS, GREEDY)]
    end = plain[1][4]
    stopping = SamplingParams(max_new_tokens=12, greedy=True, eos_token_ids=(end,))
    answers = llm.generate(ROWS, [GREEDY, stopping, GREEDY])
    assert answers[1].token_ids == plain[1][: plain[1].index(end) + 1]
    assert [a.finish_reason for a in answers] == ["length", "eos", "length"]
    assert [answers[0].token_ids, answers[2].token_ids] == [plain[0], plain[2]]


def test_the_configs_end_tokens_count_when_there_is_no_generation_config(llm: LLM) -> None:
    assert llm.defaults.eos_token_ids == CONFIG.eos_token_ids


def test_the_checkpoints_max_new_tokens_gives_way_to_max_len(tmp_path: Path) -> None:
    folder = tiny_checkpoint.write(tmp_path / "ckpt")
    for most, given in ((5, 5), (5000, 6)):
        (folder / "generation_config.json").write_text(json.dumps({"max_new_tokens": most}))
        answer = LLM(folder, max_len=16).generate([1] * 10, SamplingParams(greedy=True, ignore_eos=True))
        assert len(answer.token_ids) == given
    (folder / "generation_config.json").write_text('{"max_new_tokens": 0}')
    with pytest.raises(QwenJaxError, match="max_new_tokens must be at least 1, got 0"):
        LLM(folder)


def test_score_is_the_log_softmax_of_the_logits(llm: LLM) -> None:
    ids = ROWS[1]
    want = jax.nn.log_softmax(llm.model(jnp.asarray(ids)[None]))[0]
    got = llm.score(ids)
    assert got.shape == (len(ids) - 1,)
    assert got.dtype == np.float32
    np.testing.assert_allclose(got, np.asarray(want)[np.arange(len(ids) - 1), ids[1:]], atol=2e-5)


# One document, many questions.


def test_a_question_about_a_document_equals_a_fresh_prefill_of_both(llm: LLM) -> None:
    """Up to original_max_position_embeddings, as often as one asks, whatever was asked in between."""
    document, questions = ROWS[2], [ROWS[0], ROWS[0][::-1]]
    assert len(document) + len(questions[0]) <= L0
    prefix = llm.prefill(document)
    for question in [*questions, questions[0]]:
        whole = np.concatenate([document, question])
        asked = llm.generate(question, GREEDY, prefix=prefix)
        assert asked == llm.generate(whole, GREEDY)
        assert asked == llm.generate(question, GREEDY, prefix=prefix, anew=True)


def test_a_document_longer_than_its_cache_grows(llm: LLM) -> None:
    prefix = llm.prefill(ROWS[1])
    long = SamplingParams(max_new_tokens=150, greedy=True, ignore_eos=True)
    small, *_ = (prefix.cache.capacity,)
    first = llm.generate(ROWS[0], GREEDY, prefix=prefix).token_ids
    assert llm.generate(ROWS[0], long, prefix=prefix).token_ids[:12] == first
    assert small <= prefix.cache.capacity <= 256


def test_a_prefix_beyond_l0_differs_from_a_fresh_prefill_and_anew_does_not(llm: LLM) -> None:
    """The document's hidden states carry the m of the document alone: this is what the docs warn of."""
    document, question = ROWS[1], np.resize(ROWS[0], 60)
    prefix = llm.prefill(document)
    whole = np.concatenate([document, question])
    fresh = llm.score(whole)
    assert llm.generate(question, GREEDY, prefix=prefix, anew=True) == llm.generate(whole, GREEDY)
    assert len(whole) > L0
    cached, again = (np.asarray(c.cache.k[:, :, :, : len(document)]) for c in (prefix, llm.prefill(whole)))
    assert np.abs(cached[0] - again[0]).max() <= 1e-5  # the first layer's keys do not depend on m
    assert np.abs(cached[1:] - again[1:]).max() > 1e-4
    assert np.isfinite(fresh).all()


def test_a_saved_document_answers_as_before(llm: LLM, tmp_path: Path) -> None:
    prefix = llm.prefill(ROWS[1])
    before = llm.generate(ROWS[0], GREEDY, prefix=prefix)
    prefix.save(tmp_path / "doc")
    again = llm.load_prefix(tmp_path / "doc")
    assert llm.generate(ROWS[0], GREEDY, prefix=again) == before
    with pytest.raises(QwenJaxError, match="exists already"):
        prefix.save(tmp_path / "doc")


@pytest.mark.parametrize(("saved", "loaded"), [("cpu", "TPU v5p"), ("TPU v5p", "cpu")])
def test_a_document_that_a_tpu_saved_is_read_elsewhere_and_the_reverse(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, saved: str, loaded: str
) -> None:
    """TPUs hold keys in bfloat16, other devices in float16."""

    def on(device: str) -> LLM:
        monkeypatch.setattr(cache, "target", lambda: device)
        cache._allocator.cache_clear()
        return LLM(random_model(), max_len=256, kv_dtype="bfloat16")

    prefix = on(saved).prefill(ROWS[1])
    prefix.save(tmp_path / "doc")
    again = on(loaded).load_prefix(tmp_path / "doc")
    cache._allocator.cache_clear()
    dtypes = {"cpu": jnp.float16, "TPU v5p": jnp.bfloat16}
    assert (prefix.cache.k.dtype, again.cache.k.dtype) == (dtypes[saved], dtypes[loaded])
    for was, found in zip(prefix.cache[:2], again.cache[:2], strict=True):
        want = was[..., : len(prefix), :].astype(found.dtype)
        np.testing.assert_array_equal(found[..., : len(prefix), :], want)


def test_a_saved_document_with_values_of_another_dtype_is_refused(tmp_path: Path) -> None:
    llm = LLM(random_model(), max_len=256, kv_dtype="bfloat16")
    llm.prefill(ROWS[0]).save(tmp_path / "doc")
    path = tmp_path / "doc" / "values.safetensors"
    path.write_bytes(path.read_bytes().replace(b'"dtype":"BF16"', b'"dtype":"F16" '))
    with pytest.raises(QwenJaxError, match=r"tensor v\.0 is missing or is not bfloat16 \["):
        llm.load_prefix(tmp_path / "doc")


def test_a_saved_document_of_another_model_is_refused(llm: LLM, tmp_path: Path) -> None:
    llm.prefill(ROWS[0]).save(tmp_path / "doc")
    with pytest.raises(QwenJaxError, match="made with other weights"):
        LLM(random_model(seed=1), max_len=256).load_prefix(tmp_path / "doc")
    with pytest.raises(QwenJaxError, match="its cache is float32, this one bfloat16"):
        LLM(random_model(), max_len=256, kv_dtype=jnp.bfloat16).load_prefix(tmp_path / "doc")
    with pytest.raises(QwenJaxError, match="not a saved document"):
        llm.load_prefix(tmp_path)


def test_a_saved_document_longer_than_max_len_is_refused(llm: LLM, tmp_path: Path) -> None:
    LLM(random_model(), max_len=1024).prefill([1] * 300).save(tmp_path / "doc")
    with pytest.raises(QwenJaxError, match="300 tokens do not fit max_len=256"):
        llm.load_prefix(tmp_path / "doc")


def test_a_saved_document_with_damaged_ids_is_refused(llm: LLM, tmp_path: Path) -> None:
    llm.prefill(ROWS[0]).save(tmp_path / "doc")
    description = json.loads((tmp_path / "doc" / "document.json").read_text())
    (tmp_path / "doc" / "document.json").write_text(json.dumps(description | {"token_ids": ["x"]}))
    with pytest.raises(QwenJaxError, match="not the description of a saved document"):
        llm.load_prefix(tmp_path / "doc")


@pytest.mark.parametrize("version", [1, 2])
def test_a_saved_document_of_an_older_version_is_refused(llm: LLM, tmp_path: Path, version: int) -> None:
    """The first had no number."""
    llm.prefill(ROWS[0]).save(tmp_path / "doc")
    description = json.loads((tmp_path / "doc" / "document.json").read_text())
    del description["format"]
    description |= {"format": version} if version > 1 else {}
    (tmp_path / "doc" / "document.json").write_text(json.dumps(description))
    with pytest.raises(
        QwenJaxError, match=rf"saved by another version of qwen-jax \(format {version}, not 3\): prefill"
    ):
        llm.load_prefix(tmp_path / "doc")


def test_a_document_of_another_model_is_refused(llm: LLM) -> None:
    stranger = LLM(random_model(seed=1), max_len=256).prefill(ROWS[0])
    for anew in (False, True):
        with pytest.raises(QwenJaxError, match="the prefix was made with another model"):
            llm.generate(ROWS[0], GREEDY, prefix=stranger, anew=anew)


def test_answers_on_one_document_do_not_mix(text_llm: LLM) -> None:
    """The second answer overwrites the keys of the first, which must not go on as if nothing had happened."""
    prefix = text_llm.prefill("a document")
    alone = text_llm.generate("and b", GREEDY, prefix=prefix).text
    first = text_llm.stream("a", dataclasses.replace(GREEDY, max_new_tokens=40), prefix=prefix)
    second = text_llm.stream("and b", GREEDY, prefix=prefix)
    next(first)
    assert next(second) + "".join(second) == alone
    with pytest.raises(QwenJaxError, match="another answer was begun on the same document"):
        list(first)


def test_a_streamed_answer_can_be_prefilled_anew(text_llm: LLM) -> None:
    prefix = text_llm.prefill("a document")
    streamed = "".join(text_llm.stream("and b", GREEDY, prefix=prefix, anew=True))
    assert streamed == text_llm.generate("a documentand b", GREEDY).text
    assert len(prefix) == len("a document")


def test_a_cache_lost_in_a_broken_call_is_told(llm: LLM, text_llm: LLM) -> None:
    prefix = llm.prefill(ROWS[0])
    prefix.cache.k.delete()  # what Ctrl-C between donation and return leaves
    with pytest.raises(QwenJaxError, match="prefill or load it again"):
        llm.generate(ROWS[0], GREEDY, prefix=prefix)
    chat = Chat(text_llm)
    first = chat.send("hello", GREEDY).text
    chat._context.cache.k.delete()
    assert chat.send("hello", GREEDY).text != ""
    assert chat.messages[1]["content"] == first


# Text.


def test_streamed_pieces_make_the_text(text_llm: LLM) -> None:
    params = SamplingParams(max_new_tokens=40, temperature=1.0, seed=5, ignore_eos=True)
    pieces = list(text_llm.stream("Ünïcødé 文", params))
    assert len(pieces) > 1
    assert "".join(pieces) == text_llm.generate("Ünïcødé 文", params).text


def test_a_stop_string_cuts_the_text_where_it_begins(text_llm: LLM) -> None:
    params = SamplingParams(max_new_tokens=60, temperature=1.0, seed=7, ignore_eos=True)
    text = text_llm.generate("abc", params).text
    stop = text[9:11]
    stopped = text_llm.generate(
        "abc", SamplingParams(max_new_tokens=60, temperature=1.0, seed=7, ignore_eos=True, stop=(stop,))
    )
    assert stopped.finish_reason == "stop"
    assert stopped.text == text[: text.index(stop)]
    assert len(stopped.token_ids) < 60


def test_chat_turns_continue_from_the_cache(text_llm: LLM, monkeypatch: pytest.MonkeyPatch) -> None:
    chat = Chat(text_llm, system="be brief")
    prefilled: list[int] = []
    run = text_llm._prefiller.run

    def spy(tokens_BT: np.ndarray, *args: object) -> Iterator[object]:
        prefilled.append(tokens_BT.shape[1])
        return run(tokens_BT, *args)  # type: ignore[arg-type]

    monkeypatch.setattr(text_llm._prefiller, "run", spy)
    first = chat.send("hello", GREEDY)
    second = chat.send("and now?", GREEDY)
    assert [m["role"] for m in chat.messages] == ["system", "user", "assistant", "user", "assistant"]
    whole = text_llm.render(chat.messages[:-1])
    fresh = text_llm.generate(whole, GREEDY)
    assert fresh.text == second.text == chat.messages[-1]["content"]
    # The second turn ran what the first had not: at least its own message, at most that and the answer.
    assert 10 < prefilled[1] < len(text_llm.token_ids(whole)) - prefilled[0] + len(first.token_ids)


def test_an_abandoned_turn_leaves_the_conversation_as_it_was(text_llm: LLM) -> None:
    chat = Chat(text_llm)
    next(iter(chat.stream("hello", GREEDY)), None)
    assert chat.messages == []
    assert chat.send("hello", GREEDY).text == Chat(text_llm).send("hello", GREEDY).text


# What is refused.


@pytest.mark.parametrize(
    ("prompt", "message"),
    [
        ([], "the prompt is empty"),
        ([97], "token id 97 is outside the vocabulary of 97 tokens"),
        ([-1], "token id -1 is outside the vocabulary"),
        (np.zeros(250, int), "250 tokens and 12 new ones do not fit max_len=256"),
        ("text", "the checkpoint has no tokenizer"),
        ([[1.5]], "text or a list of token ids"),
        ([[[1], [2, 3]]], "text or a flat list of token ids"),
        (5, "text or a list of token ids, got int"),
        (None, "text or a list of token ids, got NoneType"),
    ],
)
def test_bad_prompts_are_refused_in_one_line(llm: LLM, prompt: object, message: str) -> None:
    with pytest.raises(QwenJaxError, match=message) as caught:
        llm.generate(prompt, GREEDY)  # type: ignore[arg-type]
    assert "\n" not in str(caught.value)


def test_an_empty_text_is_refused(text_llm: LLM) -> None:
    with pytest.raises(QwenJaxError, match="the prompt is empty"):
        text_llm.generate("", GREEDY)


@pytest.mark.parametrize(
    ("setting", "message"),
    [
        ({"weight_dtype": "int8"}, "weight_dtype= comes too late for a loaded model"),
        ({"matmul": "fp8"}, "matmul= comes too late for a loaded model"),
        ({"sparsity": "bands:2"}, "the share must be a number above 0, at most 1"),
        ({"kv_dtype": "int4"}, "kv_dtype='int4' is not one of bfloat16, float16, float32, int8, fp8"),
        ({"max_len": 0}, "max_len must be at least 1"),
        ({"prefill_chunk": 0}, "prefill_chunk must be at least 1"),
        ({"batch_size": 0}, "batch_size must be at least 1"),
        ({"dtype": "bfloat16"}, "dtype= comes too late for a loaded model"),
        ({"dca": False}, "dca= comes too late for a loaded model"),
        ({"mesh": jax.make_mesh((2,), ("tensor",))}, "mesh= names other devices"),
    ],
)
def test_settings_that_are_not_built_are_refused_by_name(setting: dict[str, object], message: str) -> None:
    with pytest.raises(QwenJaxError, match=message):
        LLM(random_model(), **setting)  # type: ignore[arg-type]


def test_a_chunk_longer_than_s_is_not_padded() -> None:
    assert LLM(random_model(), max_len=256, prefill_chunk=1000)._prefiller.chunk == S


def test_plain_rope_does_not_go_beyond_the_models_positions(tmp_path: Path) -> None:
    folder = tiny_checkpoint.write(tmp_path / "ckpt")
    with pytest.raises(QwenJaxError, match="beyond the 2048 positions"):
        LLM(folder, dca=False, max_len=4096)
    llm = LLM(folder, dca=DualChunk(256, 32), max_len=4096)
    assert llm.config.dual_chunk == DualChunk(256, 32)
    assert llm.generate([1] * 3000, SamplingParams(max_new_tokens=1)).prompt_tokens == 3000
