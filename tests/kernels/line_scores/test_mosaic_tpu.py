"""The TPU kernels without a TPU: numerics under jax's TPU interpreter, compilation by the TPU's compiler, refusals."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from qwen_jax.config import DualChunk
from qwen_jax.kernels.line_scores import mosaic_tpu, reference
from qwen_jax.rope import Rotary
from scripts import tpu_topology
from tests.kernels.tpu_interpreter import INTERPRETER, races_found

QWEN_1M = DualChunk(262_144, 8_192)


def test_agrees_with_the_reference_across_every_stage_and_ragged_rows() -> None:
    """The last keys end within a tile, the cache too; another row has ended before the piece."""
    dca, q_start, queries, last = DualChunk(320, 64), 512, 80, 60
    H, end = 64, q_start + queries - 5
    rotary = Rotary(1e4, H, 1024, dca=dca)  # s = 256
    rng = np.random.default_rng(0)
    q = jnp.asarray(rng.standard_normal((2, queries, 3, H)), jnp.bfloat16)
    k = jnp.asarray(rng.standard_normal((2, 2, 1, 600, H)), jnp.bfloat16)
    call: dict[str, Any] = {
        "layer": jnp.int32(1), "q_start": jnp.int32(q_start), "end_B": jnp.array([end, 100], jnp.int32),
        "rotary": rotary, "scale_B": jnp.full(2, 1.5 * H**-0.5), "last_queries": last,
    }  # fmt: skip
    got = jax.jit(lambda q, k: mosaic_tpu.attention_sums(q, k, block_kv=128, interpret=INTERPRETER, **call))(
        q, k
    )
    jax.block_until_ready(got)
    assert not races_found()
    want = reference.attention_sums(q, k, **call)
    for sums, right in zip(got, want, strict=True):
        assert sums.shape == right.shape
        assert not np.asarray(sums)[1].any()
        sums, right = np.asarray(sums)[0, :, :end], np.asarray(right)[0, :, :end]
        np.testing.assert_allclose(sums.sum(-1), last, rtol=1e-5)  # every query's sum is 1
        assert np.linalg.norm(sums - right) < 1e-2 * np.linalg.norm(right)


def compile_sums(generation: str, heads: tuple[int, int], head_dim: int, queries: int, capacity: int) -> Any:
    (N, K), shape = heads, jax.ShapeDtypeStruct
    rotary = Rotary(1e7, head_dim, 1 << 20, dca=QWEN_1M)

    def call(q: Any, k: Any, layer: Any, start: Any, end: Any, scale: Any) -> Any:
        return mosaic_tpu.attention_sums(
            q, k, layer=layer, q_start=start, end_B=end, rotary=rotary, scale_B=scale, last_queries=64
        )

    return tpu_topology.compile_for_one(
        tpu_topology.SMALLEST[generation], call, shape((1, queries, N, head_dim), jnp.bfloat16),
        shape((2, 1, K, capacity, head_dim), jnp.bfloat16), shape((), jnp.int32), shape((), jnp.int32),
        shape((1,), jnp.int32), shape((1,), jnp.float32),
    )  # fmt: skip


@pytest.mark.skipif(tpu_topology.why_no_compiler() is not None, reason=tpu_topology.why_no_compiler() or "")
@pytest.mark.parametrize(
    ("generation", "heads", "head_dim"), [("v5e", (28, 4), 128), ("v6e", (28, 4), 128), ("v5e", (14, 2), 64)]
)
def test_compiles_for_a_tpu_without_copying_the_cache(
    generation: str, heads: tuple[int, int], head_dim: int
) -> None:
    S = 131_072
    compiled = compile_sums(generation, heads, head_dim, 2048, S)
    assert compiled.as_text().count('custom_call_target="tpu_custom_call"') == 2
    text, cache = compiled.as_text(), f"bf16[2,1,{heads[1]},{S},{head_dim}]"
    copies = [line for line in text.splitlines() if f"= {cache}" in line and "parameter(" not in line]
    assert cache in text
    assert all("bitcast(" in line for line in copies)


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"dtype": jnp.float32}, "needs bfloat16"),
        ({"head_dim": 80}, "head dimension of 64 or 128"),
        ({"last_queries": 65}, "at most 64 last queries"),
        ({"dca": DualChunk(128, 64)}, "multiple of 128"),
    ],
)
def test_refuses_what_it_cannot_do(change: dict[str, Any], reason: str) -> None:
    made = {"dtype": jnp.bfloat16, "head_dim": 64, "dca": None, "last_queries": 64} | change
    q, k = (jnp.zeros((*size, made["head_dim"]), made["dtype"]) for size in ((1, 8, 1), (1, 1, 1, 256)))
    with pytest.raises(NotImplementedError, match=reason):
        mosaic_tpu.attention_sums(
            q, k, layer=jnp.int32(0), q_start=jnp.int32(0), end_B=jnp.ones(1, jnp.int32),
            rotary=Rotary(1e4, made["head_dim"], 512, dca=made["dca"]), scale_B=jnp.ones(1),
            last_queries=made["last_queries"], interpret=True,
        )  # fmt: skip
