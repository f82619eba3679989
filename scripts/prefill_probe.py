"""What a prefilled prompt is checked and counted by: some of its pieces run once more, keeping queries, outputs and lines.

What a piece sees lies before it, so it computes again what it computed in its turn.
"""

from __future__ import annotations

import functools
from typing import Any, NamedTuple

import attention_tools as tools
import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax import lax

from qwen_jax.attention import prefill_layer
from qwen_jax.cache import KVCache, write_chunk
from qwen_jax.config import ModelConfig
from qwen_jax.kernels.blocks import Share
from qwen_jax.kernels.mixing import mixes, unmix
from qwen_jax.kernels.quantised import expand
from qwen_jax.kernels.sparse_attention.bands import BAND, tile_distances
from qwen_jax.linear import IN_CUBLAS
from qwen_jax.model import Qwen2
from qwen_jax.prefill import Piece, Prefiller
from qwen_jax.sparsity.attention import SparsePrefill, attend_prompts
from qwen_jax.sparsity.cost_aware import Piece as Rows
from qwen_jax.sparsity.cost_aware import computed_pairs
from qwen_jax.spread import gather_queries, scatter_outputs


class Kept(NamedTuple):
    """What a piece leaves for the checks: of its first and last real row R, in the first and last layer L.

    q_LRNH, out_LRNH: queries, not rotated, and attention output. columns_LNS, bands_LNM: the lines, packed to bits.
    pairs_L: float32, computed pairs of every layer, all heads.
    """

    q_LRNH: jax.Array
    out_LRNH: jax.Array
    columns_LNS: jax.Array
    bands_LNM: jax.Array
    pairs_L: jax.Array


@functools.partial(jax.jit, static_argnames="graph", donate_argnames="cache", compiler_options=IN_CUBLAS)
def probe_piece(
    graph: nnx.GraphDef,
    params: nnx.State,
    tokens_BT: jax.Array,
    start: jax.Array,
    last: jax.Array,
    length_B: jax.Array,
    cache: KVCache,
    sparse: SparsePrefill | None,
) -> tuple[Kept, KVCache]:
    """A piece of the prefilled prompt once more, keeping what the checks and the density need.

    What a piece sees lies before it, so it computes again what it computed in its turn, the same lines too. `last` is its
    last real row.
    """
    model: Qwen2 = nnx.merge(graph, params)
    c = model.config
    T, S = tokens_BT.shape[1], cache.capacity
    scale_B = model.score_scale(length_B, length_B)
    rows_R = model.row(jnp.stack([jnp.int32(0), last]), T)
    M = tile_distances(S)
    row_LRNH = jnp.zeros((2, 2, c.num_heads, c.head_dim), model.embed.weight[...].dtype)
    kept = Kept(
        row_LRNH,
        row_LRNH,
        jnp.zeros((2, c.num_heads, -(-S // 8)), jnp.uint8),
        jnp.zeros((2, c.num_heads, -(-M // 8)), jnp.uint8),
        jnp.zeros(c.num_layers, jnp.float32),
    )

    spread, rotary = model.spread, model.rotary
    blocks = spread.blocks if spread else None

    def chosen(
        q_BTNH: jax.Array, k_BTKH: jax.Array, v_BTKH: jax.Array, cache: KVCache, sparse: SparsePrefill,
        layer: jax.Array, start: jax.Array, length_B: jax.Array, scale_B: jax.Array, share: Share | None = None,
    ) -> tuple[jax.Array, KVCache, jax.Array, jax.Array]:  # fmt: skip
        """`prefill_layer` with its lines: chosen a second time, those of equal scores might be others."""
        cache = write_chunk(cache, k_BTKH, v_BTKH, layer=layer, start=start, first=start, share=share)
        out, lse, lines = attend_prompts(
            gather_queries(q_BTNH, share), cache, sparse,
            layer=layer, q_start=start, prompt_len_B=length_B, rotary=rotary, scale_B=scale_B, share=share,
        )  # fmt: skip
        assert lines is not None
        return scatter_outputs(out, lse, share), cache, *lines

    def attend(q_BTNH: jax.Array, k_BTKH: jax.Array, v_BTKH: jax.Array, state: Any, layer: jax.Array) -> Any:
        cache, kept = state
        # Else XLA fuses what makes the queries with their rotation, which then sees more of them than is kept.
        q_BTNH = lax.optimization_barrier(q_BTNH)
        new, pairs_L = {}, kept.pairs_L
        if sparse is None:
            out_BTNH, cache = prefill_layer(
                spread, q_BTNH, k_BTKH, v_BTKH, cache, None,
                layer=layer, start=start, first=start, prompt_len_B=length_B, scale_B=scale_B, rotary=rotary,
                backend=None,
            )  # fmt: skip
        else:
            arguments = q_BTNH, k_BTKH, v_BTKH, cache, sparse, layer, start, length_B, scale_B
            if spread is None:
                out_BTNH, cache, columns_BNS, bands_BNM = chosen(*arguments)
            else:
                letters = ("BTN", "BTK", "BTK", "LBKS", "LN", "", "", "B", "B")
                found = spread.run(chosen, letters, ("BTN", "LBKS", "BNS", "BN"), *arguments)
                out_BTNH, cache, columns_BNS, bands_BNM = found
            if blocks:
                columns_BNS = blocks.undeal(columns_BNS, 2)
            end_B = jnp.minimum(start + T, length_B)
            new = {
                "columns_LNS": jnp.packbits(columns_BNS[0], axis=-1),
                "bands_LNM": jnp.packbits(bands_BNM[0], axis=-1),
            }
            pairs_L = pairs_L.at[layer].set(computed_pairs(columns_BNS, bands_BNM, Rows(start, end_B)).sum())
        new |= {"q_LRNH": q_BTNH[0, rows_R], "out_LRNH": out_BTNH[0, rows_R]}
        at_L = layer == jnp.array([0, c.num_layers - 1])
        news = {
            name: jnp.where(at_L.reshape(-1, *[1] * x.ndim), x, getattr(kept, name))
            for name, x in new.items()
        }
        return out_BTNH, (cache, kept._replace(pairs_L=pairs_L, **news))

    positions_BT = jnp.broadcast_to(start + jnp.arange(T, dtype=jnp.int32), tokens_BT.shape)
    if blocks:
        tokens_BT, positions_BT = (blocks.deal(x, 1) for x in (tokens_BT, positions_BT))
    x_BTD = model.embed(tokens_BT)
    x_BTD = spread.place(x_BTD, "BT") if spread else x_BTD
    _, (cache, kept) = model.run_layers(x_BTD, positions_BT, (cache, kept), attend)
    return kept, cache


def probe(
    prefiller: Prefiller, tokens_BT: np.ndarray, cache: KVCache, plan: list[Piece]
) -> tuple[list[tuple[Piece, Kept]], KVCache]:
    """What the pieces of `plan` keep, and the cache."""
    out = []
    for piece in plan:
        kept, cache = probe_piece(*_arguments(prefiller, tokens_BT, cache, piece))
        out.append((piece, jax.tree.map(np.asarray, kept)))
    return out, cache


def compile_probe(prefiller: Prefiller, tokens_BT: np.ndarray, cache: KVCache, piece: Piece) -> None:
    """Compiles what `probe` runs for pieces of this size; an abstract cache will do."""
    probe_piece.lower(*_arguments(prefiller, tokens_BT, cache, piece)).compile()


def _arguments(prefiller: Prefiller, tokens_BT: np.ndarray, cache: KVCache, piece: Piece) -> tuple[Any, ...]:
    rows = np.zeros((1, piece.padded), np.int32)
    rows[:, : piece.length] = tokens_BT[:, piece.start : piece.start + piece.length]
    tokens = tokens_BT.shape[1]
    sparse = prefiller.sparse.for_prompts(np.array([tokens])) if prefiller.sparse else None
    return (
        prefiller.graph, prefiller.params, jnp.asarray(rows), jnp.int32(piece.start), jnp.int32(piece.length - 1),
        jnp.array([tokens], jnp.int32), cache, sparse,
    )  # fmt: skip


def density_of(
    config: ModelConfig, plan: list[Piece], probed: list[tuple[Piece, Kept]]
) -> tuple[float, dict[int, float]]:
    """Computed pairs over causal pairs: of the whole plan, and of each probed piece by its first position.

    The computed pairs of a row in the other pieces lie on the line between those of their neighbours.
    """
    heads = config.num_heads * config.num_layers
    a_row = [float(kept.pairs_L.sum(dtype=np.float64)) / heads / piece.length for piece, kept in probed]
    ends = [piece.start + piece.length for piece, _ in probed]
    causal = [piece.start + (piece.length + 1) / 2 for piece in plan]  # of a row, on average
    lengths = [piece.length for piece in plan]
    found = np.interp([piece.start + piece.length for piece in plan], ends, a_row)
    each = {
        piece.start: round(pairs / (piece.start + (piece.length + 1) / 2), 4)
        for pairs, (piece, _) in zip(a_row, probed, strict=True)
    }
    return float(np.minimum(found, causal) @ lengths / (np.array(causal) @ lengths)), each


def separate_bands(kept: Kept) -> int:
    """Median over the heads of the first and last layer: runs of neighbouring tile distances."""
    bands = np.unpackbits(kept.bands_LNM, axis=-1).astype(np.int8)
    starts = (np.diff(bands, axis=-1, prepend=0) == 1).sum(-1)
    return int(np.median(starts))


@functools.partial(jax.jit, static_argnames="capacity")
def computed_keys(columns_NS: jax.Array, bands_NM: jax.Array, i_R: jax.Array, capacity: int) -> jax.Array:
    """bool[R, N, S] of packed columns and bands, straight from the contract of `attend_lines`."""
    columns_NS = jnp.unpackbits(columns_NS, axis=-1, count=capacity).astype(bool)
    bands_NM = jnp.unpackbits(bands_NM, axis=-1).astype(bool)
    apart_RS = i_R[:, None] // BAND - jnp.arange(capacity) // BAND
    in_band_NRS = (bands_NM[:, jnp.maximum(apart_RS, 0)] & (apart_RS > 0)) | (apart_RS == 0)
    return jnp.moveaxis(in_band_NRS, 0, 1) | columns_NS


def row_errors(
    model: Qwen2,
    cache: KVCache,
    probed: list[tuple[Piece, Kept]],
    tokens: int,
    sparse: bool,
) -> dict[int, dict[int, float]]:
    """Relative error of attention by layer, the first and the last, and position, the first and last of the probed pieces.

    Against float32 from what the cache holds: an 8-bit cache is expanded, mixed keys are unmixed.
    """
    scale = float(model.score_scale(*[jnp.array([tokens])] * 2)[0])
    group = model.config.num_heads // model.config.num_kv_heads
    errors: dict[int, dict[int, float]] = {}
    for at, layer in enumerate((0, model.config.num_layers - 1)):
        layers = jax.tree.map(lambda x, layer=layer: x[layer, 0], cache)  # a layer's, as the cache holds it
        for piece, kept in probed:
            i_R = np.array([piece.start, piece.start + piece.length - 1])
            keep_RNS = None
            if sparse:
                keep_RNS = computed_keys(
                    kept.columns_LNS[at], kept.bands_LNM[at], jnp.asarray(i_R), cache.capacity
                )
            heads = []
            for head in range(
                model.config.num_kv_heads
            ):  # one at a time: beside a large cache there is little room
                k_SH, v_SH = _float_head(layers, head)
                if model.spread and model.spread.blocks:
                    k_SH, v_SH = (model.spread.blocks.undeal(x, 0) for x in (k_SH, v_SH))
                mine = slice(head * group, (head + 1) * group)
                want, _ = tools.exact(
                    jnp.asarray(kept.q_LRNH[at][:, mine]),
                    i_R,
                    k_SH[None],
                    v_SH[None],
                    kv_len=tokens,
                    rotary=model.rotary,
                    scale=scale,
                    keep_RNS=None if keep_RNS is None else keep_RNS[:, mine],
                )
                heads.append(np.asarray(want))
            want_RNH = np.concatenate(heads, axis=1)
            for position, got, want in zip(i_R.tolist(), kept.out_LRNH[at], want_RNH, strict=True):
                errors.setdefault(layer, {})[position] = tools.relative_error(got, want)
    return errors


def _float_head(layer: KVCache, head: int) -> tuple[jax.Array, jax.Array]:
    """Keys and values of one head of one layer, float32[S, H], from arrays [K, S, H] and [K, S]."""
    if layer.k_scale is None or layer.v_scale is None:
        k, v = (x[head].astype(jnp.float32) for x in (layer.k, layer.v))
        return unmix(k) if mixes(layer.k.dtype) else k, v
    return (
        expand(layer.k[head], layer.k_scale[head], jnp.float32),
        expand(layer.v[head], layer.v_scale[head], jnp.float32),
    )
