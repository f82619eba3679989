"""The TPU kernel without a TPU: numerics under jax's TPU interpreter, compilation by the TPU's compiler, refusals."""

from __future__ import annotations

import dataclasses
import functools
import re
from collections.abc import Callable, Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from qwen_jax.config import DualChunk
from qwen_jax.kernels.sparse_attention import api, mosaic_tpu
from qwen_jax.kernels.sparse_attention.bands import BAND, tile_distances
from qwen_jax.kernels.sparse_attention.tpu import Tiling
from qwen_jax.kernels.sparse_attention.tpu_columns import compact
from qwen_jax.kernels.sparse_attention.tpu_plan import _runs
from qwen_jax.kernels.tpu import LANES
from qwen_jax.rope import Rotary
from scripts import tpu_topology
from tests.kernels.sparse_attention.suite import Check
from tests.kernels.tpu_interpreter import INTERPRETER, races_found

QWEN_1M = DualChunk(262_144, 8_192)
S = 9 * BAND - 48
check = Check(
    "mosaic_tpu", BAND, S, 128, DualChunk(4 * BAND, BAND), dtype=jnp.bfloat16, tolerance=3e-2, most=300
)

# Of the larger calls some of 100,000 outputs pass 3e-2, XLA's too: bfloat16 weights, scores of 128 channels.
rough_check = dataclasses.replace(check, tolerance=6e-2)

# Keys along lanes: the cache is a multiple of 128 positions.
check_64 = dataclasses.replace(check, head_dim=64, capacity=9 * BAND)


@pytest.fixture
def use(monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[[Tiling], None]]:
    """Sets the interpreter, with some sizes; whatever reads memory that nobody wrote gets NaN, and races are errors."""

    def sizes(tiling: Tiling) -> None:
        run = functools.partial(mosaic_tpu.attend_lines, interpret=INTERPRETER, tiling=tiling)
        monkeypatch.setitem(api.BACKENDS, "mosaic_tpu", run)
        jax.clear_caches()

    yield sizes
    assert not races_found()


@pytest.mark.parametrize("sized", [check, check_64], ids=["128", "64"])
def test_every_stage_of_a_ragged_piece_in_the_third_chunk(
    sized: Check, use: Callable[[Tiling], None]
) -> None:
    """The other row has ended, and is finite."""
    use(Tiling(2, 2, (2, 1)))
    start = 6 * BAND
    sized(start, 200, (start + 190, start + 3), (1, 1))


@pytest.mark.parametrize(
    ("sized", "wide", "dca"),
    [
        (rough_check, False, None),
        (rough_check, True, None),
        (rough_check, True, DualChunk(16 * BAND, 2 * BAND)),
        (check_64, False, DualChunk(16 * BAND, 2 * BAND)),
        (check_64, True, DualChunk(16 * BAND, 2 * BAND)),
    ],
    ids=["128-narrow", "128-wide", "128-wide-stages", "64-narrow-stages", "64-wide-stages"],
)
def test_two_whole_steps_of_every_length_of_run(
    sized: Check, wide: bool, dca: DualChunk | None, use: Callable[[Tiling], None]
) -> None:
    """Of a piece that starts in a tile; with stages, some runs lie across where they meet."""
    use(Tiling(4, 4, (4, 2, 1), wide))
    sized = dataclasses.replace(sized, capacity=30 * BAND)
    columns, bands = sized.no_lines(1, 2)
    columns[..., np.random.default_rng(0).choice(29 * BAND, 300, replace=False)] = True
    bands[0, 0, [*range(1, 9), 10, 11, 13, 14, 16, 17, 19, 20]] = True
    bands[0, 1, 2:18:2] = True
    start = 22 * BAND + 20
    sized(start, 700, (start + 650,), (2, 1), plain=not dca, dca=dca, lines=(columns, bands))


@pytest.mark.parametrize("sized", [rough_check, check_64], ids=["128", "64"])
def test_runs_that_reach_before_the_first_key_and_behind_the_cache(
    sized: Check, use: Callable[[Tiling], None]
) -> None:
    """The last query block overhangs the cache; of each run some query tiles see all, some part, some nothing."""
    use(Tiling(4, 4, (4, 2, 1), wide=True))
    sized = dataclasses.replace(sized, capacity=9 * BAND)
    columns, bands = sized.no_lines(1, 1)
    bands[..., [1, 2, 3, 4, 6, 7]] = True
    sized(2 * BAND, 7 * BAND, (9 * BAND - 7,), (1, 1), plain=True, lines=(columns, bands))


def test_columns_of_heads_that_lie_along_lanes() -> None:
    """In the same lane, in the same 128 positions, one after another, far apart, in any order."""
    B, N, K, H, S, P, width = 2, 2, 1, 64, 40 * LANES, 2 * LANES, LANES
    rng = np.random.default_rng(0)
    position = np.stack([
        np.arange(P) * 5 % S, np.sort(rng.choice(S, P, replace=False)), rng.integers(0, S, P),
        np.arange(P)[::-1] % 40 * LANES + 127,
    ])  # fmt: skip
    k, v = (jnp.asarray(rng.standard_normal((2, B, K, H, S)), jnp.bfloat16) for _ in "kv")
    found = jax.jit(compact(B, N, P, width, INTERPRETER))(
        jnp.ones(1, jnp.int32),
        jnp.array([2, 2, 1, 2], jnp.int32),
        jnp.asarray(position[:, None], jnp.int32),
        k,
        v,
    )
    for x, got in zip((k, v), found, strict=True):
        for pair, tiles in enumerate((2, 2, 1, 2)):
            want = np.asarray(x)[1, pair // N, 0][:, position[pair]]
            np.testing.assert_array_equal(np.asarray(got)[pair, :, : tiles * width], want[:, : tiles * width])
    assert not races_found()


@pytest.mark.parametrize("runs", [(8, 2, 1), (4, 2, 1), (1,)])
@pytest.mark.parametrize("share", [0.1, 0.5, 0.9, 1.0])
def test_runs_are_the_bands(runs: tuple[int, ...], share: float) -> None:
    X, M = 3, 61
    bands_XM = np.random.default_rng(0).random((X, M)) < share
    bands_XM[:, 0] = True
    near_XM, nearer_RXM = (np.asarray(x) for x in _runs(jnp.asarray(bands_XM), runs))
    for bands_M, near_M, nearer_RM in zip(bands_XM, near_XM, nearer_RXM.swapaxes(0, 1), strict=True):
        found, begin = [], 0
        for run, nearer_M in zip(runs, nearer_RM, strict=True):
            first_D = near_M[begin : begin + nearer_M[-1]]
            assert (np.diff(first_D) > 0).all()
            np.testing.assert_array_equal(nearer_M, [(first_D < m).sum() for m in range(M + 1)])
            found += [first + more for first in first_D for more in range(run)]
            begin += nearer_M[-1]
        assert first_D[0] == 0
        np.testing.assert_array_equal(sorted(found), np.flatnonzero(bands_M))


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
@pytest.mark.parametrize("generation", ["v5e", "v6e"])
def test_compiles_with_heads_of_64_without_copying_the_cache(generation: str) -> None:
    """At the heads of 0.5B; neither the cache nor a layer or a head of it, in whatever order of dimensions."""
    S = 1 << 20
    program = tpu_topology.compile_for_one(
        tpu_topology.SMALLEST[generation], functools.partial(call, dca=QWEN_1M),
        *arguments(2048, (14, 2), 64, S),
    )  # fmt: skip
    text, memory = program.as_text(), program.memory_analysis()
    assert text.count("tpu_custom_call") >= 2  # the columns' and the attention
    made = [line for line in text.splitlines() if re.search(rf"= \(?(bf16|f32|u16|s16)\[[\d,]*\b{S}\b", line)]
    assert made
    assert all(re.search(r" (parameter|get-tuple-element|bitcast)\(", line) for line in made), made
    cache = 2 * 2 * 2 * S * 64 * 2  # K and V of two layers: no room for lanes that hold nothing either
    assert memory.argument_size_in_bytes < 1.1 * cache
    assert memory.temp_size_in_bytes < 0.25 * cache / 2  # of a layer


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"dtype": jnp.float32}, "needs bfloat16"),
        ({"head_dim": 80}, "head dimension of 64 or 128"),
        ({"dca": DualChunk(200, 8)}, "chunk length 192 is not a multiple of the band, 128"),
        ({"band": 64}, "needs bands of 128, got 64"),
        ({"capacity": 1024}, "at least 1920 positions, got 1024"),
        ({"capacity": 4000}, "multiple of 128, got 4000"),
    ],
)
def test_refuses_what_it_cannot_do(change: dict[str, Any], reason: str) -> None:
    made = {"dtype": jnp.bfloat16, "head_dim": 64, "dca": None, "band": BAND, "capacity": 4096} | change
    with pytest.raises(NotImplementedError, match=reason):
        jax.eval_shape(
            functools.partial(call, dca=made["dca"], band=made["band"], interpret=True),
            *arguments(512, (2, 1), made["head_dim"], made["capacity"], made["dtype"]),
        )
