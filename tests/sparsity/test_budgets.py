"""Budget files: the published format in and out, the engine's reading of them, and what is refused."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest

from qwen_jax.config import ModelConfig
from qwen_jax.errors import QwenJaxError
from qwen_jax.sparsity.budgets import Budget, LineBudgets, read, write

CONFIG = ModelConfig(
    vocab_size=32, hidden_size=24, intermediate_size=16, num_layers=2, num_heads=3, num_kv_heads=1, head_dim=8,
    rms_norm_eps=1e-6, rope_theta=1e4, max_position_embeddings=64,
)  # fmt: skip
# Three heads of two layers as the released 7B file spells them.
PUBLISHED = (
    '[{"0": ["vertical_and_slash", 9192, 14288, 0.6920984983444214], "1": ["vertical_and_slash", 1000, 6096, '
    '0.9862403869628906], "2": ["vertical_and_slash", 30, 800, 0.9972315430641174]}, {"0": ["vertical_and_slash", '
    '1000, 6096, 1.0000450611114502], "1": ["vertical_and_slash", 22032, 24528, 1], "2": ["vertical_and_slash", '
    "31, 100, 0.5]}]"
)


@pytest.fixture
def path(tmp_path: Path) -> Path:
    file = tmp_path / "sparse_attention_config.json"
    file.write_text(PUBLISHED)
    return file


def test_the_published_format_is_read_by_layer_and_head(path: Path) -> None:
    heads_LN = read(path, CONFIG)
    assert heads_LN[0][0] == Budget(9192, 14288, 0.6920984983444214)
    assert heads_LN[1] == [Budget(1000, 6096, 1.0000450611114502), Budget(22032, 24528), Budget(31, 100, 0.5)]


def test_heads_are_ordered_by_number_not_by_place(path: Path) -> None:
    raw = json.loads(PUBLISHED)
    path.write_text(json.dumps([dict(reversed(layer.items())) for layer in raw]))
    backwards = read(path, CONFIG)
    path.write_text(PUBLISHED)
    assert backwards == read(path, CONFIG)


def test_what_is_written_is_what_was_read(path: Path, tmp_path: Path) -> None:
    write(tmp_path / "copy.json", read(path, CONFIG))
    assert json.loads((tmp_path / "copy.json").read_text()) == json.loads(PUBLISHED)


def test_exactly_thirty_columns_are_read_as_a_hundred_and_thirty(path: Path) -> None:
    heads_LN = read(path, CONFIG)
    budgets = LineBudgets.of(heads_LN)
    np.testing.assert_array_equal(budgets.vertical_LN, [[9192, 1000, 130], [1000, 22032, 31]])
    np.testing.assert_array_equal(budgets.slash_LN, [[14288, 6096, 800], [6096, 24528, 100]])
    assert budgets.vertical_LN.dtype == budgets.slash_LN.dtype == np.int32
    assert budgets.most_vertical == 22032
    assert heads_LN[0][2].vertical == 30


def test_budgets_enter_a_jitted_function(path: Path) -> None:
    budgets = LineBudgets.of(read(path, CONFIG))
    total = jax.jit(lambda b: b.vertical_LN.sum() + b.most_vertical)(budgets)
    assert total == 9192 + 1000 + 130 + 1000 + 22032 + 31 + 22032


def changed(layer: int, head: str, place: int, value: Any) -> Any:
    raw = json.loads(PUBLISHED)
    raw[layer][head][place] = value
    return raw


@pytest.mark.parametrize(
    ("raw", "message"),
    [
        ({"0": []}, "not a list of layers"),
        ([1, 2], "not a list of layers"),
        (json.loads(PUBLISHED)[:1], "budgets of 1 layers, and the model has 2"),
        (json.loads(PUBLISHED) * 2, "budgets of 4 layers"),
        ([*json.loads(PUBLISHED)[:1], {"0": 0, "1": 0}], "layer 1 must have heads 0 to 2; head '2' is missing"),
        ([*json.loads(PUBLISHED)[:1], json.loads(PUBLISHED)[1] | {"7": 0}], "head '7' is not one of them"),
        (changed(0, "1", 0, "block_sparse"), "layer 0, head 1: pattern 'block_sparse' is not supported"),
        (changed(1, "2", 0, None), "layer 1, head 2: pattern None"),
        (changed(0, "0", 1, -1), "vertical size must be a whole number from 0 to 16777216, got -1"),
        (changed(0, "0", 2, 10**30), "slash size must be a whole number"),
        (changed(0, "0", 2, 1.5), "slash size must be a whole number"),
        (changed(0, "0", 1, True), "vertical size must be a whole number"),
        (changed(0, "0", 3, "high"), "score must be a number"),
        ([{"0": ["vertical_and_slash", 1, 2], "1": 0, "2": 0}] * 2, "expected \\[type, vertical, slash, score\\]"),
    ],
)  # fmt: skip
def test_a_bad_file_gives_one_clear_line(path: Path, raw: Any, message: str) -> None:
    path.write_text(json.dumps(raw))
    with pytest.raises(QwenJaxError, match=message) as refusal:
        read(path, CONFIG)
    assert str(path) in str(refusal.value)
    assert "\n" not in str(refusal.value)


def test_a_missing_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(QwenJaxError, match="no such file"):
        read(tmp_path / "sparse_attention_config.json", CONFIG)
