"""Positions: frequencies against transformers, angles against float64, dual chunk attention against its matrices."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from qwen_jax.config import DualChunk, Yarn
from qwen_jax.kernels import mixing
from qwen_jax.rope import Rotary, Stage, inverse_frequencies, temperature
from tests.oracle import dual_chunk_distances, temperatures

YARN_128K = Yarn(factor=4.0, original_max_position_embeddings=32_768)
MILLION = DualChunk(262_144, 8192, 262_144)


@pytest.fixture(scope="module")
def recorded() -> dict[str, np.ndarray]:
    with np.load(Path(__file__).parent / "goldens" / "rope.npz") as file:
        return dict(file)


@pytest.mark.parametrize(("kind", "yarn"), [("plain", None), ("yarn", YARN_128K)])
def test_frequencies_and_tables_of_transformers(
    recorded: dict[str, np.ndarray], kind: str, yarn: Yarn | None
) -> None:
    frequencies, factor = inverse_frequencies(1e6, 128, yarn)
    assert frequencies.dtype == np.float64
    np.testing.assert_allclose(frequencies, recorded[f"{kind}_frequencies"], rtol=2e-7, atol=0)
    assert factor == pytest.approx(recorded[f"{kind}_factor"], abs=1e-12)
    positions = recorded["positions"]
    cos, sin = Rotary(1e6, 128, 131_072, yarn).cos_sin(jnp.asarray(positions))
    # Theirs is the cosine of a float32 product: off by up to half a unit in the last place of the angle, and of the frequency.
    slack = factor * (1e-6 + positions[:, None] * 1.5e-7)
    for name, ours in (("cos", cos), ("sin", sin)):
        assert np.all(np.abs(np.asarray(ours) - recorded[f"{kind}_{name}"]) < slack)


def test_yarn_of_the_128k_recipe() -> None:
    frequencies, factor = inverse_frequencies(1e6, 128, YARN_128K)
    plain, _ = inverse_frequencies(1e6, 128)
    assert factor == pytest.approx(1.138629436, abs=1e-9)
    assert inverse_frequencies(1e6, 128, dataclasses.replace(YARN_128K, attention_factor=1.25))[1] == 1.25
    # Pairs that turn more than 32 times in 32,768 tokens stay, those that turn less than once are slowed by 4.
    turns = 32_768 * plain / (2 * np.pi)
    np.testing.assert_array_equal(frequencies[turns > 32 * 1.3], plain[turns > 32 * 1.3])
    np.testing.assert_allclose(frequencies[turns < 0.8], plain[turns < 0.8] / 4, rtol=1e-15)
    assert np.all(np.diff(frequencies) < 0)


def test_yarn_of_factor_1_is_plain() -> None:
    frequencies, factor = inverse_frequencies(1e6, 64, Yarn(1.0, 4096))
    np.testing.assert_allclose(frequencies, inverse_frequencies(1e6, 64)[0], rtol=1e-15)
    assert factor == 1.0


@pytest.mark.parametrize("theta", [1e4, 1e6, 1e7])
def test_angles_are_exact_up_to_a_million(theta: float) -> None:
    rng = np.random.default_rng(0)
    positions = np.concatenate([rng.integers(1_010_001, size=4000), [0, 1, 511, 512, 513, 1_010_000]])
    cos, sin = Rotary(theta, 128, 1_010_000).cos_sin(jnp.asarray(positions, jnp.int32))
    angles = positions[:, None] * theta ** (-np.arange(64) / 64)
    assert cos.dtype == sin.dtype == jnp.float32
    assert np.abs(np.asarray(cos, np.float64) - np.cos(angles)).max() <= 3e-7
    assert np.abs(np.asarray(sin, np.float64) - np.sin(angles)).max() <= 3e-7


def test_rotation_is_half_split_and_in_float32() -> None:
    rng = np.random.default_rng(1)
    x = rng.standard_normal((2, 5, 3, 8)).astype(np.float32)
    positions = rng.integers(100, size=(2, 5))
    rotary = Rotary(1e4, 8, 100)
    z = (x[..., :4] + 1j * x[..., 4:]) * np.exp(1j * positions[..., None, None] * 1e4 ** (-np.arange(4) / 4))
    expected = np.concatenate([z.real, z.imag], axis=-1)
    np.testing.assert_allclose(rotary.rotate(x, jnp.asarray(positions)), expected, atol=1e-6)
    of_bfloat16 = rotary.rotate(jnp.asarray(x, jnp.bfloat16), jnp.asarray(positions))
    assert of_bfloat16.dtype == jnp.float32
    np.testing.assert_allclose(of_bfloat16, expected, atol=3e-2)


# Dual chunk attention.


def distances(dca: DualChunk, length: int) -> np.ndarray:
    """M by the package: query position less key position, each key seen in its stage; -1 where j > i."""
    rotary = Rotary(1e4, 8, 1, dca=dca)
    i = jnp.arange(length, dtype=jnp.int32)
    succ, intra = (np.asarray(start)[:, None] for start in rotary.stage_starts(i))
    j = np.arange(length)
    stage = np.where(j >= intra, Stage.INTRA, np.where(j >= succ, Stage.SUCC, Stage.INTER))
    queries = np.stack([np.asarray(rotary.query_positions(i, s)) for s in Stage])
    m = queries[stage, np.arange(length)[:, None]] - np.asarray(rotary.key_positions(i))
    return np.where(np.tri(length, dtype=bool), m, -1)


def matrix(*rows: str) -> np.ndarray:
    """Rows of one-digit numbers, filled up with -1."""
    return np.array([[int(n) for n in row.split()] + [-1] * (len(rows) - len(row.split())) for row in rows])


def golden_matrix(old: list[str], saturated: str) -> np.ndarray:
    """15 x 15 for s = 5: `old` is how one chunk sees the chunk before it, `saturated` how it sees all older ones."""
    own = ["0", "1 0", "2 1 0", "3 2 1 0", "4 3 2 1 0"]
    second = [f"{far} {near}" for far, near in zip(old, own, strict=True)]
    return matrix(*own, *second, *(f"{saturated} {row}" for row in second))


GOLDEN = {
    # The matrix printed in the technical report, which saturates at c - 1 ...
    7: golden_matrix(["5 4 3 2 1", "6 5 4 3 2", "7 6 5 4 3", "7 6 5 4 3", "7 6 5 4 3"], "7 6 5 4 3"),
    # ... and that of the released engines, which saturate at c.
    8: golden_matrix(["5 4 3 2 1", "6 5 4 3 2", "7 6 5 4 3", "8 7 6 5 4", "8 7 6 5 4"], "8 7 6 5 4"),
}


@pytest.mark.parametrize("clip", [7, 8])
def test_golden_matrices(clip: int) -> None:
    np.testing.assert_array_equal(distances(DualChunk(8, 3, clip=clip), 15), GOLDEN[clip])
    oracle = np.where(np.tri(15, dtype=bool), dual_chunk_distances(15, 5, clip), -1)
    np.testing.assert_array_equal(oracle, GOLDEN[clip])


def test_the_default_saturates_at_c() -> None:
    assert DualChunk(8, 3).saturation == 8


@st.composite
def narrow_windows(draw: st.DrawFn) -> DualChunk:
    """c, w and C for which 2s - 1 >= C, as in every released model."""
    s = draw(st.integers(2, 24))
    w = draw(st.integers(1, s - 1))
    return DualChunk(s + w, w, clip=draw(st.integers(s, s + w)))


@given(narrow_windows())
@settings(deadline=None)
def test_closed_form(dca: DualChunk) -> None:
    length = 100  # one for all: every other length would compile anew
    m = distances(dca, length)
    visible = np.tri(length, dtype=bool)
    expected = np.where(visible, dual_chunk_distances(length, dca.chunk_len, dca.saturation), -1)
    np.testing.assert_array_equal(m, expected)
    assert m.max() <= dca.saturation
    assert m[visible].min() >= 0
    short = min(length, dca.saturation + 1)  # up to C + 1 tokens it is plain RoPE
    i = np.arange(short)
    np.testing.assert_array_equal(m[:short, :short], np.where(visible[:short, :short], i[:, None] - i, -1))


def test_a_very_wide_window_holds_old_chunks_at_2s_minus_1() -> None:
    m = distances(DualChunk(10, 7), 9)  # s = 3, C = 10
    np.testing.assert_array_equal(m[8], [5, 4, 3, 5, 4, 3, 2, 1, 0])


# L, i mod s, keys in each stage, position of the query for the chunk before: section 2.6, s = 253,952 and C = 262,144.
DECODE = [
    (253_952, 253_951, 253_952, 0, 0, None),
    (253_953, 0, 1, 253_952, 0, 253_952),
    (262_144, 8191, 8192, 253_952, 0, 262_143),
    (262_145, 8192, 8193, 253_952, 0, 262_144),
    (507_904, 253_951, 253_952, 253_952, 0, 262_144),
    (507_905, 0, 1, 253_952, 253_952, 253_952),
    (1_010_000, 248_143, 248_144, 253_952, 507_904, 262_144),
]


@pytest.mark.parametrize(("length", "own", "intra", "succ", "inter", "far"), DECODE)
def test_decode_positions_of_the_1m_models(
    length: int, own: int, intra: int, succ: int, inter: int, far: int | None
) -> None:
    rotary = Rotary(1e7, 128, 1_010_000, dca=MILLION)
    i = jnp.int32(length - 1)
    first_succ, first_intra = (int(start) for start in rotary.stage_starts(i))
    assert (length - first_intra, first_intra - first_succ, first_succ) == (intra, succ, inter)
    assert rotary.query_positions(i, Stage.INTRA) == own
    assert rotary.query_positions(i, Stage.INTER) == 262_144
    if far is not None:
        assert rotary.query_positions(i, Stage.SUCC) == far


def test_without_dual_chunk_everything_is_one_chunk() -> None:
    rotary = Rotary(1e4, 8, 100)
    i = jnp.arange(100)
    assert rotary.chunk_len is None
    for start in rotary.stage_starts(i):
        assert not start.any()
    for stage in Stage:
        np.testing.assert_array_equal(rotary.query_positions(i, stage), i)
    np.testing.assert_array_equal(rotary.key_positions(i), i)


# The length temperature.


def test_temperature_table() -> None:
    lengths = np.array([524_288, 1_000_000, 1_010_000, 1_048_576])
    m = np.asarray(temperature(lengths, 262_144), np.float64)
    np.testing.assert_allclose(m, [1.069315, 1.133886, 1.134881, 1.138629], atol=6e-7)
    np.testing.assert_allclose(m**2, [1.143434, 1.285698, 1.287955, 1.296477], atol=1.2e-6)


@given(st.integers(1, 2**20), st.integers(0, 2**20))
@settings(deadline=None)
def test_temperature(length: int, original: int) -> None:
    m = temperature(length, original)
    assert m.dtype == jnp.float32
    if length <= original or original == 0:
        assert m == 1.0  # exactly: short prompts are untouched
    else:
        assert float(m) == pytest.approx(1 + 0.1 * np.log(length / original), rel=1.2e-7)


def test_the_temperatures_of_the_oracle() -> None:
    np.testing.assert_allclose(
        temperatures(prompt=6, length=9, original=4), 1 + 0.1 * np.log(np.array([6] * 6 + [7, 8, 9]) / 4)
    )
    np.testing.assert_array_equal(temperatures(prompt=2, length=4, original=4), np.ones(4))
    np.testing.assert_array_equal(temperatures(prompt=2, length=4, original=0), np.ones(4))


def test_temperature_of_a_batch_and_of_a_scalar() -> None:
    lengths = jnp.array([[1, 64], [65, 128]])
    m = temperature(lengths, 64)
    assert m.shape == (2, 2)
    assert temperature(128, 64) == m[1, 1] > m[1, 0] > m[0, 1] == m[0, 0] == 1.0


@pytest.mark.parametrize("positions", ["of all rows", "a row"])
@pytest.mark.parametrize("critical", [False, True])
def test_mixed_queries_of_all_stages(positions: str, critical: bool) -> None:
    rotary = Rotary(1e4, 16, 4096, dca=DualChunk(320, 64))
    q = jnp.asarray(np.random.default_rng(0).standard_normal((2, 50, 3, 16)), jnp.bfloat16)
    i = jnp.arange(700, 750)
    i = i if positions == "of all rows" else jnp.stack([jnp.arange(50), i])
    scale = jnp.array([0.3, 0.7])
    turned = jnp.stack([
        rotary.rotate_queries(q.astype(jnp.float32), i, stage, scale_B=scale, critical=critical)
        for stage in rotary.stages
    ])  # fmt: skip
    want = np.asarray(turned, np.float64) @ mixing.queries_matrix(16)
    mixed = dataclasses.replace(rotary, mixed=True)
    got = mixed.query_stages(q, i, scale_B=scale, critical=critical)
    assert got.dtype == q.dtype
    np.testing.assert_allclose(np.asarray(got, np.float64), want, rtol=2.0**-8, atol=1e-5)
    assert mixed.query_stages(q, i, dtype=jnp.float16).dtype == jnp.float16
    assert mixed.query_stages(q.astype(jnp.float32), i, dtype=jnp.bfloat16).dtype == jnp.float32
    one = mixed.rotate_queries(q, i, Stage.SUCC, scale_B=scale, critical=critical)
    np.testing.assert_allclose(np.asarray(one, np.float64), want[1], rtol=2.0**-8, atol=1e-5)
