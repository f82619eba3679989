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
import numpy as np
import pytest

from qwen_jax.config import DualChunk
from qwen_jax.kernels.blocks import Blocks, Share
from qwen_jax.kernels.sparse_attention import api, hopper, mosaic_gpu
from qwen_jax.kernels.sparse_attention.bands import BAND, tile_distances
from qwen_jax.rope import Rotary
from tests.kernels.sparse_attention import suite
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
def test_keys_of_float16() -> None:
    start = 4 * BAND + 20
    dataclasses.replace(check, keys_dtype=jnp.float16)(start, 144, (start + 140, start + 100), (1, 1))


@pytest.mark.usefixtures("interpreted")
@pytest.mark.parametrize(
    ("blocks", "tiles", "into", "plain"),
    [(Blocks(BAND, 2), 6, 20, False), (Blocks(2 * BAND, 2), 8, 0, True), (Blocks(BAND, 4), 12, 20, False)],
)
def test_devices_that_hold_shares_agree_with_one(blocks: Blocks, tiles: int, into: int, plain: bool) -> None:
    """With dual chunk attention in the third chunk, a round long, of which a row ends in the first tile."""
    start = (tiles - 2) * BAND + into
    dealt = dataclasses.replace(check, capacity=tiles * BAND, dca=DualChunk(blocks.round + BAND, BAND))
    dealt(start, 144, (start + 140, start + 3), (1, 1), plain=plain, blocks=blocks)


@pytest.mark.usefixtures("interpreted")
@pytest.mark.parametrize("distance", [1, 3])
def test_a_walk_may_begin_in_an_older_chunk(distance: int) -> None:
    """Of the third chunk's first query tile the second device has no own key: its only band lies in the chunk before, or in
    the one before that, and columns in all."""
    blocks, start = Blocks(BAND, 2), 4 * BAND
    dealt = dataclasses.replace(check, capacity=6 * BAND, dca=DualChunk(3 * BAND, BAND))
    columns, bands = dealt.no_lines(1, 1)
    columns[..., ::9], bands[..., distance] = True, True
    dealt(start, BAND, (start + BAND,), (1, 1), lines=(columns, bands), blocks=blocks)


@pytest.mark.usefixtures("interpreted")
def test_each_device_gives_what_the_reference_gives_for_its_keys() -> None:
    """The first head has no line: only the device that holds a query's own key tile has a key for it."""
    blocks, start, T, H = Blocks(BAND, 2), 3 * BAND, 200, 64
    rng = np.random.default_rng(0)
    q = jnp.asarray(rng.standard_normal((1, T, 2, H)), jnp.bfloat16)
    k, v = (jnp.asarray(rng.standard_normal((1, 1, 1, 3 * BAND, H)), jnp.bfloat16) for _ in range(2))
    columns, bands = rng.random((1, 2, 3 * BAND)) < 0.1, rng.random((1, 2, 6)) < 0.5
    columns[:, 0], bands[:, 0] = False, False
    for rank in range(2):
        (out, lse), (want, want_lse) = (
            suite.attend(
                q, k, v, columns_BNS=columns, bands_BNM=bands, most_columns=200, layer=0, q_start=start,
                kv_len_B=jnp.array([start + T], jnp.int32), rotary=Rotary(1e4, H, 4096), scale_B=jnp.full(1, 0.125),
                backend=backend, share=Share(blocks, jnp.int32(rank)),
            )
            for backend in ("mosaic_gpu", "xla")
        )  # fmt: skip
        np.testing.assert_allclose(out.astype(np.float32), want.astype(np.float32), rtol=0, atol=3e-2)
        np.testing.assert_array_equal(np.isneginf(lse), np.isneginf(want_lse))
        np.testing.assert_allclose(np.nan_to_num(lse), np.nan_to_num(want_lse), rtol=0, atol=2e-2)
        own = (start + np.arange(T)) // BAND % 2 == rank
        np.testing.assert_array_equal(np.isneginf(lse[0, :, 0]), ~own)


@pytest.fixture
def on_hopper(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(mosaic_gpu, "why_not_hopper", lambda: None)


def call(
    q: Any, k: Any, v: Any, columns: Any, bands: Any, layer: Any, start: Any, length: Any, scale: Any,
    rank: Any = None, *, dca: DualChunk | None, band: int = BAND, blocks: Blocks | None = None, most: int = 1000,
) -> Any:  # fmt: skip
    return mosaic_gpu.attend_lines(
        q, k, v, columns_BNS=columns, bands_BNM=bands, most_columns=most, layer=layer, q_start=start,
        kv_len_B=length, rotary=Rotary(1e7, q.shape[-1], 1 << 20, dca=dca), scale_B=scale, band=band,
        share=Share(blocks, rank) if blocks else None,
    )  # fmt: skip


def arguments(
    heads: tuple[int, int], head_dim: int, dtype: Any = jnp.bfloat16,
    *, queries: int = 512, capacity: int = 4096, devices: int = 1,
) -> list[jax.ShapeDtypeStruct]:  # fmt: skip
    N, K = heads
    cache = jax.ShapeDtypeStruct((2, 1, K, capacity, head_dim), dtype)
    scalar, row = jax.ShapeDtypeStruct((), jnp.int32), jax.ShapeDtypeStruct((1,), jnp.int32)
    return [
        jax.ShapeDtypeStruct((1, queries, N, head_dim), dtype), cache, cache,
        jax.ShapeDtypeStruct((1, N, capacity), bool),
        jax.ShapeDtypeStruct((1, N, tile_distances(devices * capacity)), bool),
        scalar, scalar, row, jax.ShapeDtypeStruct((1,), jnp.float32), *[scalar][: devices - 1],
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
def test_the_14b_at_a_million_tokens_on_two_devices_lowers_for_cuda_without_copying_the_cache() -> None:
    capacity = 1_015_808 // 2
    shapes = arguments((40, 8), 128, queries=31_744, capacity=capacity, devices=2)
    run = functools.partial(call, dca=DualChunk(262_144, 8_192), blocks=Blocks(512, 2), most=30_000)
    text = jax.jit(run).trace(*shapes).lower(lowering_platforms=("cuda",)).as_text()
    assert "mosaic_gpu" in text
    cache = f"tensor<16x{capacity}x128xbf16>"
    assert sum(f"-> {cache}" in line for line in text.splitlines() if "custom_call" not in line) == 2


@pytest.mark.usefixtures("on_hopper")
@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"dtype": jnp.float32}, "needs bfloat16"),
        ({"head_dim": 80}, "head dimension of 64 or 128"),
        ({"dca": DualChunk(200, 8)}, "chunk length 192 is not a multiple of the band, 128"),
        ({"band": 64}, "needs bands of 128, got 64"),
        ({"blocks": Blocks(64, 2)}, "blocks of whole key tiles of 128, got blocks of 64"),
    ],
)
def test_refuses_what_it_cannot_do(change: dict[str, Any], reason: str) -> None:
    made = {"dtype": jnp.bfloat16, "head_dim": 64, "dca": None, "band": BAND, "blocks": None} | change
    with pytest.raises(NotImplementedError, match=reason):
        jax.eval_shape(
            functools.partial(call, dca=made["dca"], band=made["band"], blocks=made["blocks"]),
            *arguments((2, 1), made["head_dim"], made["dtype"], devices=2 if made["blocks"] else 1),
        )
