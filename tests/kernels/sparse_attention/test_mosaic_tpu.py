"""The TPU kernel without a TPU: numerics under jax's TPU interpreter, compilation by the TPU's compiler, refusals."""

from __future__ import annotations

import dataclasses
import functools
import re
from collections.abc import Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from qwen_jax.config import DualChunk
from qwen_jax.kernels.sparse_attention import api, mosaic_tpu
from qwen_jax.kernels.sparse_attention.bands import BAND, tile_distances
from qwen_jax.kernels.sparse_attention.tpu import Tiling
from qwen_jax.rope import Rotary
from scripts import tpu_topology
from tests.kernels.sparse_attention.suite import Check
from tests.kernels.tpu_interpreter import INTERPRETER, races_found

QWEN_1M = DualChunk(262_144, 8_192)
S = 9 * BAND - 48
check = Check(
    "mosaic_tpu", BAND, S, 128, DualChunk(4 * BAND, BAND), dtype=jnp.bfloat16, tolerance=3e-2, most=300
)


@pytest.fixture
def interpreted(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Blocks of two query tiles, steps of two distances; whatever reads memory that nobody wrote gets NaN."""
    run = functools.partial(mosaic_tpu.attend_lines, interpret=INTERPRETER, tiling=Tiling(2, 2))
    monkeypatch.setitem(api.BACKENDS, "mosaic_tpu", run)
    jax.clear_caches()
    yield
    assert not races_found()


@pytest.mark.usefixtures("interpreted")
def test_every_stage_of_a_ragged_piece_in_the_third_chunk() -> None:
    """The other row has ended, and is finite."""
    start = 6 * BAND
    check(start, 200, (start + 190, start + 3), (1, 1))


def test_bands_near_and_far_of_a_piece_that_starts_in_a_tile(
    interpreted: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Steps of two distances that one copy serves, and that need two; columns left out by the matrix unit."""
    run = functools.partial(mosaic_tpu.attend_lines, interpret=INTERPRETER, tiling=Tiling(2, 2, wide=True))
    monkeypatch.setitem(api.BACKENDS, "mosaic_tpu", run)
    wide = dataclasses.replace(check, capacity=20 * BAND, head_dim=128)
    columns, bands = wide.no_lines(1, 1)
    columns[..., np.random.default_rng(0).choice(18 * BAND, 300, replace=False)] = True
    bands[..., [1, 2, 3, 8, 13, 14]] = True
    start = 16 * BAND + 20
    wide(start, 200, (start + 200,), (1, 1), plain=True, lines=(columns, bands))


needs_compiler = pytest.mark.skipif(
    tpu_topology.why_no_compiler() is not None, reason=tpu_topology.why_no_compiler() or ""
)


def call(
    q: Any, k: Any, v: Any, columns: Any, bands: Any, layer: Any, start: Any, length: Any, scale: Any,
    *, dca: DualChunk | None, band: int = BAND, interpret: bool = False,
) -> Any:  # fmt: skip
    return mosaic_tpu.attend_lines(
        q, k, v, columns_BNS=columns, bands_BNM=bands, most_columns=4096, layer=layer, q_start=start,
        kv_len_B=length, rotary=Rotary(1e7, q.shape[-1], 1 << 20, dca=dca), scale_B=scale, band=band, interpret=interpret,
    )  # fmt: skip


def arguments(
    T: int, heads: tuple[int, int], head_dim: int, capacity: int, dtype: Any = jnp.bfloat16
) -> list[jax.ShapeDtypeStruct]:
    N, K = heads
    cache = jax.ShapeDtypeStruct((2, 1, K, capacity, head_dim), dtype)
    scalar, row = jax.ShapeDtypeStruct((), jnp.int32), jax.ShapeDtypeStruct((1,), jnp.int32)
    return [
        jax.ShapeDtypeStruct((1, T, N, head_dim), dtype), cache, cache,
        jax.ShapeDtypeStruct((1, N, capacity), bool), jax.ShapeDtypeStruct((1, N, tile_distances(capacity)), bool),
        scalar, scalar, row, jax.ShapeDtypeStruct((1,), jnp.float32),
    ]  # fmt: skip


@needs_compiler
@pytest.mark.parametrize("generation", ["v5e", "v6e"])
def test_compiles_for_a_tpu_without_copying_the_cache(generation: str) -> None:
    """At the heads of 7B; `scripts/aot_report.py` compiles whole programs of a million tokens."""
    S = 131_072
    text = tpu_topology.compile_for_one(
        tpu_topology.SMALLEST[generation], functools.partial(call, dca=QWEN_1M),
        *arguments(2048, (28, 4), 128, S),
    ).as_text()  # fmt: skip
    assert "tpu_custom_call" in text
    caches = [line for line in text.splitlines() if re.search(rf"= bf16\[(2,1|1,1|1|2)?,?4,{S},128\]", line)]
    assert caches
    assert all(re.search(r"(parameter|get-tuple-element|bitcast)\(", line) for line in caches), caches


@needs_compiler
def test_a_cache_with_heads_of_64_is_refused_before_it_is_copied() -> None:
    with pytest.raises(NotImplementedError, match="a head of 64 lies along lanes"):
        tpu_topology.compile_for_one(
            tpu_topology.SMALLEST["v5e"], functools.partial(call, dca=None), *arguments(512, (2, 1), 64, 4096)
        )


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"dtype": jnp.float32}, "needs bfloat16"),
        ({"head_dim": 80}, "head dimension of 64 or 128"),
        ({"dca": DualChunk(200, 8)}, "chunk length 192 is not a multiple of the band, 128"),
        ({"band": 64}, "needs bands of 128, got 64"),
        ({"capacity": 1024}, "at least 2048 positions, got 1024"),
    ],
)
def test_refuses_what_it_cannot_do(change: dict[str, Any], reason: str) -> None:
    made = {"dtype": jnp.bfloat16, "head_dim": 64, "dca": None, "band": BAND, "capacity": 4096} | change
    with pytest.raises(NotImplementedError, match=reason):
        jax.eval_shape(
            functools.partial(call, dca=made["dca"], band=made["band"], interpret=True),
            *arguments(512, (2, 1), made["head_dim"], made["capacity"], made["dtype"]),
        )
