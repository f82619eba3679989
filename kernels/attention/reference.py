"""Prefill attention in plain XLA: the definition that other backends are tested against, and the fallback.

A query tile walks the key tiles of its stages with one running softmax: no array is larger than a tile pair times the heads,
and tiles beyond the diagonal are not visited. Rows R of a tile are the (query, group) pairs T * G of one KV head. The backward
pass recomputes each tile pair from the saved lse (FlashAttention-2, arXiv 2307.08691, algorithm 2).
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import dtypes, lax

from qwen_jax.kernels.blocks import EVERYTHING, Share
from qwen_jax.kernels.products import einsum
from qwen_jax.rope import Rotary, Stage

QUERY_TILE = 256
KEY_TILE = 512


class _Where(NamedTuple):
    """The integers of a call: values, not shapes, and without gradient."""

    layer: jax.Array
    q_start: jax.Array
    kv_len_B: jax.Array
    share: Share


class _KeyTile(NamedTuple):
    """A key tile as one query tile sees it; `start` is a slot."""

    start: jax.Array
    k_BKSH: jax.Array
    v_BKSH: jax.Array
    visible_BRS: jax.Array


def attend(
    q_BTNH: jax.Array,
    k_LBKSH: jax.Array,
    v_LBKSH: jax.Array,
    *,
    layer: jax.Array | int,
    q_start: jax.Array | int,
    kv_len_B: jax.Array,
    rotary: Rotary,
    scale_B: jax.Array,
    share: Share = EVERYTHING,
) -> tuple[jax.Array, jax.Array]:
    """See `kernels.attention.api.attend`. Differentiable in q, k, v and scale; takes any s, T and device."""
    B, T, N, H = q_BTNH.shape
    K = k_LBKSH.shape[2]
    G = N // K
    share = dataclasses.replace(share, rank=jnp.int32(share.rank))
    where = _Where(jnp.int32(layer), jnp.int32(q_start), jnp.asarray(kv_len_B, jnp.int32), share)
    i_T = where.q_start + jnp.arange(T, dtype=jnp.int32)
    q_PBTNH = rotary.query_stages(q_BTNH, i_T, dtype=k_LBKSH.dtype, backend="xla")

    tile = min(QUERY_TILE, T)
    C = -(-T // tile)
    q = jnp.pad(q_PBTNH, ((0, 0), (0, 0), (0, C * tile - T), (0, 0), (0, 0)))
    q = q.reshape(-1, B, C, tile, K, G, H)
    q_CPBKRH = jnp.einsum("PBCTKGH->CPBKTGH", q).reshape(C, -1, B, K, tile * G, H)
    out_CBKRH, lse_CBKR = _flash(q_CPBKRH, k_LBKSH, v_LBKSH, scale_B, where, rotary, G)
    out = jnp.einsum("CBKTGH->BCTKGH", out_CBKRH.reshape(C, B, K, tile, G, H))
    lse = jnp.einsum("CBKTG->BCTKG", lse_CBKR.reshape(C, B, K, tile, G))
    return out.reshape(B, C * tile, N, H)[:, :T].astype(q_BTNH.dtype), lse.reshape(B, C * tile, N)[:, :T]


@functools.partial(jax.custom_vjp, nondiff_argnums=(5, 6))
def _flash(
    q_CPBKRH: jax.Array,
    k_LBKSH: jax.Array,
    v_LBKSH: jax.Array,
    scale_B: jax.Array,
    where: _Where,
    rotary: Rotary,
    group: int,
) -> tuple[jax.Array, jax.Array]:
    """All query tiles C in turn: out [C, B, K, R, H] and lse float32[C, B, K, R]."""

    def one(c: jax.Array, q_PBKRH: jax.Array) -> tuple[jax.Array, jax.Array]:
        def step(p: int, tile: _KeyTile, state: Any) -> Any:
            out, peak, total = state
            s_BKRS = _scores(q_PBKRH[p], tile, scale_B)
            new_peak = jnp.maximum(peak, s_BKRS.max(-1))
            base = jnp.where(jnp.isneginf(new_peak), 0.0, new_peak)
            p_BKRS = jnp.exp(s_BKRS - base[..., None])
            shrink = jnp.exp(peak - base)
            pv = einsum("BKRS,BKSH->BKRH", p_BKRS.astype(tile.v_BKSH.dtype), tile.v_BKSH)
            return out * shrink[..., None] + pv, new_peak, total * shrink + p_BKRS.sum(-1)

        shape = q_PBKRH.shape[1:]
        start = (jnp.zeros(shape), jnp.full(shape[:-1], -jnp.inf), jnp.zeros(shape[:-1]))
        out, peak, total = _walk(step, start, c, q_PBKRH, k_LBKSH, v_LBKSH, where, rotary, group)
        empty = total == 0
        total = jnp.where(empty, 1.0, total)
        lse = jnp.where(empty, -jnp.inf, peak + jnp.log(total))
        q_dtype, v_dtype = q_PBKRH.dtype, v_LBKSH.dtype  # of 16 bits, queries have their keys' dtype
        return (out / total[..., None]).astype(
            q_dtype if q_dtype.itemsize > v_dtype.itemsize else v_dtype
        ), lse

    return lax.map(lambda xs: one(*xs), (jnp.arange(len(q_CPBKRH), dtype=jnp.int32), q_CPBKRH))


def _flash_forward(*args: Any) -> Any:
    out, lse = _flash(*args)
    return (out, lse), (args[:5], out, lse)


def _flash_backward(rotary: Rotary, group: int, saved: Any, grads: Any) -> Any:
    (q_CPBKRH, k_LBKSH, v_LBKSH, scale_B, where), out, lse = saved
    d_out, d_lse = grads
    _, B, K, S, H = k_LBKSH.shape

    def one(d_kv: tuple[jax.Array, jax.Array], xs: tuple[jax.Array, ...]) -> Any:
        c, q_PBKRH, out, lse, d_out, d_lse = xs
        d_out = d_out.astype(jnp.float32)
        # d s = p * (d p - d_out . out + d_lse): one number a row besides d p.
        row_BKR = d_lse - (d_out * out.astype(jnp.float32)).sum(-1)
        base = jnp.where(jnp.isneginf(lse), jnp.inf, lse)

        def step(p: int, tile: _KeyTile, state: Any) -> Any:
            d_q, d_k, d_v, d_scale_B = state
            s_BKRS = _scores(q_PBKRH[p], tile, scale_B)
            p_BKRS = jnp.exp(s_BKRS - base[..., None])
            d_v = _add(d_v, einsum("BKRS,BKRH->BKSH", p_BKRS, d_out), tile.start)
            ds_BKRS = p_BKRS * (einsum("BKRH,BKSH->BKRS", d_out, tile.v_BKSH) + row_BKR[..., None])
            finite = jnp.where(p_BKRS > 0, s_BKRS, 0.0)
            d_scale_B = d_scale_B + jnp.einsum("BKRS,BKRS->B", ds_BKRS, finite) / scale_B
            ds_BKRS = ds_BKRS * scale_B[:, None, None, None]
            d_q = d_q.at[p].add(einsum("BKRS,BKSH->BKRH", ds_BKRS, tile.k_BKSH))
            d_k = _add(d_k, einsum("BKRS,BKRH->BKSH", ds_BKRS, q_PBKRH[p]), tile.start)
            return d_q, d_k, d_v, d_scale_B

        start = (jnp.zeros(q_PBKRH.shape), *d_kv, jnp.zeros(B))
        d_q, d_k, d_v, d_scale_B = _walk(step, start, c, q_PBKRH, k_LBKSH, v_LBKSH, where, rotary, group)
        return (d_k, d_v), (d_q.astype(q_PBKRH.dtype), d_scale_B)

    zeros = jnp.zeros((B, K, S, H))
    c = jnp.arange(len(q_CPBKRH), dtype=jnp.int32)
    (d_k, d_v), (d_q, d_scale_CB) = lax.scan(one, (zeros, zeros), (c, q_CPBKRH, out, lse, d_out, d_lse))
    d_k, d_v = (
        jnp.zeros_like(x).at[where.layer].set(d.astype(x.dtype)) for x, d in ((k_LBKSH, d_k), (v_LBKSH, d_v))
    )
    no_gradient = jax.tree.map(lambda x: np.zeros(x.shape, dtypes.float0), where)
    return d_q, d_k, d_v, d_scale_CB.sum(0).astype(scale_B.dtype), no_gradient


_flash.defvjp(_flash_forward, _flash_backward)


def _walk(
    step: Callable[[int, _KeyTile, Any], Any],
    state: Any,
    c: jax.Array,
    q_PBKRH: jax.Array,
    k_LBKSH: jax.Array,
    v_LBKSH: jax.Array,
    where: _Where,
    rotary: Rotary,
    group: int,
) -> Any:
    """Folds `step(stage number, key tile, state)` over the key tiles that query tile c sees, in key order."""
    R, S = q_PBKRH.shape[3], k_LBKSH.shape[3]
    width = min(KEY_TILE, S)
    i_R = where.q_start + c * (R // group) + jnp.arange(R, dtype=jnp.int32) // group
    end = jnp.minimum(i_R[-1] + 1, where.kv_len_B.max())
    succ, intra = rotary.stage_starts(where.q_start)
    bounds = {Stage.INTER: (jnp.int32(0), succ), Stage.SUCC: (succ, intra), Stage.INTRA: (intra, end)}
    for p, stage in enumerate(rotary.stages):
        # Slots are in the order of their positions: a stage is a range of slots.
        lo, hi = (jnp.minimum(where.share.below(jnp.minimum(x, end)), S) for x in bounds[stage])

        def visit(n: jax.Array, state: Any, p: int = p, lo: jax.Array = lo, hi: jax.Array = hi) -> Any:
            first = lo + n * width
            start = jnp.minimum(first, S - width)  # dynamic_slice would move a tile that overhangs the cache
            slot_S = start + jnp.arange(width, dtype=jnp.int32)
            inside_S = (slot_S >= first) & (slot_S < hi)
            j_S = where.share.position(slot_S)
            visible_BRS = inside_S & (j_S <= i_R[:, None]) & (j_S < where.kv_len_B[:, None, None])
            k_BKSH, v_BKSH = (read_tile(x, where.layer, start, width) for x in (k_LBKSH, v_LBKSH))
            return step(p, _KeyTile(start, k_BKSH, v_BKSH, visible_BRS), state)

        state = lax.fori_loop(0, -(-jnp.maximum(hi - lo, 0) // width), visit, state)
    return state


def read_tile(x_LBKSH: jax.Array, layer: jax.Array, start: jax.Array, width: int) -> jax.Array:
    """Slots [start, start + width) of one layer, [B, K, width, H]."""
    _, B, K, _, H = x_LBKSH.shape
    return lax.dynamic_slice(x_LBKSH, (layer, 0, 0, start, 0), (1, B, K, width, H))[0]


def _add(total_BKSH: jax.Array, x_BKSH: jax.Array, start: jax.Array) -> jax.Array:
    at = (0, 0, start, 0)
    return lax.dynamic_update_slice(total_BKSH, lax.dynamic_slice(total_BKSH, at, x_BKSH.shape) + x_BKSH, at)


def _scores(q_BKRH: jax.Array, tile: _KeyTile, scale_B: jax.Array) -> jax.Array:
    s_BKRS = einsum("BKRH,BKSH->BKRS", q_BKRH, tile.k_BKSH) * scale_B[:, None, None, None]
    return jnp.where(tile.visible_BRS[:, None], s_BKRS, -jnp.inf)
