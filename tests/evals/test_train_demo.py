"""Training of the shipped checkpoint at a tiny size: resuming changes nothing, and the loss is that of the model."""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path
from types import ModuleType

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from qwen_jax.build import build
from qwen_jax.errors import QwenJaxError
from qwen_jax.evals.passkey import DIGITS, END_OF_TEXT, PAD
from qwen_jax.evals.passkey_training import FIRST_DIGIT_WEIGHT, batch, questions, repetition

SCRIPT = Path(__file__).resolve().parents[2] / "scripts" / "train_demo.py"


@pytest.fixture(scope="module")
def script() -> ModuleType:
    spec = importlib.util.spec_from_file_location("train_demo", SCRIPT)
    module = importlib.util.module_from_spec(spec)
    sys.modules["train_demo"] = module  # dataclasses look their module up
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def phases(script: ModuleType) -> tuple:
    return (script.Phase(96, 2, 6),)


@pytest.fixture(scope="module")
def learner(script: ModuleType, phases: tuple):
    return script.Learner(script.model_config(1, 16, 16), total=6, seed=0)


def test_a_resumed_run_ends_where_an_unbroken_one_does(script, learner, phases, tmp_path, capsys) -> None:
    whole = script.train(learner, phases, tmp_path / "whole", seed=3, log_every=1)
    cut = script.train(learner, phases, tmp_path / "cut", seed=3, log_every=1, save_every=2, minutes=0)
    assert int(cut["step"]) == 1
    resumed = script.train(learner, phases, tmp_path / "cut", seed=3, log_every=4, save_every=2)
    assert "resuming after step 1" in capsys.readouterr().out
    assert int(resumed["step"]) == int(whole["step"]) == 6
    jax.tree.map(np.testing.assert_array_equal, resumed, whole)
    start = learner.init()["params"]["layers.attn.q.weight"]
    assert not np.array_equal(whole["params"]["layers.attn.q.weight"], start)


def test_another_recipe_does_not_resume(script, learner, phases, tmp_path) -> None:
    script.train(learner, phases, tmp_path, seed=3)
    with pytest.raises(QwenJaxError, match="another recipe"):
        script.train(learner, phases, tmp_path, seed=4)


def test_the_batches_of_worker_processes_are_those_made_here(script) -> None:
    phases = script.Phase(96, 2, 3), script.Phase(128, 3, 3)
    here = list(script.batches(5, phases, start=2, workers=0))
    there = list(script.batches(5, phases, start=2, workers=1))
    assert [ids.shape for ids, _ in here] == [(2, 96)] + [(3, 128)] * 3
    jax.tree.map(np.testing.assert_array_equal, here, there)


def test_training_computes_what_the_model_computes(script, learner) -> None:
    config = script.model_config(1, 16, 16)
    ids = np.random.default_rng(0).integers(0, 256, (2, 96)).astype(np.int32)
    params = {path: value.astype(jnp.bfloat16) for path, value in learner.init()["params"].items()}
    expected = np.asarray(build(config, params)(ids))
    np.testing.assert_allclose(learner._logits(params, ids), expected, atol=0.02 * np.abs(expected).max())


def test_answers_stand_where_the_weights_say() -> None:
    for seed in range(200):
        rng = np.random.default_rng(seed)
        ids, weights = questions(rng, int(rng.integers(96, 1200)))
        text = bytes(ids.astype(np.uint8))
        firsts = np.flatnonzero(weights == FIRST_DIGIT_WEIGHT)
        assert len(firsts)
        for at in firsts:
            sentence = text[at - len("The pass key of Ravoti is ") : at + DIGITS] + b"."
            assert text.count(b" " + sentence) == 1  # the needle says the same
            assert text[at - len(sentence) + DIGITS] == ord("\n")
            assert ids[at + DIGITS + 1] == END_OF_TEXT
        assert ids[-1] == END_OF_TEXT


def test_repetitions_repeat() -> None:
    for seed in range(50):
        ids, weights = repetition(np.random.default_rng(seed), 300)
        copy = np.flatnonzero(weights == 1)
        assert bytes(ids[: copy[0]].astype(np.uint8)).count(bytes(ids[copy].astype(np.uint8))) == 1


def test_short_rows_are_padded_and_padding_has_no_weight() -> None:
    ids, weights = batch(np.random.default_rng(0), 64, 256)
    assert ids.shape == weights.shape == (64, 256)
    padded = ids == PAD
    assert 8 < padded.any(axis=1).sum() < 32
    assert not weights[padded].any()
    assert weights[~padded].all()
