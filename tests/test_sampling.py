"""The filtered distribution against a float64 oracle, the draw against its probabilities, settings and defaults."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Sequence
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from qwen_jax.errors import ConfigError, QwenJaxError
from qwen_jax.sampling import (
    GenerationDefaults,
    ResolvedSampling,
    SamplingControls,
    SamplingError,
    SamplingParams,
    filtered_logits,
    mark_seen,
    row_seeds,
    sample,
    seen_tokens,
    step_keys,
)

V = 50
filter_jit, sample_jit = jax.jit(filtered_logits), jax.jit(sample)


def resolved(**values: object) -> ResolvedSampling:
    return SamplingParams(**values).resolve(GenerationDefaults(do_sample=True))  # type: ignore[arg-type]


def oracle(
    logits_V: np.ndarray, seen_V: np.ndarray, row: ResolvedSampling
) -> tuple[np.ndarray, np.ndarray, float]:
    """Which tokens are kept, their probabilities in float64, and how near top-p is to deciding otherwise.

    Walks the vocabulary from the likeliest token down, one group of equal logits at a time.
    """
    logits = logits_V.astype(np.float64)
    for token in np.flatnonzero(seen_V):
        down = logits[token] > 0
        logits[token] *= (1 / row.repetition_penalty) if down else row.repetition_penalty
    scaled = logits / row.temperature
    ranked = sorted(scaled, reverse=True)
    allowed = scaled >= ranked[min(row.top_k or V, V) - 1]
    weights = np.where(allowed, np.exp(scaled - scaled.max()), 0.0)
    weights /= weights.sum()
    kept, margin = np.zeros(V, bool), np.inf
    for value in sorted(set(scaled[allowed]), reverse=True):
        tied = scaled == value
        more_likely = weights[scaled > value].sum()
        kept[tied] = more_likely < row.top_p or row.top_p == 1
        margin = min(margin, abs(more_likely - row.top_p)) if row.top_p < 1 else np.inf
    probabilities = np.where(kept, weights, 0.0)
    return kept, probabilities / probabilities.sum(), margin


def check_against_oracle(
    logits_BV: np.ndarray, seen_BV: np.ndarray, rows: Sequence[ResolvedSampling]
) -> None:
    ours_BV = np.asarray(filter_jit(logits_BV, seen_BV, SamplingControls.stack(rows)))
    for ours_V, logits_V, seen_V, row in zip(ours_BV, logits_BV, seen_BV, rows, strict=True):
        kept_V, expected_V, margin = oracle(logits_V, seen_V, row)
        if margin < 1e-5:  # float32 may rightly decide otherwise
            continue
        np.testing.assert_array_equal(np.isfinite(ours_V), kept_V)
        ours_V = np.exp(ours_V.astype(np.float64))
        np.testing.assert_allclose(ours_V / ours_V.sum(), expected_V, rtol=2e-5, atol=1e-9)


SETTINGS = {
    "plain": {},
    "hot": {"temperature": 3.0},
    "cold": {"temperature": 0.05},
    "top_k": {"top_k": 7},
    "top_k of one": {"top_k": 1},
    "top_k beyond the vocabulary": {"top_k": 10 * V},
    "top_k of the whole vocabulary": {"top_k": V},
    "top_p": {"top_p": 0.6},
    "top_p that leaves one": {"top_p": 1e-6},
    "top_p of nearly all": {"top_p": 0.999},
    "penalty": {"repetition_penalty": 1.7},
    "reward": {"repetition_penalty": 0.6},
    "as Qwen2.5 ships": {"temperature": 0.7, "top_k": 20, "top_p": 0.8, "repetition_penalty": 1.05},
    "everything": {"temperature": 1.8, "top_k": 30, "top_p": 0.5, "repetition_penalty": 1.3},
}


@pytest.mark.parametrize("name", SETTINGS)
def test_the_distribution_of_one_row(name: str) -> None:
    rng = np.random.default_rng(0)
    for scale in (0.3, 3.0, 12.0):
        logits_BV = (scale * rng.normal(size=(4, V))).astype(np.float32)
        check_against_oracle(logits_BV, rng.random((4, V)) < 0.3, [resolved(**SETTINGS[name])] * 4)


def test_every_row_has_its_own_settings() -> None:
    rng = np.random.default_rng(1)
    rows = [resolved(**values) for values in SETTINGS.values()]
    logits_BV = (3 * rng.normal(size=(len(rows), V))).astype(np.float32)
    check_against_oracle(logits_BV, rng.random((len(rows), V)) < 0.3, rows)


@settings(max_examples=60, deadline=None)
@given(
    # Few distinct values: ties at every border.
    logits=st.lists(st.integers(-3, 3), min_size=V, max_size=V),
    top_k=st.integers(0, V + 3),
    top_p=st.floats(0.01, 1.0),
)
def test_ties_pass_together(logits: list[int], top_k: int, top_p: float) -> None:
    logits_BV = np.array([logits], np.float32)
    row = resolved(top_k=top_k, top_p=top_p)
    check_against_oracle(logits_BV, np.zeros((1, V), bool), [row])
    kept_V = np.isfinite(
        np.asarray(filter_jit(logits_BV, np.zeros((1, V), bool), SamplingControls.stack([row])))
    )[0]
    for value in set(logits):
        assert len(set(kept_V[np.array(logits) == value])) == 1


def test_top_p_of_one_keeps_the_tail_of_a_large_vocabulary() -> None:
    logits_BV = np.zeros((1, 152_064), np.float32)
    logits_BV[0, 0] = 40.0
    controls = SamplingControls.stack([resolved(top_p=1.0, top_k=152_063)])
    assert np.isfinite(np.asarray(filtered_logits(logits_BV, np.zeros_like(logits_BV, bool), controls))).all()


def test_a_tiny_temperature_does_not_overflow() -> None:
    logits_BV = np.array([[3e4, 2e4, -3e4]], np.float32)
    controls = SamplingControls.stack([resolved(temperature=1e-37, top_p=0.9)])
    filtered_BV = np.asarray(filtered_logits(logits_BV, np.zeros((1, 3), bool), controls))
    np.testing.assert_array_equal(filtered_BV, [[0, -np.inf, -np.inf]])


# The draw.


def keys_of(rows: Sequence[ResolvedSampling], step: int = 0) -> jax.Array:
    return step_keys(row_seeds(rows), jnp.full(len(rows), step, jnp.int32))


@pytest.mark.parametrize("name", ["plain", "top_k", "top_p", "everything"])
def test_draws_follow_the_distribution(name: str) -> None:
    draws, rng = 20_000, np.random.default_rng(2)
    logits_V = (2 * rng.normal(size=V)).astype(np.float32)
    seen_V = rng.random(V) < 0.3
    row = resolved(**SETTINGS[name])
    rows = [dataclasses.replace(row, seed=seed) for seed in range(draws)]
    tokens_B = sample_jit(
        np.tile(logits_V, (draws, 1)),
        np.tile(seen_V, (draws, 1)),
        SamplingControls.stack(rows),
        keys_of(rows),
    )
    kept_V, expected_V, _ = oracle(logits_V, seen_V, row)
    counts_V = np.bincount(np.asarray(tokens_B), minlength=V)
    assert not counts_V[~kept_V].any()
    # Pearson's statistic stays within 5 standard deviations of its mean.
    likely_V = expected_V * draws > 5
    freedom = likely_V.sum() - 1
    mean_V = expected_V[likely_V] * draws
    chi2 = ((counts_V[likely_V] - mean_V) ** 2 / mean_V).sum()
    assert chi2 < freedom + 5 * np.sqrt(2 * freedom)


def test_a_row_draws_what_it_draws_alone() -> None:
    rng = np.random.default_rng(3)
    rows = [resolved(seed=seed, **values) for seed, values in enumerate(SETTINGS.values())]
    rows += [resolved(greedy=True, seed=99)]
    logits_BV = (3 * rng.normal(size=(len(rows), V))).astype(np.float32)
    seen_BV = rng.random((len(rows), V)) < 0.3
    for step in range(5):
        together_B = sample_jit(logits_BV, seen_BV, SamplingControls.stack(rows), keys_of(rows, step))
        for b in range(len(rows)):
            one, at = [rows[b]], slice(b, b + 1)
            alone = sample_jit(logits_BV[at], seen_BV[at], SamplingControls.stack(one), keys_of(one, step))
            assert int(together_B[b]) == int(alone[0])


def test_greedy_takes_the_first_of_the_largest_penalised_logits() -> None:
    logits_BV = np.array([[1.0, 4.0, 4.0, 3.0], [-1.0, -4.0, -2.0, -3.0]], np.float32)
    seen_BV = np.array([[False, True, False, False], [True, False, False, False]])
    rows = [resolved(greedy=True), resolved(greedy=True, repetition_penalty=3.0)]
    np.testing.assert_array_equal(
        sample(logits_BV, seen_BV, SamplingControls.stack(rows), keys_of(rows)), [1, 2]
    )
    rows = [resolved(greedy=True, repetition_penalty=1.01), resolved(greedy=True)]
    np.testing.assert_array_equal(
        sample(logits_BV, seen_BV, SamplingControls.stack(rows), keys_of(rows)), [2, 0]
    )


def test_greedy_rows_beside_sampled_ones() -> None:
    rng = np.random.default_rng(4)
    logits_BV = rng.normal(size=(6, V)).astype(np.float32)
    rows = [resolved(greedy=b % 2 == 0, seed=b, temperature=None if b % 2 == 0 else 5.0) for b in range(6)]
    seen_BV = np.zeros((6, V), bool)
    draws_NB = np.stack(
        [
            np.asarray(sample_jit(logits_BV, seen_BV, SamplingControls.stack(rows), keys_of(rows, n)))
            for n in range(30)
        ]
    )
    assert (draws_NB[:, ::2] == logits_BV[::2].argmax(-1)).all()
    assert all(len(set(draws_NB[:, b])) > 5 for b in (1, 3, 5))


def test_greedy_batches_do_none_of_the_work_of_sampling() -> None:
    controls = SamplingControls.stack([resolved()])
    args = (jnp.zeros((1, V)), jnp.zeros((1, V), bool), controls, keys_of([resolved()]))

    def primitives(jaxpr: object) -> set[str]:
        """What runs whatever the values: the branches of a cond are left out."""
        found = set()
        for equation in jaxpr.eqns:  # type: ignore[attr-defined]
            found.add(equation.primitive.name)
            if equation.primitive.name != "cond":
                for inner in equation.params.values():
                    found |= primitives(inner.jaxpr) if hasattr(inner, "jaxpr") else set()
        return found

    always = primitives(jax.make_jaxpr(sample)(*args).jaxpr)
    assert {"cond", "argmax"} <= always
    assert not {"sort", "while", "scan", "random_bits", "cumsum", "exp"} & always


def test_seeds_and_steps_give_different_draws() -> None:
    data = [
        jax.random.key_data(keys_of([resolved(seed=seed)]))[0].tolist() for seed in (0, 1, 2**32, 2**32 + 1)
    ]
    data += [jax.random.key_data(keys_of([resolved()], step))[0].tolist() for step in (1, 2)]
    assert len({tuple(key) for key in data}) == 6


def test_seen_tokens() -> None:
    tokens_BT = jnp.array([[3, 1, 0, 0], [2, 2, 4, 1], [0, 0, 0, 0]], jnp.int32)
    seen_BV = seen_tokens(tokens_BT, jnp.array([2, 4, 0]), 5)
    expected = [[0, 1, 0, 1, 0], [0, 1, 1, 0, 1], [0, 0, 0, 0, 0]]
    np.testing.assert_array_equal(seen_BV, np.array(expected, bool))
    seen_BV = mark_seen(seen_BV, jnp.array([0, 1, 4]))
    expected = [[1, 1, 0, 1, 0], [0, 1, 1, 0, 1], [0, 0, 0, 0, 1]]
    np.testing.assert_array_equal(seen_BV, np.array(expected, bool))


# Settings and defaults.

QWEN = {
    "bos_token_id": 151643,
    "pad_token_id": 151643,
    "do_sample": True,
    "eos_token_id": [151645, 151643],
    "repetition_penalty": 1.05,
    "temperature": 0.7,
    "top_p": 0.8,
    "top_k": 20,
    "transformers_version": "4.37.0",
}
INSTRUCT = GenerationDefaults.from_dict(QWEN)


def test_none_takes_the_checkpoints_default() -> None:
    assert SamplingParams().resolve(INSTRUCT) == ResolvedSampling(
        max_new_tokens=None,
        greedy=False,
        temperature=0.7,
        top_k=20,
        top_p=0.8,
        repetition_penalty=1.05,
        seed=0,
        stop=(),
        eos_token_ids=(151645, 151643),
    )
    mine = SamplingParams(max_new_tokens=5, top_p=0.5, seed=7, stop="END", ignore_eos=True).resolve(INSTRUCT)
    assert (mine.max_new_tokens, mine.top_p, mine.temperature, mine.seed) == (5, 0.5, 0.7, 7)
    assert mine.stop == ("END",)
    assert mine.eos_token_ids == ()
    for one in (1, (1,), [1]):
        assert SamplingParams(eos_token_ids=one).resolve(INSTRUCT).eos_token_ids == (1,)
    base = GenerationDefaults.from_dict({"do_sample": False, "eos_token_id": 151643, "max_new_tokens": 2048})
    assert SamplingParams().resolve(base).max_new_tokens == 2048


@pytest.mark.parametrize(
    ("params", "defaults", "greedy"),
    [
        ({}, GenerationDefaults(), True),
        ({}, INSTRUCT, False),
        ({"temperature": 0}, INSTRUCT, True),
        ({"temperature": 0, "top_p": 0.9}, INSTRUCT, True),
        ({"greedy": True}, INSTRUCT, True),
        ({"greedy": True, "temperature": 0.0}, INSTRUCT, True),
        ({"temperature": 0.5}, GenerationDefaults(), False),
        ({"top_k": 5}, GenerationDefaults(), False),
        ({"greedy": False}, GenerationDefaults(), False),
        ({"repetition_penalty": 1.2}, GenerationDefaults(), True),
        ({}, GenerationDefaults(do_sample=True, temperature=0.0), True),
    ],
)
def test_when_it_is_greedy(params: dict, defaults: GenerationDefaults, greedy: bool) -> None:
    row = SamplingParams(**params).resolve(defaults)
    assert row.greedy == greedy
    if greedy:
        assert (row.temperature, row.top_k, row.top_p) == (1.0, 0, 1.0)
        assert row.repetition_penalty == params.get("repetition_penalty", defaults.repetition_penalty)


@pytest.mark.parametrize(
    ("params", "message"),
    [
        ({"temperature": -0.1}, "temperature must be positive, or 0 for greedy, got -0.1"),
        ({"temperature": float("nan")}, "temperature"),
        ({"temperature": float("inf")}, "temperature"),
        ({"temperature": 1e-45}, "temperature"),
        ({"temperature": "hot"}, "temperature"),
        ({"top_k": -1}, "top_k must be an integer, 0 (off) or more, got -1"),
        ({"top_k": 2.5}, "top_k"),
        ({"top_k": 2**31}, "top_k"),
        ({"top_p": 0}, "top_p must be in (0, 1], got 0"),
        ({"top_p": 1.01}, "top_p"),
        ({"top_p": True}, "top_p"),
        ({"repetition_penalty": 0}, "repetition_penalty must be more than 0"),
        ({"max_new_tokens": 0}, "max_new_tokens must be an integer of at least 1"),
        ({"max_new_tokens": 1.5}, "max_new_tokens"),
        ({"seed": -1}, "seed must be an integer from 0"),
        ({"seed": 2**63}, "seed"),
        ({"stop": ("a", "")}, "stop must be texts that are not empty"),
        ({"eos_token_ids": (-1,)}, "eos_token_ids must be token ids"),
        ({"stop": 5}, "stop must be texts that are not empty"),
        (
            {"greedy": True, "temperature": 0.7},
            "greedy=True leaves nothing to sample: drop it, or drop temperature=0.7",
        ),
        ({"greedy": True, "top_p": 0.7, "top_k": 3}, "drop top_k=3, top_p=0.7"),
        ({"greedy": False, "temperature": 0}, "temperature=0 means greedy"),
    ],
)
def test_settings_that_are_refused(params: dict, message: str) -> None:
    with pytest.raises(SamplingError) as error:
        SamplingParams(**params).resolve(INSTRUCT)
    assert message in str(error.value)
    assert "\n" not in str(error.value)


def test_the_file(tmp_path: Path) -> None:
    assert GenerationDefaults.from_folder(tmp_path) == GenerationDefaults()
    file = tmp_path / "generation_config.json"
    file.write_text(json.dumps(QWEN))
    assert GenerationDefaults.from_folder(tmp_path) == INSTRUCT
    for broken in (
        "{",
        "[]",
        '{"temperature": "x"}',
        '{"top_k": 1.5}',
        '{"do_sample": 1}',
        '{"eos_token_id": "x"}',
    ):
        file.write_text(broken)
        with pytest.raises(ConfigError, match=r"generation_config\.json") as error:
            GenerationDefaults.from_folder(tmp_path)
        assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    "values",
    [
        {"num_beams": 4},
        {"penalty_alpha": 0.6},
        {"typical_p": 0.9},
        {"min_p": 0.05},
        {"no_repeat_ngram_size": 3},
        {"bad_words_ids": [[1]]},
        {"suppress_tokens": [1]},
        {"guidance_scale": 1.5},
        {"min_new_tokens": 5},
        {"forced_eos_token_id": 0},
        {"is_assistant": True},
        {"something_new": 1},
    ],
)
def test_decoding_methods_not_done_here_are_named(values: dict) -> None:
    (key,) = values
    with pytest.raises(QwenJaxError, match=key):
        GenerationDefaults.from_dict(QWEN | values)


def test_everything_transformers_writes_is_understood() -> None:
    from transformers import GenerationConfig

    plain = GenerationConfig()
    assert GenerationDefaults.from_dict(plain.to_dict()) == GenerationDefaults()
    neutral = plain._get_default_generation_params()
    # top_k 50 is a choice of theirs that a file would name; see GenerationDefaults.
    assert GenerationDefaults.from_dict(neutral) == GenerationDefaults(top_k=50)
