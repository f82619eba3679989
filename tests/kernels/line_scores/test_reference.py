"""Line scores against a float64 loop over (query, key) pairs, through every stage, offset and group."""

from __future__ import annotations

from collections.abc import Iterator

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from qwen_jax.config import DualChunk
from qwen_jax.kernels.line_scores import reference
from qwen_jax.kernels.line_scores.api import line_scores
from qwen_jax.rope import Rotary

THETA, H, S = 10_000.0, 16, 400
DCA = DualChunk(chunk_size=128, local_size=32)  # s = 96
_line_scores = jax.jit(line_scores, static_argnames=("rotary", "last_queries"))


def critical_distance(i: int, j: int, dca: DualChunk | None) -> int:
    """The T of `algorithms.md` 2.3."""
    if dca is None or i // dca.chunk_len - j // dca.chunk_len < 2:
        return i - j
    return dca.saturation + i % dca.chunk_len - j % dca.chunk_len


def oracle(
    q_TNH: np.ndarray,
    k_SKH: np.ndarray,
    *,
    start: int,
    end: int,
    dca: DualChunk | None,
    scale: float,
    last: int,
) -> tuple[np.ndarray, np.ndarray]:
    """Column and diagonal sums from the definition; no vector is rotated at a position."""
    N, K = q_TNH.shape[1], k_SKH.shape[1]
    speeds_F = THETA ** (-np.arange(0, H, 2) / H)
    q = q_TNH[..., : H // 2] + 1j * q_TNH[..., H // 2 :]
    k = k_SKH[..., : H // 2] + 1j * k_SKH[..., H // 2 :]
    columns, diagonals = np.zeros((N, S)), np.zeros((N, S))
    for n in range(N):
        for i in range(max(start, end - last), end):
            turns = np.exp(
                1j * np.array([critical_distance(i, j, dca) for j in range(i + 1)])[:, None] * speeds_F
            )
            scores = (q[i - start, n] * k[: i + 1, n // (N // K)].conj() * turns).sum(-1).real * scale
            p = np.exp(scores - scores.max())
            p /= p.sum()
            columns[n, : i + 1] += p
            diagonals[n, i - np.arange(i + 1)] += p
    for sums, first in ((columns, 30), (diagonals, 100)):
        sums[:, :first] = np.inf
        sums[:, end if end > start else 0 :] = -np.inf
    return columns, diagonals


def check(
    start: int, T: int, kv_len: tuple[int, ...], dca: DualChunk | None = DCA,
    heads: tuple[int, int] = (2, 1), last: int = 64, scale: float = 0.7,
) -> None:  # fmt: skip
    rng = np.random.default_rng(start + T)
    B, (N, K) = len(kv_len), heads
    q = rng.standard_normal((B, T, N, H)).astype(np.float32)
    k = rng.standard_normal((B, S, K, H)).astype(np.float32)
    rotary = Rotary(THETA, H, 1024, dca=dca)
    k_BKSH = jnp.swapaxes(rotary.rotate_keys(jnp.asarray(k), jnp.arange(S, dtype=jnp.int32)), 1, 2)
    layers = jnp.stack([jnp.full_like(k_BKSH, jnp.nan), k_BKSH])
    columns, diagonals = _line_scores(
        q, layers, layer=1, q_start=start, kv_len_B=jnp.array(kv_len, jnp.int32), rotary=rotary,
        scale_B=jnp.full(B, scale, jnp.float32), last_queries=last,
    )  # fmt: skip
    assert columns.shape == diagonals.shape == (B, N, S)
    tolerance = 2e-5 * max(1, scale)
    for b, length in enumerate(kv_len):
        want = oracle(
            q[b].astype(np.float64), k[b].astype(np.float64), start=start, end=min(start + T, length), dca=dca,
            scale=scale, last=last,
        )  # fmt: skip
        np.testing.assert_allclose(columns[b], want[0], rtol=tolerance, atol=1e-7)
        np.testing.assert_allclose(diagonals[b], want[1], rtol=tolerance, atol=1e-7)


@pytest.fixture(autouse=True, scope="module")
def small_tiles() -> Iterator[None]:
    """Several tiles a stage, the last of which overhangs the stage or the cache."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(reference, "KEY_TILE", 40)
        yield


@pytest.mark.parametrize("start", [0, 96, 192, 288])
def test_every_stage(start: int) -> None:
    check(start, 96, (start + 96,))


def test_plain_positions_at_an_offset() -> None:
    check(123, 96, (219,), dca=None)


@pytest.mark.parametrize("length", [193, 200, 256, 257])
def test_a_piece_shorter_than_the_last_queries_counts_what_it_has(length: int) -> None:
    check(192, 96, (length,))


def test_a_piece_of_one_token() -> None:
    check(200, 1, (201,))


def test_rows_of_different_lengths_and_a_row_that_ended_before() -> None:
    check(192, 96, (288, 210, 192, 17))


@pytest.mark.parametrize("heads", [(7, 1), (4, 2)])
def test_query_groups(heads: tuple[int, int]) -> None:
    check(288, 96, (350,), heads=heads)


def test_fewer_last_queries() -> None:
    check(192, 96, (288,), last=5)


def test_large_scores_do_not_overflow() -> None:
    check(192, 96, (288,), scale=30.0)


def test_the_cache_end_bounds_the_tiles() -> None:
    check(384, 16, (400,))


def test_a_diagonal_that_dominates_is_the_best_of_its_scores() -> None:
    """A key that copies the query 150 before it: the scores of distance 150 stand out, across a chunk boundary too."""
    rotary, T, distance = Rotary(THETA, H, 1024, dca=DCA), 96, 150
    rng = np.random.default_rng(0)
    k = rng.standard_normal((1, S, 1, H)).astype(np.float32)
    positions = jnp.arange(S, dtype=jnp.int32)
    k_BKSH = jnp.swapaxes(rotary.rotate_keys(jnp.asarray(k), positions), 1, 2)
    start = 288
    # The rotation of a query that is best for its key: turned back by the distance at which it is seen.
    q = rotary.rotate(jnp.asarray(k[:, start - distance : start - distance + T]), jnp.zeros(T, jnp.int32))
    i = jnp.arange(start, start + T, dtype=jnp.int32)
    seen = rotary.cos_sin(
        jnp.array([critical_distance(int(a), int(a) - distance, DCA) for a in i], jnp.int32)
    )
    x, y = jnp.split(q, 2, -1)
    cos, sin = (t[:, None] for t in seen)
    q = jnp.concatenate([x * cos + y * sin, y * cos - x * sin], -1)
    _, diagonals = line_scores(
        3 * q,
        k_BKSH[None],
        layer=0,
        q_start=start,
        kv_len_B=jnp.array([start + T]),
        rotary=rotary,
        scale_B=jnp.ones(1),
    )
    assert int(jnp.argmax(jnp.where(jnp.isinf(diagonals), 0, diagonals))) == distance


def test_an_unknown_backend_and_no_queries_are_refused() -> None:
    call = {
        "layer": 0, "q_start": 0, "kv_len_B": jnp.ones(1, jnp.int32), "rotary": Rotary(THETA, H, 64), "scale_B": jnp.ones(1)
    }  # fmt: skip
    q, k = jnp.zeros((1, 4, 1, H)), jnp.zeros((1, 1, 1, 8, H))
    with pytest.raises(
        ValueError, match="no line scores backend 'none'; there are mosaic_gpu, mosaic_tpu, xla"
    ):
        line_scores(q, k, backend="none", **call)
    with pytest.raises(ValueError, match="last_queries must be at least 1"):
        line_scores(q, k, last_queries=0, **call)
