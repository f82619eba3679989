"""The mixing of channels: what the map is, and what it is for."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from qwen_jax.kernels import mixing

H = 128


@pytest.mark.parametrize("head_dim", [16, 80, 128])
def test_mixing_is_orthogonal(head_dim: int) -> None:
    identity = jnp.eye(head_dim)
    queries, keys = (np.asarray(f(identity, jnp.float32), np.float64) for f in (mixing.mix, mixing.mix_keys))
    np.testing.assert_array_equal(queries @ keys.T, np.eye(head_dim))
    np.testing.assert_array_equal(mixing.unmix(mixing.mix_keys(identity, jnp.float32)), identity)
    # One channel, or all of them alike, end up spread: no number far above the rest.
    for vector in (identity[3], jnp.ones(head_dim)):
        spread = 3.5 * np.linalg.norm(vector) / mixing.block(head_dim) ** 0.5
        assert np.abs(mixing.mix(vector, jnp.float32)).max() <= spread * 2**0.5
        assert np.abs(mixing.mix_keys(vector, jnp.float32)).max() <= spread


def test_mixing_never_changes() -> None:
    """Caches on disk depend on it."""
    assert (2 * np.asarray(mixing.mix(jnp.eye(8), jnp.float32))).astype(int).tolist() == [
        [1, 1, 1, 1, 1, 1, 1, 1],
        [1, -1, 1, -1, 1, -1, 1, -1],
        [-1, -1, 1, 1, -1, -1, 1, 1],
        [1, -1, -1, 1, 1, -1, -1, 1],
        [-1, -1, -1, -1, 1, 1, 1, 1],
        [-1, 1, -1, 1, 1, -1, 1, -1],
        [-1, -1, 1, 1, 1, 1, -1, -1],
        [1, -1, -1, 1, -1, 1, 1, -1],
    ]
    np.testing.assert_array_equal(
        mixing.mix_keys(jnp.eye(8), jnp.float32), mixing.mix(jnp.eye(8), jnp.float32) / 2
    )


def test_vectors_of_any_model_stay_in_the_range_of_float16() -> None:
    """The worst there is: all of 128 channels as large as the signs let add up."""
    q, k = (size * jnp.sign(jnp.asarray(mixing.signs(H)[:, 5], jnp.float32)) for size in (4000.0, 8000.0))
    assert jnp.isfinite(mixing.mix(q, jnp.float16)).all()
    assert jnp.isfinite(mixing.mix_keys(k, jnp.float16)).all()


@pytest.mark.parametrize("head_dim", [16, 80, 128])
@pytest.mark.parametrize(
    ("dtype", "most"), [(jnp.float32, 1e-5), (jnp.bfloat16, 6e-3), (jnp.float16, 8e-4)], ids=str
)
def test_products_of_mixed_queries_and_keys(head_dim: int, dtype: jnp.dtype, most: float) -> None:
    q, k = (np.random.default_rng(n).standard_normal((200, head_dim)) for n in range(2))
    mixed_q, mixed_k = (
        mixing.mix(jnp.asarray(q, jnp.float32), dtype),
        mixing.mix_keys(jnp.asarray(k, jnp.float32), dtype),
    )
    assert mixed_q.dtype == mixed_k.dtype == dtype
    got = np.asarray(mixed_q, np.float64) @ np.asarray(mixed_k, np.float64).T
    assert np.linalg.norm(got - q @ k.T) <= most * np.linalg.norm(q @ k.T)


def test_mixed_products_are_rounded_less_where_one_channel_makes_the_score() -> None:
    """bfloat16 queries and keys of a sink, mixed, against unmixed ones: the error of scores of 15 nats."""
    q, k = (np.random.default_rng(n).standard_normal((500, H)) for n in range(2))
    q[:, 77], k[:, 77] = 11.65 * np.cos(0.034), 15 * H**0.5 / 11.65
    q, k = (jnp.asarray(x, jnp.float32) for x in (q, k))

    def off(q: jax.Array, k: jax.Array, held: jax.Array) -> float:
        """Of products with keys as a cache holds them, which are right: the queries' share of the error."""
        got, want = (
            np.einsum("SH,SH->S", *(np.asarray(x, np.float64) for x in pair)) for pair in ((q, k), held)
        )
        return float(np.sqrt(np.mean((got - want) ** 2)) * H**-0.5)

    plain, mixed = k.astype(jnp.bfloat16), mixing.mix_keys(k, jnp.bfloat16)
    unmixed = off(q.astype(jnp.bfloat16), plain, (q, plain))
    exact = q, mixing.unmix(mixed.astype(jnp.float32))
    assert off(mixing.mix(q, jnp.bfloat16), mixed, exact) <= 0.4 * unmixed
    # Rounded before they are mixed, queries would have lost it.
    early = q.astype(jnp.bfloat16).astype(jnp.float32)
    assert off(mixing.mix(early, jnp.bfloat16), mixed, exact) >= 0.5 * unmixed
