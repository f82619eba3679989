"""The shipped checkpoint: its files, its tokenizer, and that it does what it is shipped for."""

from __future__ import annotations

import json

import numpy as np
import pytest
import tokenizers
import transformers

import qwen_jax
from qwen_jax.config import DualChunk, ModelConfig
from qwen_jax.evals import batched, demo, demo_folder, plot
from qwen_jax.evals.passkey import END_OF_TEXT, SPECIAL_TOKENS, Grid, make_task
from qwen_jax.loading import open_checkpoint
from qwen_jax.params import num_params, params
from qwen_jax.tokenizer import Tokenizer

FOLDER = demo_folder.DEFAULT
TEXTS = ["The pass key of Ravoti is 48213.\n", "héllo wörld", "日本語 и русский", "a\tb\r\n  c", "", "🙂"]


def test_the_folder_is_small_and_complete() -> None:
    sizes = {path.name: path.stat().st_size for path in FOLDER.iterdir()}
    assert sizes.keys() == {
        "config.json", "generation_config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json",
    }  # fmt: skip
    assert sum(sizes.values()) <= 16 * 2**20


def test_the_config_is_of_qwen2_with_dual_chunk_attention() -> None:
    config = ModelConfig.from_folder(FOLDER)
    assert config.dual_chunk == DualChunk(2048, 256, 2048)
    assert (config.vocab_size, config.num_layers, config.hidden_size) == (260, 4, 256)
    assert config.eos_token_ids == (END_OF_TEXT,)
    assert num_params(config) == 3_020_032
    hf = transformers.Qwen2Config.from_pretrained(FOLDER)
    assert (hf.num_hidden_layers, hf.num_key_value_heads) == (4, 2)


def test_every_tensor_is_there_and_finite() -> None:
    source = open_checkpoint(FOLDER)
    for param in params(source.config):
        tensor = source.read(param, 0 if param.stacked else None)
        assert tensor.dtype == np.dtype("bfloat16")
        assert tensor.any()


@pytest.mark.parametrize("text", TEXTS)
def test_a_byte_is_a_token(text: str) -> None:
    raw = tokenizers.Tokenizer.from_file(str(FOLDER / "tokenizer.json"))
    ours = Tokenizer.from_folder(FOLDER)
    hf = transformers.AutoTokenizer.from_pretrained(FOLDER)
    expected = list(text.encode())
    assert raw.encode(text).ids == ours.encode(text) == hf.encode(text) == expected
    assert raw.decode(expected) == ours.decode(expected) == hf.decode(expected) == text


def test_special_tokens_follow_the_bytes() -> None:
    ours = Tokenizer.from_folder(FOLDER)
    hf = transformers.PreTrainedTokenizerFast.from_pretrained(FOLDER)
    assert [ours.encode(token) for token in SPECIAL_TOKENS] == [[256], [257], [258], [259]]
    assert (hf.eos_token_id, hf.pad_token_id, len(hf)) == (256, 259, 260)
    assert (ours.eos_id, ours.pad_id, ours.vocab_size) == (256, 259, 260)
    assert ours.decode([72, 105, 256]) == "Hi"


def test_it_answers_by_generating() -> None:
    llm = qwen_jax.LLM(FOLDER)
    tasks = [make_task(np.random.default_rng(seed), 1000 + seed, 0.3) for seed in range(4)]
    answers = llm.generate([task.text for task in tasks])
    assert [answer.text for answer in answers] == [task.asked.digits + "." for task in tasks]
    assert {answer.finish_reason for answer in answers} == {"eos"}


def test_past_its_training_length_it_takes_dual_chunk_attention() -> None:
    seen: list[demo.Answered] = []
    result = demo.run(length=5376, seed=1, on_answer=seen.append)
    assert result.length == 5376
    assert tuple(seen) == result.answers
    far, plain = result.answers
    assert (far.mode, far.correct) == (demo.DCA_TEMPERATURE, True)
    assert (plain.mode, plain.correct) == (demo.PLAIN, False)


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        ({"length": 200_000}, "up to 131072"),
        ({"length": 100}, "needs at least"),
        ({"modes": ["NTK"]}, "no mode 'NTK'"),
    ],
)
def test_demo_refusals(arguments: dict, says: str) -> None:
    with pytest.raises(qwen_jax.QwenJaxError, match=says):
        demo.run(**arguments)


def test_doublings_end_at_the_longest() -> None:
    assert demo.doublings(8192) == [1024, 2048, 4096, 8192]
    assert demo.doublings(5000) == [1024, 2048, 4096, 5000]
    assert demo.doublings(700) == [700]


def test_plot_writes_a_picture_or_says_why_not(tmp_path) -> None:
    grid = Grid((1024, 4096), (0.0, 0.5, 1.0), 4, np.array([[4, 4, 4], [0, 2, 4]]))
    plot.save({"DCA": grid, "plain RoPE": grid}, tmp_path / "out.png", trained_on=2048)
    assert (tmp_path / "out.png").read_bytes().startswith(b"\x89PNG")
    with pytest.raises(qwen_jax.QwenJaxError, match="cannot write the plot"):
        plot.save({"DCA": grid}, tmp_path / "out.docx", trained_on=2048)


def test_the_exported_files_are_what_training_writes(tmp_path) -> None:
    config = ModelConfig.from_folder(FOLDER)
    zeros = {
        p.path: np.zeros(((config.num_layers,) if p.stacked else ()) + p.shape(config))
        for p in params(config)
    }
    demo_folder.write(tmp_path, config, zeros)
    for name in ("config.json", "generation_config.json", "tokenizer_config.json"):
        assert json.loads((tmp_path / name).read_text()) == json.loads((FOLDER / name).read_text())
    assert (tmp_path / "tokenizer.json").read_bytes() == (FOLDER / "tokenizer.json").read_bytes()
    assert (tmp_path / "model.safetensors").stat().st_size == (FOLDER / "model.safetensors").stat().st_size


def test_batched_answers_are_right() -> None:
    model = qwen_jax.load(FOLDER)
    tasks = [make_task(np.random.default_rng(seed), 2000, 0.1) for seed in range(2)]
    answers = batched.answerer(model, longest=2000, piece=demo.PREFILL_CHUNK)(tasks)
    assert answers == [task.asked.digits + "." for task in tasks]
