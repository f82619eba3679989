"""The Hopper kernel without a Hopper GPU: numerics under jax's GPU interpreter, lowering for cuda, refusals.

On the GPU itself `scripts/check_gpu.py` checks every class of shapes.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Iterator
from typing import Any

import jax
import jax.experimental.pallas.mosaic_gpu as plgpu
import jax.numpy as jnp
import pytest

from qwen_jax.config import DualChunk
from qwen_jax.kernels.blocks import Blocks, Share
from qwen_jax.kernels.sparse_attention import api, hopper, mosaic_gpu
from qwen_jax.kernels.sparse_attention.bands import BAND, tile_distances
from qwen_jax.rope import Rotary
from tests.kernels.sparse_attention.suite import Check

S = 6 * BAND - 56
check = Check(
    "mosaic_gpu", BAND, S, 64, DualChunk(3 * BAND, BAND), dtype=jnp.bfloat16, tolerance=3e-2, most=200
)


@pytest.fixture(scope="module")
def interpreted() -> Iterator[None]:
    """Two blocks, so that a block runs several items in a row. One program serves all calls."""
    if jax.__version_info__ < (0, 12):
        pytest.skip("the GPU interpreter of this jax loses track of barriers; the kernel itself runs on it")
    run = functools.partial(mosaic_gpu.attend_lines, interpret=plgpu.InterpretGPUParams())
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(api.BACKENDS, "mosaic_gpu", run)
        patch.setattr(hopper, "multiprocessors", lambda: 2)
        yield


@pytest.mark.usefixtures("interpreted")
@pytest.mark.parametrize(("into", "lengths"), [(0, (144, 3)), (20, (140, 100))])
def test_every_stage_of_a_ragged_piece_in_the_third_chunk(into: int, lengths: tuple[int, int]) -> None:
    """It starts with a tile or inside one; a row that has ended is finite."""
    start = 4 * BAND + into
    check(start, 144, (start + lengths[0], start + lengths[1]), (1, 1))


@pytest.mark.usefixtures("interpreted")
@pytest.mark.parametrize(
    ("blocks", "tiles", "into", "plain"),
    [
        (Blocks(BAND, 2), 6, 20, False),
        (Blocks(2 * BAND, 2), 8, 0, True),
        (Blocks(BAND, 4), 12, 20, False),
    ],
)
def test_devices_that_hold_shares_agree_with_one(blocks: Blocks, tiles: int, into: int, plain: bool) -> None:
    """In the third chunk of rounds, from a tile's start or inside one, to a row's end; one row ends in the first tile."""
    shared = dataclasses.replace(check, capacity=tiles * BAND, dca=DualChunk(3 * blocks.round, blocks.round))
    start = (tiles - 2) * BAND + into
    shared(start, 144, (start + 140, start + 3), (1, 1), plain=plain, dca=DualChunk(blocks.round + BAND, BAND), blocks=blocks)


@pytest.fixture
def on_hopper(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(mosaic_gpu, "why_not_hopper", lambda: None)


def call(
    q: Any, k: Any, v: Any, columns: Any, bands: Any, layer: Any, start: Any, length: Any, scale: Any,
    *, dca: DualChunk | None, band: int = BAND,
) -> Any:  # fmt: skip
    return mosaic_gpu.attend_lines(
        q, k, v, columns_BNS=columns, bands_BNM=bands, most_columns=1000, layer=layer, q_start=start,
        kv_len_B=length, rotary=Rotary(1e7, q.shape[-1], 1 << 20, dca=dca), scale_B=scale, band=band,
    )  # fmt: skip


def arguments(heads: tuple[int, int], head_dim: int, dtype: Any = jnp.bfloat16) -> list[jax.ShapeDtypeStruct]:
    (N, K), capacity = heads, 4096
    cache = jax.ShapeDtypeStruct((2, 1, K, capacity, head_dim), dtype)
    scalar, row = jax.ShapeDtypeStruct((), jnp.int32), jax.ShapeDtypeStruct((1,), jnp.int32)
    return [
        jax.ShapeDtypeStruct((1, 512, N, head_dim), dtype), cache, cache,
        jax.ShapeDtypeStruct((1, N, capacity), bool), jax.ShapeDtypeStruct((1, N, tile_distances(capacity)), bool),
        scalar, scalar, row, jax.ShapeDtypeStruct((1,), jnp.float32),
    ]  # fmt: skip


@pytest.mark.usefixtures("on_hopper")
@pytest.mark.parametrize(
    ("heads", "head_dim", "dca"), [((28, 4), 128, DualChunk(262_144, 8_192)), ((5, 1), 64, None)]
)
def test_lowers_for_cuda_without_copying_the_cache(
    heads: tuple[int, int], head_dim: int, dca: DualChunk | None
) -> None:
    traced = jax.jit(functools.partial(call, dca=dca)).trace(*arguments(heads, head_dim))
    text = traced.lower(lowering_platforms=("cuda",)).as_text()
    assert "mosaic_gpu" in text
    # K and V enter by a reshape, and nothing else makes one.
    cache = f"tensor<{2 * heads[1]}x4096x{head_dim}xbf16>"
    assert sum(f"-> {cache}" in line for line in text.splitlines() if "custom_call" not in line) == 2


@pytest.mark.usefixtures("on_hopper")
@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"dtype": jnp.float32}, "needs bfloat16"),
        ({"head_dim": 80}, "head dimension of 64 or 128"),
        ({"dca": DualChunk(200, 8)}, "chunk length 192 is not a multiple of the band, 128"),
        ({"band": 64}, "needs bands of 128, got 64"),
    ],
)
def test_refuses_what_it_cannot_do(change: dict[str, Any], reason: str) -> None:
    made = {"dtype": jnp.bfloat16, "head_dim": 64, "dca": None, "band": BAND} | change
    with pytest.raises(NotImplementedError, match=reason):
        jax.eval_shape(
            functools.partial(call, dca=made["dca"], band=made["band"]),
            *arguments((2, 1), made["head_dim"], made["dtype"]),
        )
