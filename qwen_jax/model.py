"""Qwen2.5, the whole network.

Dimension letters: B batch, T query positions, S key positions, D model width, F MLP width, N query heads, K KV heads,
H head width, V vocabulary, L layers. Weights keep Hugging Face's order, (out, in). The repeated block is stored once with a
leading axis L and scanned, so it compiles once. Source: `algorithms.md` 1.2.
"""

from __future__ import annotations

import functools
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax import lax

from qwen_jax.attention import decode_layer, prefill_layer
from qwen_jax.cache import KVCache
from qwen_jax.config import ModelConfig
from qwen_jax.errors import QwenJaxError, check_ids
from qwen_jax.kernels.attention.api import attend
from qwen_jax.linear import Linear, check_weight_dtype
from qwen_jax.rope import Rotary, temperature
from qwen_jax.sparsity.attention import SparsePrefill
from qwen_jax.spread import Spread

# attention of one layer: (q_BTNH unrotated, k_BTKH rotated, in float32, v_BTKH, carry, layer) -> (out_BTNH, carry); the carry
# is the cache, None, or whatever else a caller takes through the layers
type Attend[C] = Callable[[jax.Array, jax.Array, jax.Array, C, jax.Array], tuple[jax.Array, C]]


class RMSNorm(nnx.Module):
    """Statistics in float32; the weight multiplies after the cast back to the input's dtype, as in transformers."""

    def __init__(self, size: int, eps: float, *, dtype: jnp.dtype):
        self.weight = nnx.Param(jnp.ones(size, dtype))
        self.eps = eps

    def __call__(self, x_BTD: jax.Array) -> jax.Array:
        x = x_BTD.astype(jnp.float32)
        x = x * lax.rsqrt(jnp.mean(x * x, axis=-1, keepdims=True) + self.eps)
        return self.weight[...] * x.astype(x_BTD.dtype)


class Embedding(nnx.Module):
    """Token vectors [V, D], and the output head when the two are tied."""

    def __init__(self, vocab: int, width: int, *, dtype: jnp.dtype, rngs: nnx.Rngs):
        self.weight = nnx.Param(0.02 * jax.random.normal(rngs.params(), (vocab, width), dtype))

    def __call__(self, tokens_BT: jax.Array) -> jax.Array:
        return jnp.take(self.weight[...], tokens_BT, axis=0)

    def logits(self, x: jax.Array) -> jax.Array:
        """float32[..., V] from x [..., D]."""
        return jnp.einsum(
            "...D,VD->...V", x, self.weight[...],
            precision=lax.Precision.HIGHEST, preferred_element_type=jnp.float32,
        )  # fmt: skip


class Attention(nnx.Module):
    """Grouped-query attention: projections with bias in, none out; what happens between is the caller's `attend`."""

    def __init__(self, config: ModelConfig, linear: Callable[..., Linear]):
        D, N, K, H = config.hidden_size, config.num_heads, config.num_kv_heads, config.head_dim
        self.q = linear((N, H), (D,), bias=True)
        self.k = linear((K, H), (D,), bias=True)
        self.v = linear((K, H), (D,), bias=True)
        self.o = linear((D,), (N, H))
        self.rotary = Rotary.from_config(config)

    def __call__[C](
        self,
        x_BTD: jax.Array,
        positions_BT: jax.Array,
        carry: C,
        layer: jax.Array,
        attend: Attend[C],
    ) -> tuple[jax.Array, C]:
        q_BTNH = self.q(x_BTD, "BTD,NHD->BTNH")
        k_BTKH = self.rotary.rotate_keys(self.k(x_BTD, "BTD,KHD->BTKH"), positions_BT)
        v_BTKH = self.v(x_BTD, "BTD,KHD->BTKH")
        out_BTNH, carry = attend(q_BTNH, k_BTKH, v_BTKH, carry, layer)
        return self.o(out_BTNH, "BTNH,DNH->BTD"), carry


class MLP(nnx.Module):
    """SwiGLU: down(silu(gate(x)) * up(x))."""

    def __init__(self, config: ModelConfig, linear: Callable[..., Linear]):
        D, F = config.hidden_size, config.intermediate_size
        self.gate = linear((F,), (D,))
        self.up = linear((F,), (D,))
        self.down = linear((D,), (F,))

    def __call__(self, x_BTD: jax.Array) -> jax.Array:
        h_BTF = nnx.silu(self.gate(x_BTD, "BTD,FD->BTF")) * self.up(x_BTD, "BTD,FD->BTF")
        return self.down(h_BTF, "BTF,DF->BTD")


class Block(nnx.Module):
    """One layer, pre-norm; `linear(out, into, bias=False)` makes its matrices."""

    def __init__(self, config: ModelConfig, linear: Callable[..., Linear], *, dtype: jnp.dtype):
        self.input_norm = RMSNorm(config.hidden_size, config.rms_norm_eps, dtype=dtype)
        self.attn = Attention(config, linear)
        self.post_norm = RMSNorm(config.hidden_size, config.rms_norm_eps, dtype=dtype)
        self.mlp = MLP(config, linear)

    def __call__[C](
        self,
        x_BTD: jax.Array,
        positions_BT: jax.Array,
        carry: C,
        layer: jax.Array,
        attend: Attend[C],
    ) -> tuple[jax.Array, C]:
        a_BTD, carry = self.attn(self.input_norm(x_BTD), positions_BT, carry, layer, attend)
        x_BTD = x_BTD + a_BTD
        return x_BTD + self.mlp(self.post_norm(x_BTD)), carry


class Qwen2(nnx.Module):
    """Qwen2.5 with the positions of its config: plain RoPE, YaRN, or dual chunk attention with length temperature.

    Attributes:
        config: the model's shape and positions.
        attention_backend: what runs attention, a name in `kernels.attention.api.BACKENDS`; None: the first that accepts.
        spread: the devices it is on; None: one.
        layers: one `Block` whose parameters have a leading axis L.
    """

    def __init__(
        self,
        config: ModelConfig,
        *,
        dtype: jnp.dtype | None = None,
        weight_dtype: str | None = None,
        matmul: str | None = None,
        rngs: nnx.Rngs,
    ):
        """Random weights (normal, 0.02).

        Args:
            dtype: of weights and activations, by default the config's.
            weight_dtype: "int8" or "fp8" (e4m3): the layers' matrices in 8 bits, see `linear`; None: in `dtype`.
            matmul: "fp8": prefill multiplies fp8 weights with activations rounded to fp8; None: in `dtype`.

        Raises:
            QwenJaxError: other names, or `matmul` with other weights than fp8.
        """
        dtype = jnp.dtype(dtype or config.dtype)
        numbers = check_weight_dtype(weight_dtype, matmul)
        self.config = config
        self.attention_backend: str | None = None
        self.spread: Spread | None = None
        self.embed = Embedding(config.vocab_size, config.hidden_size, dtype=dtype, rngs=rngs)

        @nnx.split_rngs(splits=config.num_layers)
        @nnx.vmap(in_axes=0, out_axes=0)
        def stack(rngs: nnx.Rngs) -> Block:
            linear = functools.partial(
                Linear, dtype=dtype, weight_dtype=numbers, fp8_products=matmul is not None, rngs=rngs
            )
            return Block(config, linear, dtype=dtype)

        self.layers = stack(rngs)
        self.norm = RMSNorm(config.hidden_size, config.rms_norm_eps, dtype=dtype)
        if not config.tie_embeddings:
            self.lm_head = Embedding(config.vocab_size, config.hidden_size, dtype=dtype, rngs=rngs)

    def __call__(self, tokens_BT: jax.Array, lengths_B: jax.Array | None = None) -> jax.Array:
        """Logits of every position, with no cache; the length temperature takes L = the row's length.

        Args:
            tokens_BT: int32[B, T]. Under jit ids outside the vocabulary go unnoticed; outside they are refused.
            lengths_B: int32[B], real tokens of each right-padded row; default T. Logits of padding mean nothing.

        Returns:
            float32[B, T, V].

        Raises:
            QwenJaxError: no token at all, an id outside the vocabulary, or more tokens than the model has positions
                where no dual chunk attention bounds them.
        """
        if tokens_BT.ndim != 2 or not tokens_BT.size:
            raise QwenJaxError(
                f"model(tokens) takes int32[B, T] with at least one token, got shape {tokens_BT.shape}"
            )
        if not isinstance(tokens_BT, jax.core.Tracer):
            check_ids(np.asarray(tokens_BT), self.config.vocab_size)
        B, T = tokens_BT.shape
        if self.config.dual_chunk is None and self.config.max_position_embeddings < T:
            raise QwenJaxError(
                f"{T} tokens are beyond the {self.config.max_position_embeddings} positions of this model: put dual "
                f"chunk attention on it (dca=DualChunk(chunk_size, local_size))"
            )
        lengths_B = jnp.full(B, T, jnp.int32) if lengths_B is None else jnp.asarray(lengths_B, jnp.int32)
        return _forward(*nnx.split(self), jnp.asarray(tokens_BT, jnp.int32), lengths_B)

    def logits(self, x_BTD: jax.Array) -> jax.Array:
        """float32[..., V] from final hidden states [..., D]."""
        head = self.embed if self.config.tie_embeddings else self.lm_head
        logits = head.logits(x_BTD)
        return self.spread.place(logits, "") if self.spread else logits

    def forward(self, tokens_BT: jax.Array, lengths_B: jax.Array) -> jax.Array:
        """Final hidden states [B, T, D] of whole right-padded rows, with no cache. Pure; meant to be jitted."""
        B, T = tokens_BT.shape
        spread = self.spread.whole_rows(B) if self.spread else None

        def attend_rows(
            q_BTNH: jax.Array, k_BTKH: jax.Array, v_BTKH: jax.Array, lengths_B: jax.Array, share: None = None
        ) -> jax.Array:
            scale_B = self.score_scale(lengths_B, lengths_B)

            def piece(start: jax.Array | int, q: jax.Array) -> jax.Array:
                k, v = (jnp.swapaxes(x, 1, 2)[None].astype(q.dtype) for x in (k_BTKH, v_BTKH))
                return attend(
                    q, k, v,
                    layer=0, q_start=start, kv_len_B=lengths_B, rotary=self.rotary, scale_B=scale_B,
                    backend=self.attention_backend,
                )[0]  # fmt: skip

            s = self.rotary.chunk_len or T  # a call must not straddle a multiple of s
            whole = T // s
            q_CBTNH = jnp.stack(jnp.split(q_BTNH[:, : whole * s], whole, axis=1)) if whole else None
            outs = []
            if q_CBTNH is not None:
                starts = jnp.arange(whole, dtype=jnp.int32) * s
                outs = list(lax.map(lambda xs: piece(*xs), (starts, q_CBTNH)))
            if whole * s < T:
                outs.append(piece(whole * s, q_BTNH[:, whole * s :]))
            return jnp.concatenate(outs, axis=1)

        def attend_all(
            q_BTNH: jax.Array, k_BTKH: jax.Array, v_BTKH: jax.Array, cache: KVCache | None, layer: jax.Array
        ) -> tuple[jax.Array, KVCache | None]:
            arguments = q_BTNH, k_BTKH, v_BTKH, lengths_B
            if spread is None:
                return attend_rows(*arguments), cache
            return spread.run(attend_rows, ("BTN", "BTK", "BTK", "B"), "BTN", *arguments), cache

        positions_BT = jnp.broadcast_to(jnp.arange(T, dtype=jnp.int32), tokens_BT.shape)
        x_BTD = self.embed(tokens_BT)
        x_BTD = spread.place(x_BTD, "BT") if spread else x_BTD
        return self.run_layers(x_BTD, positions_BT, None, attend_all)[0]

    def extend(
        self,
        tokens_BT: jax.Array,
        cache: KVCache,
        start: jax.Array,
        prompt_len_B: jax.Array,
        sparse: SparsePrefill | None = None,
        first: jax.Array | int = 0,
    ) -> tuple[jax.Array, KVCache]:
        """One prefill piece: T tokens of every row from absolute position `start`, keys and values written to the cache.

        Args:
            tokens_BT: int32[B, T]; a piece must not straddle a multiple of s, padding at its end excepted.
            cache: holds positions 0 .. start - 1; start + T must not pass its capacity.
            start: int32 scalar, a value, not a shape.
            prompt_len_B: int32[B], each row's whole prompt: the L of the length temperature.
            sparse: makes prompts above its threshold sparse; None: all are dense.
            first: int32 scalar, where the real tokens begin; tokens before it change nothing in the cache. It lies
                past `start` only over a context axis, where `start` and T must be multiples of the spread's round.

        Returns:
            (final hidden states [B, T, D] in the order that `row` tells, the cache with the piece in it).
        """
        positions_BT = jnp.broadcast_to(
            start + jnp.arange(tokens_BT.shape[1], dtype=jnp.int32), tokens_BT.shape
        )
        if self.spread and self.spread.blocks:
            tokens_BT, positions_BT = (self.spread.blocks.deal(x, 1) for x in (tokens_BT, positions_BT))
        scale_B = self.score_scale(prompt_len_B, prompt_len_B)

        def attend_piece(
            q_BTNH: jax.Array, k_BTKH: jax.Array, v_BTKH: jax.Array, cache: KVCache, layer: jax.Array
        ) -> tuple[jax.Array, KVCache]:
            return prefill_layer(
                self.spread, q_BTNH, k_BTKH, v_BTKH, cache, sparse,
                layer=layer, start=start, first=jnp.int32(first), prompt_len_B=prompt_len_B, scale_B=scale_B,
                rotary=self.rotary, backend=self.attention_backend,
            )  # fmt: skip

        x_BTD = self.embed(tokens_BT)
        x_BTD = self.spread.place(x_BTD, "BT") if self.spread else x_BTD
        x_BTD, cache = self.run_layers(x_BTD, positions_BT, cache, attend_piece)
        return x_BTD, cache

    def step(
        self, token_B: jax.Array, cache: KVCache, position_B: jax.Array, prompt_len_B: jax.Array
    ) -> tuple[jax.Array, KVCache]:
        """One decode step: each row's token at its own absolute position.

        Args:
            token_B: int32[B].
            cache: holds each row's positions below position_B.
            position_B: int32[B]; rows at or past the capacity write nothing.
            prompt_len_B: int32[B], tokens of each row's prompt.

        Returns:
            (logits float32[B, V], the cache with the token in it).
        """
        scale_B = self.score_scale(position_B + 1)

        def attend_token(
            q_BTNH: jax.Array, k_BTKH: jax.Array, v_BTKH: jax.Array, cache: KVCache, layer: jax.Array
        ) -> tuple[jax.Array, KVCache]:
            out_BNH, cache = decode_layer(
                self.spread, q_BTNH[:, 0], k_BTKH[:, 0], v_BTKH[:, 0], cache,
                layer=layer, position_B=position_B, prompt_len_B=prompt_len_B, scale_B=scale_B,
                rotary=self.rotary, backend=self.attention_backend,
            )  # fmt: skip
            return out_BNH[:, None], cache

        x_BTD = self.embed(token_B[:, None])
        x_BTD = self.spread.place(x_BTD, "B") if self.spread else x_BTD
        x_BTD, cache = self.run_layers(x_BTD, position_B[:, None], cache, attend_token)
        return self.logits(x_BTD[:, 0]), cache

    def row(self, t: jax.Array, rows: int) -> jax.Array:
        """Where `extend` returns token t of a piece of `rows`."""
        blocks = self.spread.blocks if self.spread else None
        return blocks.dealt(t, rows) if blocks else t

    @property
    def rotary(self) -> Rotary:
        """The positions of this model."""
        return self.layers.attn.rotary

    def score_scale(self, *lengths_B: jax.Array) -> jax.Array:
        """1 / sqrt(H) times the temperature at each of the lengths, float32[B]."""
        dca = self.config.dual_chunk
        scale_B = jnp.full(lengths_B[0].shape, self.config.head_dim**-0.5, jnp.float32)
        for length_B in lengths_B:
            scale_B = scale_B * temperature(length_B, dca.original_max_position_embeddings if dca else 0)
        return scale_B

    def run_layers[C](
        self, x_BTD: jax.Array, positions_BT: jax.Array, carry: C, attend: Attend[C]
    ) -> tuple[jax.Array, C]:
        """The scanned blocks and the final norm, with any attention: [B, T, D] and what `attend` made of the carry.

        A cache is carried whole: slicing it by layer would copy it.
        """
        block, stacked = nnx.split(self.layers)

        def body(
            state: tuple[jax.Array, C], xs: tuple[jax.Array, nnx.State]
        ) -> tuple[tuple[jax.Array, C], None]:
            layer, params = xs
            return nnx.merge(block, params)(state[0], positions_BT, state[1], layer, attend), None

        layers = jnp.arange(self.config.num_layers, dtype=jnp.int32)
        (x_BTD, carry), _ = lax.scan(body, (x_BTD, carry), (layers, stacked))
        return self.norm(x_BTD), carry


@functools.partial(jax.jit, static_argnums=0)
def _forward(graph: nnx.GraphDef, state: nnx.State, tokens_BT: jax.Array, lengths_B: jax.Array) -> jax.Array:
    model = nnx.merge(graph, state)
    return model.logits(model.forward(tokens_BT, lengths_B))
