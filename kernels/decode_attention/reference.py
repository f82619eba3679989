"""Decode attention in plain XLA: the definition that other backends are tested against, and the fallback.

Key tiles of the cache are visited in order with one running softmax. Rows of a batch stand at different positions, so a
tile may be of different stages for different rows: all stages' queries meet the tile, and each key takes the score of its
own stage.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jax import lax

from qwen_jax.kernels.attention.reference import read_tile
from qwen_jax.kernels.blocks import EVERYTHING, Share
from qwen_jax.kernels.mixing import unmix
from qwen_jax.kernels.products import einsum
from qwen_jax.rope import Rotary, Stage, temperature

KEY_TILE = 2048


def decode_attend(
    q_BNH: jax.Array,
    k_LBKSH: jax.Array,
    v_LBKSH: jax.Array,
    *,
    layer: jax.Array | int,
    position_B: jax.Array,
    prompt_len_B: jax.Array,
    rotary: Rotary,
    scale_B: jax.Array,
    k_scale_LBKS: jax.Array | None = None,
    v_scale_LBKS: jax.Array | None = None,
    share: Share = EVERYTHING,
) -> tuple[jax.Array, jax.Array]:
    """See `kernels.decode_attention.api.decode_attend`. Takes any s, any cache capacity, any device."""
    B, N, H = q_BNH.shape
    K, S = k_LBKSH.shape[2:4]
    G = N // K
    width = min(KEY_TILE, S)
    stages = tuple(Stage) if rotary.dca else (Stage.INTRA,)
    met = q_BNH.dtype if k_scale_LBKS is not None else k_LBKSH.dtype
    q_BPNH = jnp.stack([
        rotary.rotate_queries(q_BNH[:, None], position_B[:, None], stage, dtype=met)[:, 0] for stage in stages
    ], axis=1)  # fmt: skip
    q_BKPGH = jnp.einsum("BPKGH->BKPGH", q_BPNH.reshape(B, len(stages), K, G, H))
    succ_B, intra_B = rotary.stage_starts(jnp.maximum(position_B, 0))

    def read(x_LBKSH: jax.Array, scale_LBKS: jax.Array | None, start: jax.Array) -> jax.Array:
        tile = read_tile(x_LBKSH, jnp.int32(layer), start, width)
        if scale_LBKS is None:
            return tile
        factor = read_tile(scale_LBKS[..., None], jnp.int32(layer), start, width)
        return (tile.astype(jnp.float32) * factor).astype(q_BNH.dtype)

    def visit(n: jax.Array, state: tuple[jax.Array, jax.Array, jax.Array]) -> tuple[jax.Array, ...]:
        out, peak, total = state
        start = jnp.minimum(n * width, S - width)  # dynamic_slice would move a tile that overhangs the cache
        slot_S = start + jnp.arange(width, dtype=jnp.int32)
        j_S = share.position(slot_S)
        k_BKSH, v_BKSH = read(k_LBKSH, k_scale_LBKS, start), read(v_LBKSH, v_scale_LBKS, start)
        s_BKPGS = einsum("BKPGH,BKSH->BKPGS", q_BKPGH, k_BKSH)
        s_BKGS = s_BKPGS[:, :, 0]
        if rotary.dca:
            intra_BS, inter_BS = j_S >= intra_B[:, None], j_S < succ_B[:, None]
            stage_BS = jnp.where(intra_BS, Stage.INTRA, jnp.where(inter_BS, Stage.INTER, Stage.SUCC))
            s_BKGS = lax.select_n(
                jnp.broadcast_to(stage_BS[:, None, None], s_BKGS.shape),
                *(s_BKPGS[:, :, stage] for stage in stages),
            )
        scale_BS = scale_B[:, None] * key_temperature(j_S, prompt_len_B, rotary)
        visible_BS = (slot_S >= n * width) & (j_S <= position_B[:, None])
        s_BKGS = jnp.where(visible_BS[:, None, None], s_BKGS * scale_BS[:, None, None], -jnp.inf)
        new_peak = jnp.maximum(peak, s_BKGS.max(-1))
        base = jnp.where(jnp.isneginf(new_peak), 0.0, new_peak)
        p_BKGS = jnp.exp(s_BKGS - base[..., None])
        shrink = jnp.exp(peak - base)
        pv = einsum("BKGS,BKSH->BKGH", p_BKGS.astype(v_BKSH.dtype), v_BKSH)
        return out * shrink[..., None] + pv, new_peak, total * shrink + p_BKGS.sum(-1)

    init = (jnp.zeros((B, K, G, H)), jnp.full((B, K, G), -jnp.inf), jnp.zeros((B, K, G)))
    tiles = -(-jnp.minimum(share.below(position_B.max() + 1), S) // width)
    out, peak, total = lax.fori_loop(0, tiles, visit, init)
    empty = total == 0
    total = jnp.where(empty, 1.0, total)
    lse = jnp.where(empty, -jnp.inf, peak + jnp.log(total))
    out = out / total[..., None]
    out = unmix(out) if v_scale_LBKS is not None else out
    return out.astype(q_BNH.dtype).reshape(B, N, H), lse.reshape(B, N)


def key_temperature(j_S: jax.Array, prompt_len_B: jax.Array, rotary: Rotary) -> jax.Array:
    """float32[B, S]: m(prompt length) for the prompt's keys, m(j + 1) for a generated key (`algorithms.md` 3.2)."""
    original = rotary.dca.original_max_position_embeddings if rotary.dca else 0
    prompt_B1 = temperature(prompt_len_B, original)[:, None]
    return jnp.where(j_S < prompt_len_B[:, None], prompt_B1, temperature(j_S + 1, original))
