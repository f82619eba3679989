"""8-bit vectors: what is lost, and attention on them against the float64 oracle of the exact inputs."""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from qwen_jax.config import DualChunk
from qwen_jax.kernels import mixing, quantised
from qwen_jax.kernels.attention.api import attend
from qwen_jax.kernels.decode_attention.api import decode_attend
from qwen_jax.rope import Rotary
from tests.kernels import oracle

INT8, FP8 = quantised.DTYPES
THETA, T, N, K, H = 1e4, 8, 4, 2, 128
DCA = DualChunk(320, 64)
S = 640  # two and a half chunks of s = 256
_attend = jax.jit(attend, static_argnames=("rotary", "backend"))
_decode_attend = jax.jit(decode_attend, static_argnames=("rotary", "backend"))


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_zeros_and_the_largest_number(dtype: jnp.dtype) -> None:
    x = jnp.zeros((2, 16), dtype).at[1, 0].set(3)
    for kind in quantised.DTYPES:
        numbers, factor = quantised.quantise(x, kind)
        assert (numbers.dtype, factor.dtype, factor.shape) == (kind, jnp.float32, (2,))
        np.testing.assert_allclose(quantised.expand(numbers, factor, dtype).astype(jnp.float32), x, atol=2e-2)
        assert not np.asarray(numbers[0], np.float32).any()


@pytest.mark.parametrize("head_dim", [16, 80])
def test_a_mixed_layer_has_the_products_and_means_of_what_was_quantised(head_dim: int) -> None:
    rng = np.random.default_rng(0)
    x = jnp.asarray(rng.standard_normal((3, 2, 2, 100, head_dim)), jnp.float32)
    q, p = (jnp.asarray(rng.standard_normal(shape), jnp.float32) for shape in ((7, head_dim), (7, 100)))
    numbers, factor = quantised.quantise(x, INT8)
    plain = quantised.expand(numbers, factor, jnp.float32)[1]
    (mixed,) = quantised.read_mixed(numbers, factor, jnp.int32(1), jnp.float32)
    np.testing.assert_allclose(
        jnp.einsum("TH,BKSH->BKTS", mixing.mix(q, jnp.float32), mixed),
        jnp.einsum("TH,BKSH->BKTS", q, plain),
        atol=1e-4,
    )
    np.testing.assert_allclose(
        mixing.unmix(jnp.einsum("TS,BKSH->BKTH", p, mixed)), jnp.einsum("TS,BKSH->BKTH", p, plain),
        atol=1e-4,
    )  # fmt: skip


def inputs(kind: str) -> list[np.ndarray]:
    """q [T, N, H], k and v [S, K, H], unrotated float32: normal, or with channels far larger than the others."""
    rng = np.random.default_rng(0)
    q, k, v = (rng.standard_normal(shape) for shape in ((T, N, H), (S, K, H), (S, K, H)))
    if kind == "loud channels":
        for x in (k, v):
            x[..., [5, 40, 77, 120]] *= 10
    if kind == "biases":  # of keys, on pairs that turn slowly, as Qwen2.5's are
        k[..., [50, 60, 114, 124]] += 20
    return [x.astype(np.float32) for x in (q, k, v)]


def error(kind: str, dtype: jnp.dtype, decode: bool) -> float:
    """||8 bits - exact|| / ||exact|| of the outputs of T queries at the end, prefilled from a mixed layer or decoded."""
    q, k, v = inputs(kind)
    rotary = Rotary(THETA, H, S, dca=DCA)
    i_T = np.arange(S - T, S)
    want, _ = oracle.attention(
        q, k, v, i_T=i_T, kv_len=S, theta=THETA, s=DCA.chunk_len, clip=DCA.saturation, scale=H**-0.5
    )
    rotated = rotary.rotate_keys(jnp.asarray(k), jnp.arange(S))
    (k8, k_scale), (v8, v_scale) = (
        quantised.quantise(jnp.swapaxes(x, 0, 1)[None, None], dtype) for x in (rotated, jnp.asarray(v))
    )
    scale = jnp.full(1, H**-0.5)
    mixed = dataclasses.replace(rotary, mixed=True)
    if decode:
        got = np.stack([
            _decode_attend(
                q[None, t], k8, v8, layer=0, position_B=i_T[None, t], prompt_len_B=jnp.full(1, S), rotary=mixed,
                scale_B=scale, k_scale_LBKS=k_scale, v_scale_LBKS=v_scale,
            )[0][0] for t in range(T)
        ])  # fmt: skip
    else:
        k_, v_ = (quantised.read_mixed(*x, 0, jnp.float32) for x in ((k8, k_scale), (v8, v_scale)))
        out = _attend(
            q[None], k_, v_, layer=0, q_start=S - T, kv_len_B=jnp.full(1, S), rotary=mixed, scale_B=scale
        )[0][0]
        got = mixing.unmix(out)
    return float(np.linalg.norm(got - want) / np.linalg.norm(want))


@pytest.mark.parametrize("decode", [False, True], ids=["prefill", "decode"])
@pytest.mark.parametrize(
    ("kind", "dtype", "least", "most"),
    [
        ("normal", INT8, 6e-3, 1.2e-2), ("loud channels", INT8, 6e-3, 2e-2), ("biases", INT8, 6e-3, 2e-2),
        ("normal", FP8, 2.5e-2, 4.5e-2), ("loud channels", FP8, 2.5e-2, 1.2e-1), ("biases", FP8, 2.5e-2, 1.2e-1),
    ],
)  # fmt: skip
def test_attention_on_8_bits(kind: str, dtype: jnp.dtype, least: float, most: float, decode: bool) -> None:
    """int8 stays within 2e-2 of exact attention whatever the channels are like; fp8, with 3 bits of mantissa, cannot."""
    assert least <= error(kind, dtype, decode) <= most


def test_without_mixing_biases_ruin_int8(monkeypatch: pytest.MonkeyPatch) -> None:
    """The inputs above are hard: the same numbers fitted to the loudest channel are off by more than twice the bound."""
    monkeypatch.setattr(mixing, "signs", np.eye)
    monkeypatch.setattr(mixing, "block", lambda H: 1)
    jax.clear_caches()
    assert error("biases", INT8, decode=False) > 4e-2
    jax.clear_caches()
