"""What `bench_attention.py` times: our calls, and the peers that are installed.

A contender compiles from shapes alone; then it is bound to arrays. So programs can be compiled while another process measures.
Peers take no query offset but for FlashAttention-4: for a chunk at the end of a long prompt they run a rectangle, a square and
a merge. They get rotated queries, where ours rotates them itself.
"""

from __future__ import annotations

import dataclasses
import functools
import importlib
from collections.abc import Callable
from typing import Any

import attention_tools as tools
import jax
import jax.numpy as jnp
import numpy as np

from qwen_jax.config import DualChunk
from qwen_jax.kernels.attention import hopper as prefill
from qwen_jax.kernels.attention.api import attend
from qwen_jax.kernels.decode_attention.api import decode_attend
from qwen_jax.kernels.quantised import expand, quantise
from qwen_jax.rope import temperature


@dataclasses.dataclass(frozen=True)
class Shape:
    """Queries start .. start + queries of one prompt, or one query after `start` keys. Our kernel takes them in two calls where
    they pass position `cut`, as the model does at a multiple of s."""

    queries: int
    start: int
    dca: DualChunk | None = None
    cache: str = "bfloat16"
    head_dim: int = 128
    heads: tuple[int, int] = (28, 4)
    cut: int | None = None

    @property
    def keys(self) -> int:
        return self.start + self.queries

    @property
    def capacity(self) -> int:
        return -(-self.keys // 8) * 8

    @property
    def pairs(self) -> int:
        return self.queries * self.start + self.queries * (self.queries + 1) // 2

    @property
    def scale(self) -> float:
        return float(self.head_dim**-0.5)

    @property
    def pieces(self) -> list[tuple[int, int]]:
        """(first position, queries) of each call."""
        stops = [self.cut] * (self.cut is not None) + [self.keys]
        return [(a, b - a) for a, b in zip([self.start, *stops], stops, strict=False)]

    @property
    def sample(self) -> np.ndarray:
        """The query rows that are checked."""
        return np.unique(np.linspace(0, self.queries - 1, 4).astype(int))


@dataclasses.dataclass
class Inputs:
    """One call's arrays: q [1, T, N, H]; k and v [1, 1, K, S, H] of the cache's dtype, with scales float32 [1, 1, K, S] if that
    has 8 bits, and their values in bfloat16 (the same arrays if it has not)."""

    shape: Shape
    q: jax.Array
    k: jax.Array
    v: jax.Array
    scales: dict[str, jax.Array]
    k_bf16: jax.Array
    v_bf16: jax.Array

    @functools.cached_property
    def rotated(self) -> jax.Array:
        """Queries as peers take them."""
        i_T = self.shape.start + jnp.arange(self.shape.queries)
        return jax.jit(tools.rotary(self.shape.head_dim, None).rotate)(self.q, i_T)

    @functools.cached_property
    def swapped(self) -> tuple[jax.Array, jax.Array]:
        """Keys and values [1, S, K, H]."""
        k, v = (jnp.swapaxes(x[0], 1, 2)[:, : self.shape.keys] for x in (self.k_bf16, self.v_bf16))
        return k, v


def make_inputs(shape: Shape) -> dict[str, Any]:
    """Random normal arrays; what `Inputs` takes beside the shape."""
    N, K = shape.heads
    q = tools.random(1, (1, shape.queries, N, shape.head_dim))
    k, v = (tools.random(n, (1, 1, K, shape.capacity, shape.head_dim)) for n in (2, 3))
    scales: dict[str, jax.Array] = {}
    k_bf16, v_bf16 = k, v
    if shape.cache != "bfloat16":
        (k, k_scale), (v, v_scale) = (quantise(x, jnp.dtype(shape.cache)) for x in (k, v))
        scales = {"k_scale_LBKS": k_scale, "v_scale_LBKS": v_scale}
        k_bf16, v_bf16 = expand(k, k_scale, jnp.bfloat16), expand(v, v_scale, jnp.bfloat16)
    return {"q": q, "k": k, "v": v, "scales": scales, "k_bf16": k_bf16, "v_bf16": v_bf16}


def exact(arrays: dict[str, Any], shape: Shape) -> jax.Array:
    """float32 attention of the sampled rows, [R, N, H], on the numbers that the cache holds."""
    k, v = arrays["k"], arrays["v"]
    if arrays["scales"]:
        k, v = (expand(x, arrays["scales"][f"{n}_scale_LBKS"], jnp.float32) for n, x in (("k", k), ("v", v)))
    factors = None
    if shape.queries == 1 and shape.dca:  # in decode each key carries its temperature
        j = jnp.arange(shape.capacity)
        original = shape.dca.original_max_position_embeddings
        factors = temperature(jnp.where(j < shape.start, shape.start, j + 1), original)
    return tools.exact(
        arrays["q"][0, shape.sample], shape.start + shape.sample, k[0, 0], v[0, 0],
        kv_len=shape.keys, rotary=tools.rotary(shape.head_dim, shape.dca), scale=shape.scale, key_factor_S=factors,
    )[0]  # fmt: skip


@dataclasses.dataclass(frozen=True)
class Run:
    """A contender on its arrays: `start` a call without waiting, `wait` for what it returned, its `out` as [T, N, H]."""

    start: Callable[[], Any]
    wait: Callable[[Any], Any]
    out: Callable[[Any], jax.Array]


Bind = Callable[[Inputs], Run]


@dataclasses.dataclass(frozen=True)
class Contender:
    """`compile` gives what binds arrays. `shape` is the one computed where it is not the case's: the same without dual chunk
    attention, or with a bfloat16 cache; times are then compared."""

    compile: Callable[[], Bind]
    shape: Shape


def ours(shape: Shape, backend: str, **options: Any) -> Contender:
    """The public call, compiled; `options` go to the backend."""
    rotary = tools.rotary(shape.head_dim, shape.dca)
    rotary = dataclasses.replace(rotary, mixed=shape.cache != "bfloat16")
    decode = shape.queries == 1
    function = decode_attend if decode else attend
    if options:
        name = "decode_attention" if decode else "attention"
        function = getattr(importlib.import_module(f"qwen_jax.kernels.{name}.{backend}"), function.__name__)
    else:
        options = {"backend": backend}
    call = jax.jit(functools.partial(function, rotary=rotary, **options))

    def operands(arrays: dict[str, Any]) -> tuple[Any, Any, dict[str, Any]]:
        whole = arrays["k"].dtype == jnp.dtype(shape.cache)
        k, v = (arrays[n if whole else f"{n}_bf16"] for n in ("k", "v"))
        common = {"scale_B": jnp.full(1, shape.scale, jnp.float32), "layer": jnp.int32(0)}
        return k, v, common | (arrays["scales"] if whole else {})

    def place(start: int, queries: int) -> dict[str, Any]:
        length = jnp.full(1, start if decode else start + queries, jnp.int32)
        if decode:
            return {"position_B": length, "prompt_len_B": length}
        return {"q_start": jnp.int32(start), "kv_len_B": length}

    def rows(q: jax.Array, start: int, queries: int) -> jax.Array:
        return q[:, 0] if decode else q[:, start - shape.start :][:, :queries]

    def compile_() -> Bind:
        arrays = jax.eval_shape(functools.partial(make_inputs, shape))
        k, v, rest = operands(arrays)
        compiled = [
            call.lower(
                jax.eval_shape(functools.partial(rows, start=start, queries=queries), arrays["q"]),
                k, v, **rest, **place(start, queries),
            ).compile()
            for start, queries in shape.pieces
        ]  # fmt: skip

        def bind(inputs: Inputs) -> Run:
            k, v, rest = operands(vars(inputs))
            calls = [
                functools.partial(program, rows(inputs.q, *piece), k, v, **rest, **place(*piece))
                for program, piece in zip(compiled, shape.pieces, strict=True)
            ]
            return Run(
                lambda: [call()[0] for call in calls],
                jax.block_until_ready,
                lambda outs: jnp.concatenate([out.reshape(-1, *inputs.q.shape[2:]) for out in outs]),
            )

        return bind

    return Contender(compile_, shape)


def torch_sdpa(shape: Shape, kind: str) -> Contender:
    """torch's cuDNN or FlashAttention-2 kernel on the rotated queries."""

    def bind(inputs: Inputs) -> Run:
        import torch

        q_t, k_t, v_t = (torch.from_dlpack(x) for x in (inputs.rotated, inputs.k_bf16, inputs.v_bf16))
        q_t, k_t, v_t = q_t.transpose(1, 2), k_t[0], v_t[0]

        def part(k: Any, v: Any, causal: bool) -> tuple[Any, Any]:
            if kind == "cudnn":
                return torch.ops.aten._scaled_dot_product_cudnn_attention(
                    q_t, k, v, None, True, 0.0, causal, False, scale=shape.scale
                )[:2]
            group = q_t.shape[1] // k.shape[1]
            k, v = (x.repeat_interleave(group, 1) for x in (k, v)) if group > 1 else (k, v)
            return torch.ops.aten._scaled_dot_product_flash_attention(
                q_t, k, v, 0.0, causal, False, scale=shape.scale
            )[:2]

        def start() -> Any:
            if shape.queries == 1:
                return part(k_t[:, :, : shape.keys], v_t[:, :, : shape.keys], False)[0]
            new = slice(shape.start, shape.keys)
            out, lse = part(k_t[:, :, new], v_t[:, :, new], True)
            if shape.start == 0:
                return out
            old_out, old_lse = part(k_t[:, :, : shape.start], v_t[:, :, : shape.start], False)
            shape_of = (*out.shape[:3], 1)
            weight = torch.sigmoid(old_lse.reshape(shape_of) - lse.reshape(shape_of))
            return torch.lerp(out.float(), old_out.float(), weight).to(out.dtype)

        return Run(
            start,
            lambda _: torch.cuda.synchronize(),
            lambda out: jnp.asarray(out[0].transpose(0, 1).float().cpu().numpy()),
        )

    def compile_() -> Bind:
        import torch

        if not torch.cuda.is_available():
            raise RuntimeError("this torch sees no GPU")
        return bind

    return Contender(compile_, shape)


def flash_attention_4(shape: Shape) -> Contender:
    """FlashAttention-4 (package flash-attn-4); it takes queries at the end of the keys, as they are."""

    def compile_() -> Bind:
        import torch
        from flash_attn.cute import flash_attn_func

        def call(q: Any, k: Any, v: Any) -> Any:
            return flash_attn_func(q, k, v, softmax_scale=shape.scale, causal=True)[0]

        N, K = shape.heads
        small = [(1, 1024, N, shape.head_dim), *[(1, 2048, K, shape.head_dim)] * 2]
        call(*(torch.zeros(size, dtype=torch.bfloat16, device="cuda") for size in small))  # compiles

        def bind(inputs: Inputs) -> Run:
            q_t, k_t, v_t = (torch.from_dlpack(x) for x in (inputs.rotated, *inputs.swapped))
            return Run(
                lambda: call(q_t, k_t, v_t),
                lambda _: torch.cuda.synchronize(),
                lambda out: jnp.asarray(out[0].float().cpu().numpy()),
            )

        return bind

    return Contender(compile_, shape)


def jax_cudnn(shape: Shape) -> Contender:
    """jax.nn's cuDNN attention where it applies (from position 0), else our merge of cuDNN parts."""
    if shape.start and shape.queries > 1:
        return ours(shape, "cudnn")

    def compile_() -> Bind:
        call = jax.jit(
            functools.partial(
                jax.nn.dot_product_attention,
                scale=shape.scale,
                is_causal=shape.queries > 1,
                implementation="cudnn",
            )
        )
        N, K = shape.heads
        q, k = (
            jax.ShapeDtypeStruct((1, size, heads, shape.head_dim), jnp.bfloat16)
            for size, heads in ((shape.queries, N), (shape.keys, K))
        )
        compiled = call.lower(q, k, k).compile()

        def bind(inputs: Inputs) -> Run:
            return Run(
                lambda: compiled(inputs.rotated, *inputs.swapped), jax.block_until_ready, lambda out: out[0]
            )

        return bind

    return Contender(compile_, shape)


def contenders(shape: Shape) -> dict[str, Contender]:
    """Everything that can be timed beside our kernel, by name."""
    decode = shape.queries == 1
    found = {"mosaic_gpu": ours(shape, "mosaic_gpu")}
    if shape.cache != "bfloat16":
        found["mosaic_gpu, bfloat16 cache"] = ours(dataclasses.replace(shape, cache="bfloat16"), "mosaic_gpu")
        return found
    if shape.dca and not decode:
        found["mosaic_gpu, plain RoPE"] = ours(dataclasses.replace(shape, dca=None), "mosaic_gpu")
    if decode:
        found["xla"] = ours(shape, "xla")
    if not shape.dca:
        found["torch_cudnn"] = torch_sdpa(shape, "cudnn")
        found["torch_flash"] = torch_sdpa(shape, "flash")
        found["jax_cudnn"] = jax_cudnn(shape)
        if not decode:
            found["flash_attention_4"] = flash_attention_4(shape)
            if shape.keys >= 256 * 1024:  # what the wait of blocks for each other is worth
                found["mosaic_gpu, unpaced"] = ours(shape, "mosaic_gpu", tiling=prefill.Tiling(pace=0))
    return found
