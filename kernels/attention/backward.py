"""The gradient of kernels that have none: the forward pass is a kernel's, the backward pass the reference's."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import jax

from qwen_jax.kernels.attention import reference

# (static, q, k, v, scale_B, (layer, q_start, kv_len_B)) -> (out, lse); the first of `static` is the rotary.
Forward = Callable[..., tuple[jax.Array, jax.Array]]


def with_reference_backward(forward: Forward) -> Forward:
    """`forward`, differentiable in q, k, v and scale."""
    attend = jax.custom_vjp(forward, nondiff_argnums=(0,))

    def save(static: Any, q: jax.Array, k: jax.Array, v: jax.Array, scale: jax.Array, integers: Any) -> Any:
        return attend(static, q, k, v, scale, integers), (q, k, v, scale, integers)

    def backward(static: Any, saved: Any, cotangents: Any) -> Any:
        *arrays, (layer, q_start, kv_len_B) = saved

        def again(q: jax.Array, k: jax.Array, v: jax.Array, scale: jax.Array) -> Any:
            return reference.attend(
                q, k, v, layer=layer, q_start=q_start, kv_len_B=kv_len_B, rotary=static[0], scale_B=scale
            )

        return *jax.vjp(again, *arrays)[1](cotangents), None

    attend.defvjp(save, backward)
    return functools.wraps(forward)(attend)
