"""`search` and `refine`: a budget file that the loader reads, and what a user can get wrong."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from qwen_jax.config import ModelConfig
from qwen_jax.sparsity.budgets import FILE_NAME, read
from qwen_jax.sparsity.switch import sparse_prefill
from tests.fake_recall import fake_recall  # noqa: F401

IDS = np.random.default_rng(0).integers(0, 256, 768).tolist()


def jsonl(path: Path, *lines: Any) -> Path:
    path.write_text("".join((x if isinstance(x, str) else json.dumps(x)) + "\n" for x in lines))
    return path


@pytest.fixture
def texts(tmp_path: Path) -> Path:
    return jsonl(tmp_path / "texts.jsonl", {"token_ids": IDS}, "", {"text": "word word " * 76 + "12345678"})


@pytest.mark.usefixtures("fake_recall")
def test_first_budgets_then_refined_ones_that_the_loader_reads(
    run, checkpoint: Path, texts: Path, tmp_path: Path
) -> None:
    common = ("--calibration", texts, "--prefill-chunk", 384)
    first, refined = tmp_path / "first.json", tmp_path / "refined.json"
    out = run("search", checkpoint, *common, "--keys", 220, "-o", first)
    assert out.code == 0, out
    config = ModelConfig.from_folder(checkpoint)
    heads = config.num_layers * config.num_heads
    assert sum(map(len, read(first, config))) == heads
    assert "1000 : 6096" in out.stdout
    assert f"{first}: written" in out.stdout

    out = run("refine", checkpoint, *common, "--budgets", first, "--threshold", 0.05, "-o", refined)
    assert out.code == 0, out
    assert f"round 1: 0 of {heads} heads below 0.05" in out.stdout
    assert sorted(p.name for p in tmp_path.glob("*.json*")) == ["first.json", "refined.json", "texts.jsonl"]
    folder = tmp_path / "with budgets"
    shutil.copytree(checkpoint, folder)
    shutil.copy(refined, folder / FILE_NAME)
    assert sparse_prefill(None, folder, config) is not None


@pytest.mark.parametrize(
    ("lines", "message"),
    [
        ([], "no sequence in it"),
        (["{"], "line 1: broken JSON"),
        ([{"text": "a", "token_ids": [1]}], "line 1: expected"),
        ([{"prompt": "a"}], "line 1: expected"),
        ([{"text": "fine"}, {"token_ids": "abc"}], "line 2: token_ids is neither text nor a list"),
        ([{"token_ids": [1, 2]}, "", {"token_ids": [1, 999]}], "line 3: token id 999"),
        ([{"token_ids": []}], "line 1: the prompt is empty"),
        ([{"token_ids": [1] * 2049}], "line 1: 2049 tokens are more than the model's 2048"),
    ],
)
def test_bad_calibration_is_named_by_line(
    refused, checkpoint: Path, tmp_path: Path, lines: list[Any], message: str
) -> None:
    path = jsonl(tmp_path / "bad.jsonl", *lines)
    assert message in refused("search", checkpoint, "--calibration", path, "-o", tmp_path / "out.json")
    assert not (tmp_path / "out.json").exists()


def test_what_is_refused_before_anything_is_measured(
    refused, checkpoint: Path, texts: Path, tmp_path: Path
) -> None:
    out = tmp_path / "out.json"
    search = ("search", checkpoint, "--calibration", texts, "-o")
    refine = ("refine", checkpoint, "--calibration", texts, "-o", out)
    assert "no such file" in refused("search", checkpoint, "--calibration", tmp_path / "none", "-o", out)
    assert "exists already" in refused(*search, texts)
    assert "no such folder" in refused(*search, tmp_path / "nowhere" / "out.json")
    assert "--keys must be at least 1" in refused(*search, out, "--keys", 0)
    assert "--prefill-chunk must be at least 1" in refused(*search, out, "--prefill-chunk", 0)
    assert "no calibration sequence is longer than 4000 tokens" in refused(*search, out, "--keys", 2000)
    assert "--threshold must be above 0 and at most 1" in refused(*refine, "--threshold", 1.5)
    assert "--step must be at least 1" in refused(*refine, "--step", 0)
    assert "--cap must be at least 1" in refused(*refine, "--cap", -1)
    message = refused(*refine)
    assert "holds no sparse_attention_config.json to start from" in message
    assert "qwen-jax search" in message
    (tmp_path / "budgets.json").write_text("[]")
    message = refused(*refine, "--budgets", tmp_path / "budgets.json")
    assert "budgets of 0 layers, and the model has 2" in message
    assert not out.exists()
