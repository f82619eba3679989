"""The XLA backend: the shared suite, its gradient, its memory, and chunks of every size."""

from __future__ import annotations

import functools
from collections.abc import Iterator

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from qwen_jax.config import DualChunk
from qwen_jax.kernels.attention import api, reference
from qwen_jax.rope import Rotary
from tests.kernels.attention.suite import THETA, AttentionSuite, Case


class TestXla(AttentionSuite):
    backend = "xla"


class TestXlaBfloat16(AttentionSuite):
    backend = "xla"
    dtype = jnp.bfloat16
    tolerance = 1e-2
    large_scale = 1.0


class TestXlaUnmixed(TestXlaBfloat16):
    mixed = False


class TestXlaKeysOfFloat16(TestXlaBfloat16):
    keys_dtype = jnp.float16


class TestXlaOverSeveralTiles(AttentionSuite):
    """The same suite with tiles of 8 queries and 24 keys: ranges that are no multiple of a tile, overhanging caches."""

    backend = "xla"

    @pytest.fixture(autouse=True, scope="class")
    @classmethod
    def small_tiles(cls) -> Iterator[None]:
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(reference, "QUERY_TILE", 8)
            patch.setattr(reference, "KEY_TILE", 24)
            jax.clear_caches()
            yield
        jax.clear_caches()

    @settings(max_examples=8, deadline=None, derandomize=True)
    @given(data=st.data())
    def test_any_chunk_and_window(self, data: st.DataObject) -> None:
        s = data.draw(st.integers(3, 20), "s")
        w = data.draw(st.integers(1, s), "w")
        start = data.draw(st.integers(0, 4 * s), "start")
        queries = data.draw(st.integers(1, s - start % s), "queries")
        self.check(Case(start, queries, (start + queries,), 2, 1), DualChunk(s + w, w))


def dense(
    q_TNH: jax.Array, k_SKH: jax.Array, v_SKH: jax.Array, scale: jax.Array
) -> tuple[jax.Array, jax.Array]:
    """Causal attention without positions, as one softmax."""
    k, v = (jnp.repeat(x, q_TNH.shape[1] // x.shape[1], axis=1) for x in (k_SKH, v_SKH))
    scores = jnp.einsum("TNH,SNH->NTS", q_TNH, k) * scale
    scores = jnp.where(jnp.tril(jnp.ones(scores.shape[1:], bool)), scores, -jnp.inf)
    return jnp.einsum("NTS,SNH->TNH", jax.nn.softmax(scores), v), jax.nn.logsumexp(scores, -1).T


def test_gradients_of_out_and_lse_equal_those_of_dense_attention(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(reference, "QUERY_TILE", 8)
    monkeypatch.setattr(reference, "KEY_TILE", 8)
    jax.clear_caches()
    rng = np.random.default_rng(1)
    T, N, K, H = 21, 4, 2, 6
    q, k, v, w = (jnp.asarray(rng.standard_normal((T, n, H)), jnp.float32) for n in (N, K, K, N))
    u = jnp.asarray(rng.standard_normal((T, N)), jnp.float32)
    still = Rotary(
        1e30, H, 64
    )  # so large a base leaves all but the first pair unturned; that one is zero below
    q, k = (x.at[..., 0].set(0).at[..., H // 2].set(0) for x in (q, k))

    def ours(q: jax.Array, k: jax.Array, v: jax.Array, scale: jax.Array) -> jax.Array:
        out, lse = api.attend(
            q[None],
            jnp.swapaxes(k, 0, 1)[None, None],
            jnp.swapaxes(v, 0, 1)[None, None],
            layer=0,
            q_start=0,
            kv_len_B=jnp.array([T]),
            rotary=still,
            scale_B=scale[None],
        )
        return (out[0] * w).sum() + (lse[0] * u).sum()

    def theirs(q: jax.Array, k: jax.Array, v: jax.Array, scale: jax.Array) -> jax.Array:
        out, lse = dense(q, k, v, scale)
        return (out * w).sum() + (lse * u).sum()

    args = (q, k, v, jnp.float32(0.4))
    got, want = (jax.jit(jax.grad(f, argnums=(0, 1, 2, 3)))(*args) for f in (ours, theirs))
    for a, b in zip(got, want, strict=True):
        a, b = (x.at[..., 0].set(0).at[..., H // 2].set(0) if x.ndim > 1 else x for x in (a, b))
        np.testing.assert_allclose(a, b, rtol=2e-4, atol=2e-5)


def test_memory_is_a_tile_pair_not_the_score_matrix() -> None:
    T, S, N, K, H = 4096, 65_536, 4, 2, 64
    shape = jax.ShapeDtypeStruct
    lowered = jax.jit(reference.attend, static_argnames="rotary").lower(
        shape((1, T, N, H), jnp.bfloat16),
        *(shape((2, 1, K, S, H), jnp.bfloat16) for _ in range(2)),
        layer=shape((), jnp.int32),
        q_start=shape((), jnp.int32),
        kv_len_B=shape((1,), jnp.int32),
        rotary=Rotary(THETA, H, S, dca=DualChunk(32_768, 4096)),
        scale_B=shape((1,), jnp.float32),
    )
    queries = 3 * T * N * H * 2  # rotated for three stages
    tile_pair = reference.QUERY_TILE * reference.KEY_TILE * N * 4
    temporary = lowered.compile().memory_analysis().temp_size_in_bytes
    assert temporary < 6 * queries + 8 * tile_pair
    assert temporary < T * S * N  # a byte a score would already be 1 GiB


def test_float32_queries_over_a_16_bit_cache_keep_what_they_hold() -> None:
    q, k, v = (jax.random.normal(jax.random.key(n), (1, 1, 2, 64, 16)) for n in range(3))
    call = functools.partial(
        api.attend, jnp.swapaxes(q[0], 1, 2), layer=0, q_start=0, kv_len_B=jnp.array([64]), rotary=Rotary(1e4, 16, 64),
        scale_B=jnp.full(1, 0.25),
    )  # fmt: skip
    k, v = k.astype(jnp.bfloat16), v.astype(jnp.bfloat16)
    got, want = call(k, v)[0], call(k.astype(jnp.float32), v.astype(jnp.float32))[0]
    assert got.dtype == jnp.float32
    assert jnp.abs(got - want).max() <= 2e-2
    assert (got != got.astype(jnp.bfloat16)).mean() >= 0.9


def test_unknown_backend_is_named() -> None:
    with pytest.raises(ValueError, match=r"no attention backend 'nope'; there are .*xla"):
        api.attend(
            *(jnp.zeros(()),) * 3, layer=0, q_start=0, kv_len_B=0, rotary=None, scale_B=0, backend="nope"
        )  # type: ignore[arg-type]


def test_all_refusals_are_reported(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(reason: str) -> api.Backend:
        def backend(*args: object, **kwargs: object) -> tuple[jax.Array, jax.Array]:
            raise NotImplementedError(reason)

        return backend

    monkeypatch.setattr(api, "BACKENDS", {"a": refuse("no such chip"), "b": refuse("odd heads")})
    with pytest.raises(NotImplementedError, match="a: no such chip; b: odd heads"):
        api.attend(*(jnp.zeros(()),) * 3, layer=0, q_start=0, kv_len_B=0, rotary=None, scale_B=0)  # type: ignore[arg-type]
