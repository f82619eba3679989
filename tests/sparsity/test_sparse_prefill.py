"""`LLM` with sparse prefill: when it is on, what it leaves alone, and what it refuses."""

from __future__ import annotations

import dataclasses
import json
import math
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import Mesh, PartitionSpec

from qwen_jax import LLM, QwenJaxError, SamplingParams
from qwen_jax.cache import KVCache
from qwen_jax.config import DualChunk, ModelConfig
from qwen_jax.kernels.attention.api import attend
from qwen_jax.kernels.blocks import Blocks, Share
from qwen_jax.kernels.cutoffs import mosaic_gpu as cutoffs_gpu
from qwen_jax.kernels.line_scores import api as line_scores
from qwen_jax.kernels.line_scores import mosaic_gpu as lines_gpu
from qwen_jax.kernels.quantised import expand, quantise
from qwen_jax.kernels.sparse_attention import api as sparse_attention
from qwen_jax.kernels.sparse_attention import mosaic_gpu as sparse_gpu
from qwen_jax.rope import Rotary
from qwen_jax.sharding import AXES
from qwen_jax.sparsity.attention import ALL_SPARSE, SparsePrefill, attend_prompts
from qwen_jax.sparsity.budgets import FILE_NAME, Budget, LineBudgets, write
from qwen_jax.sparsity.switch import sparse_prefill
from tests import tiny_checkpoint

THRESHOLD, CHUNK = 300, 128
FEW, ALL = Budget(31, 100), Budget(4096, 4096)
DUAL_CHUNK = tiny_checkpoint.CONFIG["dual_chunk_attention_config"] | {"sparse_attention_threshold": THRESHOLD}
IDS = np.random.default_rng(0).integers(0, 256, 450)  # crosses s = 384
GREEDY = SamplingParams(max_new_tokens=4, greedy=True, ignore_eos=True)


def checkpoint(folder: Path, budget: Budget | None = None, **sparse: Any) -> Path:
    """A random checkpoint whose attention matters."""
    tiny_checkpoint.make_loud(tiny_checkpoint.write(folder, dual_chunk_attention_config=DUAL_CHUNK | sparse))
    if budget is not None:
        config = ModelConfig.from_folder(folder)
        write(folder / FILE_NAME, [[budget] * config.num_heads] * config.num_layers)
    return folder


def open_llm(folder: Path, sparsity: str | None = None) -> LLM:
    return LLM(folder, max_len=512, prefill_chunk=CHUNK, sparsity=sparsity)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return checkpoint(tmp_path_factory.mktemp("sparse") / "few", FEW)


@pytest.fixture(scope="module")
def sparse(folder: Path) -> LLM:
    return open_llm(folder)


@pytest.fixture(scope="module")
def dense(folder: Path) -> LLM:
    return open_llm(folder, "none")


def test_prompts_at_the_threshold_are_bit_identical_and_one_more_token_is_not(
    sparse: LLM, dense: LLM
) -> None:
    for length in (200, THRESHOLD):
        np.testing.assert_array_equal(sparse.score(IDS[:length]), dense.score(IDS[:length]))
    a, b = (llm.prefill(IDS[:THRESHOLD]).cache.v for llm in (sparse, dense))
    np.testing.assert_array_equal(a, b)
    a, b = (np.asarray(llm.prefill(IDS[: THRESHOLD + 1]).cache.v) for llm in (sparse, dense))
    assert np.abs(a - b).max() > 0.01


def test_enough_budget_is_dense_attention(tmp_path: Path, dense: LLM) -> None:
    """Every line chosen, across chunk boundaries of prefill and of dual chunk attention."""
    everything = open_llm(checkpoint(tmp_path / "all", ALL))
    np.testing.assert_allclose(everything.score(IDS), dense.score(IDS), rtol=0, atol=1e-3)
    assert everything.generate(IDS, GREEDY).token_ids == dense.generate(IDS, GREEDY).token_ids


def test_the_first_piece_sees_every_key_and_the_last_does_not(sparse: LLM, dense: LLM) -> None:
    """The tiles of the forced diagonals hold every key of the first piece, and leave out many of the last's."""
    a, b = sparse.score(IDS), dense.score(IDS)
    np.testing.assert_allclose(a[: CHUNK - 1], b[: CHUNK - 1], rtol=0, atol=2e-4)
    assert np.abs(a[-50:] - b[-50:]).max() > 0.1
    assert np.isfinite(a).all()


def test_bands_within_a_wide_budget_are_dense_attention_and_within_a_narrow_one_the_forced_lines(
    folder: Path,
) -> None:
    rng = np.random.default_rng(2)
    T, N, H, S, start = 128, 2, 16, 640, 512
    q = jnp.asarray(rng.standard_normal((1, T, N, H)), jnp.float32)
    k, v = (jnp.asarray(rng.standard_normal((2, 1, 1, S, H)), jnp.float32) for _ in range(2))
    call = {
        "q_start": jnp.int32(start), "prompt_len_B": jnp.array([S], jnp.int32), "rotary": Rotary(1e4, H, S),
        "scale_B": jnp.full(1, 0.3),
    }  # fmt: skip
    budgets = LineBudgets.of([[Budget(S, S)] * N, [Budget(30, 100)] * N])
    sparse = SparsePrefill(budgets, THRESHOLD, 64, bands=1.0)

    @jax.jit
    def run(layer: jax.Array, sparse: SparsePrefill) -> tuple[jax.Array, jax.Array]:
        got, want = (
            attend_prompts(q, KVCache(k, v), rule, layer=layer, **call)[0] for rule in (sparse, None)
        )
        return got, want

    wide, dense = run(jnp.int32(0), sparse)
    np.testing.assert_allclose(wide, dense, rtol=0, atol=1e-5)
    narrow, dense = run(jnp.int32(1), sparse)
    assert np.abs(narrow - dense).max() > 1e-3
    assert np.isfinite(narrow).all()


def test_an_8_bit_cache_is_read_as_what_its_numbers_say() -> None:
    """Lines are chosen, and attended, of one expanded layer; the budgets remain those of the layer itself."""
    rng = np.random.default_rng(2)
    q = jnp.asarray(rng.standard_normal((1, 64, 4, 16)), jnp.float32)
    (k, k_scale), (v, v_scale) = (
        quantise(jnp.asarray(rng.standard_normal((2, 1, 2, 512, 16)), jnp.float32), jnp.int8)
        for _ in range(2)
    )
    exact = KVCache(expand(k, k_scale, jnp.float32), expand(v, v_scale, jnp.float32))
    call = {
        "layer": jnp.int32(1), "q_start": jnp.int32(448), "prompt_len_B": jnp.array([512]), "rotary": Rotary(1e4, 16, 512),
        "scale_B": jnp.full(1, 0.3),
    }  # fmt: skip
    sparse = SparsePrefill(LineBudgets.of([[ALL] * 4, [FEW] * 4]), THRESHOLD, 64)
    got, want = (attend_prompts(q, c, sparse, **call)[0] for c in (KVCache(k, v, k_scale, v_scale), exact))
    np.testing.assert_allclose(got, want, atol=1e-5)
    assert np.abs(want - attend_prompts(q, exact, None, **call)[0]).max() > 1e-3  # few lines, not all


def test_a_row_of_a_mixed_batch_is_what_it_is_alone() -> None:
    """A short prompt beside a long one keeps dense attention to the bit; the long one is sparse."""
    rng = np.random.default_rng(1)
    B, T, N, K, S, H, start = 3, 64, 4, 2, 512, 16, 256
    q = jnp.asarray(rng.standard_normal((B, T, N, H)), jnp.float32)
    k, v = (jnp.asarray(rng.standard_normal((2, B, K, S, H)), jnp.float32) for _ in range(2))
    lengths = jnp.array([THRESHOLD, 320, 20], jnp.int32)
    budgets = LineBudgets.of([[FEW] * N, [Budget(0, 0)] * N])
    call = {
        "layer": jnp.int32(0), "q_start": jnp.int32(start), "rotary": Rotary(1e4, H, S), "scale_B": jnp.full(B, 0.3)
    }  # fmt: skip
    mixed, alone = (
        jax.jit(
            lambda q, k, v, sparse=sparse: attend_prompts(
                q, KVCache(k, v), sparse, prompt_len_B=lengths, **call
            )[0]
        )(q, k, v)
        for sparse in (SparsePrefill(budgets, THRESHOLD, 64), None)
    )
    np.testing.assert_array_equal(mixed[0, : THRESHOLD - start], alone[0, : THRESHOLD - start])
    assert np.abs(mixed[1] - alone[1]).max() > 1e-3
    without_layer = call | {"layer": jnp.int32(1)}
    other, forgetful = (
        attend_prompts(
            q, KVCache(*kv), SparsePrefill(budgets, THRESHOLD, 64), prompt_len_B=lengths, **without_layer
        )[0]
        for kv in ((k, v), (x.at[:, 1, :, :start].set(7.0) for x in (k, v)))
    )
    np.testing.assert_array_equal(other[1], forgetful[1])  # this layer's budgets are of no line
    want = attend(q, k, v, kv_len_B=lengths, **without_layer)[0]
    np.testing.assert_allclose(other[0, : THRESHOLD - start], want[0, : THRESHOLD - start], rtol=0, atol=1e-6)


@pytest.mark.parametrize(
    ("sparsity", "enabled", "file", "on"),
    [
        (None, None, True, True), (None, None, False, False), (None, False, True, False), (None, True, True, True),
        ("none", True, True, False), ("none", None, False, False), ("vertical-slash", False, True, True),
        ("vertical-slash", None, True, True), ("bands", False, True, True), ("bands:0.25", None, True, True),
    ],
)  # fmt: skip
def test_when_it_is_on(
    folder: Path, tmp_path: Path, sparsity: str | None, enabled: bool | None, file: bool, on: bool
) -> None:
    config = ModelConfig.from_folder(folder)
    config = dataclasses.replace(config, sparse=dataclasses.replace(config.sparse, enabled=enabled))
    made = sparse_prefill(sparsity, folder if file else tmp_path, config)
    assert (made is not None) == on
    if made is not None:
        assert (made.threshold, made.last_queries) == (THRESHOLD, 64)
        assert made.bands == {"bands": 1.0, "bands:0.25": 0.25}.get(sparsity or "")


def test_a_program_holds_the_parts_that_its_prompts_need() -> None:
    made = SparsePrefill(LineBudgets.of([[FEW]]), THRESHOLD, 64)
    assert made.for_prompts(np.array([THRESHOLD, 1])) is None
    assert made.for_prompts(np.array([THRESHOLD, THRESHOLD + 1])) is made
    alone = made.for_prompts(np.array([THRESHOLD + 1, 9000]))
    assert alone == dataclasses.replace(made, threshold=ALL_SPARSE)
    assert made.for_prompts(np.array([THRESHOLD + 1, 0])) == alone
    assert made.for_prompts(np.array([0, 0])) is None


def test_the_switch_is_read_from_config_json(tmp_path: Path) -> None:
    off = open_llm(checkpoint(tmp_path / "off", FEW, sparse_attention_enabled=False))
    on = open_llm(tmp_path / "off", "vertical-slash")
    assert np.abs(off.score(IDS) - on.score(IDS)).max() > 0.1


def test_what_is_refused(folder: Path, tmp_path: Path, dense: LLM) -> None:
    for sparsity, path, message in [
        ("guessing", folder, "sparsity='guessing' is not one of vertical-slash, bands, bands:SHARE, none"),
        ("bands:", folder, "sparsity='bands:': the share must be a number above 0, at most 1"),
        ("bands:nan", folder, "the share must be a number above 0"),
        ("bands", tmp_path, "no such|not a checkpoint|config.json"),
        ("vertical-slash", dense.model, "needs the sparse_attention_config.json of a folder"),
        ("vertical-slash", checkpoint(tmp_path / "without"), "sparsity='vertical-slash' needs .*, and there is none"),
        (None, checkpoint(tmp_path / "on", sparse_attention_enabled=True), "sparse_attention_enabled in config.json needs"),
        (None, checkpoint(tmp_path / "no rows", FEW, sparse_attention_last_q=0), "last_q in config.json must be at least 1"),
    ]:  # fmt: skip
        with pytest.raises(QwenJaxError, match=message) as refusal:
            LLM(path, max_len=64, sparsity=sparsity)
        assert "\n" not in str(refusal.value)


def test_budgets_of_another_model_are_refused_before_weights_are_read(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    other = checkpoint(tmp_path / "other")
    (other / FILE_NAME).write_text(json.dumps(json.loads((folder / FILE_NAME).read_text())[:1]))
    monkeypatch.setattr("qwen_jax.llm.load", lambda *_, **__: pytest.fail("weights were read"))
    with pytest.raises(QwenJaxError, match="budgets of 1 layers"):
        LLM(other)


@pytest.mark.parametrize(("shape", "rule"), [((1, 2, 2), "vertical-slash"), ((2, 4, 1), "bands")])
def test_devices_together_choose_the_lines_that_one_does(
    folder: Path, shape: tuple[int, int, int], rule: str
) -> None:
    """Heads over `tensor`, keys over `context`, rows over `data`; budgets are those of the heads."""
    mesh = jax.make_mesh(shape, AXES, devices=jax.devices()[: math.prod(shape)])
    one, many = (
        LLM(folder, max_len=512, prefill_chunk=CHUNK, sparsity=rule, mesh=where) for where in (None, mesh)
    )
    np.testing.assert_allclose(many.score(IDS), one.score(IDS), rtol=0, atol=1e-3)


def test_over_a_context_axis_hopper_gpus_score_and_attend_by_their_kernels(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Nothing is left to XLA's backends, without which the program is lowered."""
    monkeypatch.setattr(jax, "default_backend", lambda: "gpu")
    for kernels in (lines_gpu, sparse_gpu, cutoffs_gpu):
        monkeypatch.setattr(kernels, "why_not_hopper", lambda: None)
    for backends in (line_scores.BACKENDS, sparse_attention.BACKENDS):
        monkeypatch.delitem(backends, "xla")
    N, K, H, S, T = 4, 2, 64, 8192, 2048
    mesh = Mesh(np.array(jax.devices()[:2]), ("context",))
    sparse = SparsePrefill(LineBudgets.of([[Budget(500, 500)] * N] * 2), ALL_SPARSE, 64)
    rotary = Rotary(1e7, H, S, dca=DualChunk(2304, 256))

    def run(q: Any, k: Any, v: Any, start: Any, length: Any, scale: Any) -> Any:
        return attend_prompts(
            q, KVCache(k, v), sparse, layer=jnp.int32(1), q_start=start, prompt_len_B=length, rotary=rotary,
            scale_B=scale, share=Share.here(Blocks(512, 2), "context"),
        )  # fmt: skip

    cache = PartitionSpec(None, None, None, "context")
    spread = jax.shard_map(
        run, mesh=mesh, in_specs=(PartitionSpec(), cache, cache, *[PartitionSpec()] * 3),
        out_specs=PartitionSpec("context"), check_vma=False,
    )  # fmt: skip
    shape = jax.ShapeDtypeStruct
    k = shape((2, 1, K, S, H), jnp.bfloat16)
    traced = jax.jit(spread).trace(
        shape((1, T, N, H), jnp.bfloat16), k, k, shape((), jnp.int32), shape((1,), jnp.int32), shape((1,), jnp.float32)
    )  # fmt: skip
    text = traced.lower(lowering_platforms=("cuda",)).as_text()
    assert text.count("@mosaic_gpu_v") >= 3
