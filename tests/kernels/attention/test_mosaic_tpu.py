"""The TPU kernel without a TPU: numerics under jax's TPU interpreter, compilation by the TPU's compiler, refusals, layout."""

from __future__ import annotations

import functools
import itertools
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from qwen_jax.config import DualChunk
from qwen_jax.context import capacity_for
from qwen_jax.kernels import tuned
from qwen_jax.kernels.attention import api, mosaic_tpu, tpu_specs
from qwen_jax.kernels.attention.tpu import Tiling
from qwen_jax.kernels.blocks import Blocks, Share
from qwen_jax.rope import Rotary
from scripts import tpu_topology
from tests.kernels.attention.suite import AttentionSuite, Case
from tests.kernels.tpu_interpreter import INTERPRETER, races_found

QWEN_1M = DualChunk(262_144, 8_192)


class Interpreted(AttentionSuite):
    """The suite's check on the interpreter, which takes seconds a call: only the tests below run it."""

    backend = "mosaic_tpu"
    dtype = jnp.bfloat16
    tolerance = 1e-2
    head_dim = 128
    unit = 32  # s is 128 tokens, and the cache, 528, no multiple of the key tile


class Narrow(Interpreted):
    """Heads whose keys lie along lanes: copies then start at multiples of 128."""

    head_dim = 64
    unit = 256  # s is 1024 tokens, and the cache, 4224, no multiple of the key tile


@pytest.fixture
def interpreted(monkeypatch: pytest.MonkeyPatch) -> Iterator[Interpreted]:
    """Small tiles, so that a call has several; whatever reads memory that nobody wrote gets NaN."""
    attend = functools.partial(mosaic_tpu.attend, interpret=INTERPRETER, tiling=Tiling(128, 128, 64))
    monkeypatch.setitem(api.BACKENDS, "mosaic_tpu", attend)
    jax.clear_caches()
    yield Interpreted()
    assert not races_found()


def test_rows_of_different_lengths_across_every_stage(interpreted: Interpreted) -> None:
    n, s = interpreted.unit, interpreted.s
    start = 2 * s + n
    interpreted.check(Case(start, 2 * n, (start + 2 * n, s + 5, 0), 2, 1), interpreted.dca)


def test_ragged_queries_at_the_end_of_a_cache_that_tiles_do_not_divide(interpreted: Interpreted) -> None:
    interpreted.check(Case(512, 16, (528,), 2, 1), None)


def test_several_query_tiles_at_an_offset_off_the_tile(interpreted: Interpreted) -> None:
    interpreted.check(Case(37, 150, (180,), 2, 2), None)


def test_a_head_of_64_is_read_as_it_lies(monkeypatch: pytest.MonkeyPatch) -> None:
    attend = functools.partial(mosaic_tpu.attend, interpret=INTERPRETER, tiling=Tiling(128, 256, 128))
    monkeypatch.setitem(api.BACKENDS, "mosaic_tpu", attend)
    jax.clear_caches()
    narrow, start = Narrow(), 3 * Narrow.unit * 4 + 1030
    narrow.check(Case(start, 90, (start + 90, 1500), 2, 1), narrow.dca)
    assert not races_found()


def test_heads_that_share_keys_walk_them_together(interpreted: Interpreted) -> None:
    problem = mosaic_tpu.problem_of(
        jnp.zeros((1, 100, 28, 128)), jnp.zeros((1, 1, 4, 2048, 128)), Rotary(1e7, 128, 2048), Tiling()
    )
    assert (problem.tokens, problem.together, problem.rows, problem.tiles) == (128, 7, 896, 1)
    mosaic = functools.partial(mosaic_tpu.attend, interpret=INTERPRETER, tiling=Tiling(1024, 128, 64))
    api.BACKENDS["mosaic_tpu"] = mosaic
    interpreted.check(Case(37, 19, (56,), 7, 1), None)


def test_positions_that_are_dealt_to_two_devices(interpreted: Interpreted) -> None:
    """One program serves every device of a mesh."""
    rng = np.random.default_rng(0)
    q, k, v = (
        interpreted.random(rng, shape)
        for shape in ((1, 32, 2, 128), (2, 1, 1, 256, 128), (2, 1, 1, 256, 128))
    )
    api.BACKENDS["mosaic_tpu"] = functools.partial(
        mosaic_tpu.attend, interpret=INTERPRETER, tiling=Tiling(128, 64, 32)
    )

    @functools.partial(jax.jit, static_argnames="backend")
    def call(rank: jax.Array, backend: str) -> tuple[jax.Array, jax.Array]:
        return api.attend(
            q, k, v, layer=1, q_start=290, kv_len_B=jnp.array([320]), scale_B=jnp.full(1, 0.2),
            rotary=Rotary(1e4, 128, 4096, dca=DualChunk(160, 32)), share=Share(Blocks(32, 2), rank), backend=backend,
        )  # fmt: skip

    for rank in range(2):
        (out, lse), (want, want_lse) = (call(jnp.int32(rank), backend=name) for name in ("mosaic_tpu", "xla"))
        difference = np.asarray(out, np.float32) - np.asarray(want, np.float32)
        assert np.linalg.norm(difference) <= 1e-2 * np.linalg.norm(np.asarray(want, np.float32))
        np.testing.assert_allclose(lse, want_lse, atol=2e-2)


needs_compiler = pytest.mark.skipif(
    tpu_topology.why_no_compiler() is not None, reason=tpu_topology.why_no_compiler() or ""
)


def compile_prefill(
    generation: str, T: int, S: int, heads: tuple[int, int], head_dim: int, dca: DualChunk | None
) -> Any:
    N, K = heads
    rotary = Rotary(1e7, head_dim, 1 << 20, dca=dca)
    cache = jax.ShapeDtypeStruct((2, 1, K, S, head_dim), jnp.bfloat16)

    def call(q: Any, k: Any, v: Any, layer: Any, start: Any, length: Any, scale: Any) -> Any:
        return api.attend(q, k, v, layer=layer, q_start=start, kv_len_B=length, rotary=rotary, scale_B=scale)

    return tpu_topology.compile_for_one(
        tpu_topology.SMALLEST[generation], call,
        jax.ShapeDtypeStruct((1, T, N, head_dim), jnp.bfloat16), cache, cache,
        jax.ShapeDtypeStruct((), jnp.int32), jax.ShapeDtypeStruct((), jnp.int32),
        jax.ShapeDtypeStruct((1,), jnp.int32), jax.ShapeDtypeStruct((1,), jnp.float32),
    )  # fmt: skip


@needs_compiler
@pytest.mark.parametrize("generation", ["v5e", "v6e"])
def test_compiles_for_a_tpu_at_the_shapes_of_7b_and_a_million_tokens(generation: str) -> None:
    S = capacity_for(1_010_000, 1_010_000)
    text = compile_prefill(generation, 31_744, S, (28, 4), 128, QWEN_1M).as_text()
    assert "tpu_custom_call" in text
    caches = [line for line in text.splitlines() if f"= bf16[2,1,4,{S},128]" in line]
    assert len(caches) == 2
    assert all("parameter(" in line for line in caches)  # no copy of the cache, nor of a layer
    assert f"= bf16[1,1,4,{S},128]" not in text


@needs_compiler
@pytest.mark.parametrize("generation", list(tpu_topology.SMALLEST))
def test_a_cache_with_heads_of_64_is_not_copied(generation: str) -> None:
    S = 1 << 20
    memory = compile_prefill(generation, 2048, S, (14, 2), 64, QWEN_1M).memory_analysis()
    cache = 2 * 2 * 2 * S * 64 * 2  # K and V of two layers: no room for lanes that hold nothing either
    assert memory.argument_size_in_bytes < 1.1 * cache
    assert memory.temp_size_in_bytes < 0.25 * cache / 2  # of a layer


@needs_compiler
@pytest.mark.parametrize(
    ("T", "S", "heads", "head_dim", "dca"),
    [(333, 1024, (40, 8), 128, None), (128, 512, (14, 2), 64, DualChunk(320, 64))],
)
def test_compiles_for_a_tpu_at_small_shapes(
    T: int, S: int, heads: tuple[int, int], head_dim: int, dca: DualChunk | None
) -> None:
    assert "tpu_custom_call" in compile_prefill("v5e", T, S, heads, head_dim, dca).as_text()


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"dtype": jnp.float32}, "needs bfloat16"),
        ({"head_dim": 80}, "head dimension of 64 or 128"),
        ({"capacity": 100}, "multiple of 16"),
        ({"capacity": 144, "head_dim": 64}, "multiple of 128"),
        ({"dca": DualChunk(100, 10)}, "multiple of 32"),
    ],
)
def test_refuses_what_it_cannot_do(change: dict[str, Any], reason: str) -> None:
    call = {"dtype": jnp.bfloat16, "head_dim": 128, "capacity": 128, "dca": None} | change
    cache = jnp.zeros((1, 1, 1, call["capacity"], call["head_dim"]), call["dtype"])
    with pytest.raises(NotImplementedError, match=reason):
        mosaic_tpu.attend(
            jnp.zeros((1, 8, 1, call["head_dim"]), call["dtype"]), cache, cache,
            layer=0, q_start=0, kv_len_B=jnp.ones(1, jnp.int32),
            rotary=Rotary(1e4, call["head_dim"], 128, dca=call["dca"]), scale_B=jnp.ones(1), interpret=True,
        )  # fmt: skip


def test_refuses_on_a_cpu_and_says_so() -> None:
    with pytest.raises(NotImplementedError, match="mosaic_tpu: runs on TPUs, not on a cpu"):
        api.attend(
            jnp.zeros((1, 8, 1, 64)), *[jnp.zeros((1, 1, 1, 16, 64))] * 2,
            layer=0, q_start=0, kv_len_B=jnp.ones(1, jnp.int32), rotary=Rotary(1e4, 64, 128), scale_B=jnp.ones(1),
            backend="mosaic_tpu",
        )  # fmt: skip


@pytest.mark.parametrize("generation", ["a generation nobody tuned", *tpu_topology.SMALLEST])
def test_sizes_give_tiles_that_divide_the_chunk_and_fit_the_cache(generation: str) -> None:
    for head_dim, chunks, capacities in (
        (128, (None, 64, 96, 1024, 253_952), (64, 144, 4096)),
        (64, (None, 256, 768, 253_952), (256, 384, 4096)),
    ):
        for chunk_len, capacity in itertools.product(chunks, capacities):
            tiling = tpu_specs.tiling_for(generation, head_dim, capacity, chunk_len)
            assert not chunk_len or chunk_len % tiling.block_kv == 0
            assert tiling.block_kv <= capacity
            assert tiling.block_kv // tiling.block_compute % 2 == 0


def test_tuned_sizes_are_found_by_generation_and_cut_to_the_call(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    entry = {"head_dim": 128, "tiling": {"block_q": 2048, "block_kv": 4096, "block_compute": 1024}}
    (tmp_path / "tuned").mkdir()
    (tmp_path / "tuned" / "tpu_v9.json").write_text(json.dumps({"prefill": [entry]}))
    monkeypatch.setattr(tuned.resources, "files", lambda package: tmp_path)
    tuned.tuned.cache_clear()
    assert tpu_specs.tiling_for("v9", 128, 1 << 20, 253_952) == Tiling(2048, 4096, 1024)
    assert tpu_specs.tiling_for("v9", 128, 1 << 20, 15_872) == Tiling(2048, 512, 256)
    assert tpu_specs.tiling_for("v9", 128, 2048, None) == Tiling(2048, 2048, 1024)
    assert (
        tpu_specs.tiling_for("v9", 64, 1 << 20, None)
        == tpu_specs.tiling_for(None, 64, 1 << 20, None)
        == Tiling()
    )
    tuned.tuned.cache_clear()


@pytest.mark.parametrize("generation", list(tpu_topology.SMALLEST))
def test_every_generation_has_sizes(generation: str) -> None:
    """`scripts/tune_tpu.py` wrote them."""
    entries = tuned.tuned("qwen_jax.kernels.attention", f"tpu_{generation}", "prefill")
    assert [entry["head_dim"] for entry in entries] == [128, 64]
