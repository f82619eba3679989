"""Choosing the next token: what the user asks for, the checkpoint's defaults, the draw on the device.

The order is that of transformers: repetition penalty, temperature, top-k, top-p, draw. Every row has a key of
its own, so a row of a batch gets the tokens it would get alone.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from qwen_jax.errors import QwenJaxError
from qwen_jax.generation_config import GenerationDefaults

__all__ = [
    "GenerationDefaults",
    "ResolvedSampling",
    "SamplingControls",
    "SamplingError",
    "SamplingParams",
    "filtered_logits",
    "mark_seen",
    "row_seeds",
    "sample",
    "seen_tokens",
    "step_keys",
]


class SamplingError(QwenJaxError):
    """A sampling setting outside its range, or two that contradict each other."""


@dataclasses.dataclass(frozen=True)
class SamplingParams:
    """How to answer. None takes what the checkpoint's generation_config.json says.

    Attributes:
        max_new_tokens: most tokens to sample.
        temperature: divides the logits; 0 means greedy.
        top_k: sample among the k likeliest tokens (more where several tie for the last place); 0 means all.
        top_p: sample among the likeliest tokens that together reach this probability, in (0, 1].
        repetition_penalty: makes tokens of the prompt and the answer less likely when above 1; greedy too.
        greedy: take the likeliest token. None: greedy at temperature 0, sampling when temperature, top_k or
            top_p is given here, else what the checkpoint says.
        seed: of the draw; the same seed and prompt give the same answer, whatever else is in the batch.
        stop: texts that end the answer; they are not part of it.
        ignore_eos: go on past the end token.
        eos_token_ids: token or tokens that end the answer.
    """

    max_new_tokens: int | None = None
    temperature: float | None = None
    top_k: int | None = None
    top_p: float | None = None
    repetition_penalty: float | None = None
    greedy: bool | None = None
    seed: int = 0
    stop: str | tuple[str, ...] = ()
    ignore_eos: bool = False
    eos_token_ids: int | tuple[int, ...] | None = None

    def resolve(self, defaults: GenerationDefaults | None = None) -> ResolvedSampling:
        """Fills in the checkpoint's defaults and checks every value.

        Raises:
            SamplingError: a value outside its range, or `greedy` against `temperature`, `top_k` or `top_p`.
        """
        defaults = defaults or GenerationDefaults()
        greedy = self._is_greedy(defaults)
        temperature = 1.0 if greedy else _first(self.temperature, defaults.temperature)
        top_k = 0 if greedy else _first(self.top_k, defaults.top_k)
        top_p = 1.0 if greedy else _first(self.top_p, defaults.top_p)
        penalty = _first(self.repetition_penalty, defaults.repetition_penalty)
        eos = () if self.ignore_eos else _listed(_first(self.eos_token_ids, defaults.eos_token_ids))
        new = _first(self.max_new_tokens, defaults.max_new_tokens)
        stop = _listed(self.stop)

        _check(
            _is_number(temperature) and _TINY <= temperature <= _HUGE,
            "temperature",
            "positive, or 0 for greedy",
            temperature,
        )
        _check(_is_integer(top_k) and 0 <= top_k < 2**31, "top_k", "an integer, 0 (off) or more", top_k)
        _check(_is_number(top_p) and 0 < top_p <= 1, "top_p", "in (0, 1]", top_p)
        _check(
            _is_number(penalty) and _TINY <= penalty <= _HUGE, "repetition_penalty", "more than 0", penalty
        )
        _check(
            new is None or (_is_integer(new) and new >= 1), "max_new_tokens", "an integer of at least 1", new
        )
        _check(
            _is_integer(self.seed) and 0 <= self.seed < 2**63,
            "seed",
            "an integer from 0 to 2**63 - 1",
            self.seed,
        )
        _check(all(isinstance(s, str) and s for s in stop), "stop", "texts that are not empty", stop)
        _check(all(_is_integer(i) and i >= 0 for i in eos), "eos_token_ids", "token ids", eos)
        return ResolvedSampling(
            max_new_tokens=new,
            greedy=greedy,
            temperature=float(temperature),
            top_k=int(top_k),
            top_p=float(top_p),
            repetition_penalty=float(penalty),
            seed=int(self.seed),
            stop=stop,
            eos_token_ids=eos,
        )

    def _is_greedy(self, defaults: GenerationDefaults) -> bool:
        asked = {
            name: getattr(self, name)
            for name in ("temperature", "top_k", "top_p")
            if getattr(self, name) is not None
        }
        cold = asked.get("temperature") == 0
        if self.greedy and asked and not cold:
            names = ", ".join(f"{name}={value}" for name, value in asked.items())
            raise SamplingError(f"greedy=True leaves nothing to sample: drop it, or drop {names}")
        if self.greedy is False and cold:
            raise SamplingError("temperature=0 means greedy: it contradicts greedy=False")
        if self.greedy is not None:
            return self.greedy
        if cold:
            return True
        return not asked and (not defaults.do_sample or defaults.temperature == 0)


@dataclasses.dataclass(frozen=True)
class ResolvedSampling:
    """`SamplingParams` with nothing left open. Greedy rows have temperature 1, top_k 0 and top_p 1.

    `max_new_tokens` None: as many as fit. `eos_token_ids` is empty when end tokens are to be ignored.
    """

    max_new_tokens: int | None
    greedy: bool
    temperature: float
    top_k: int
    top_p: float
    repetition_penalty: float
    seed: int
    stop: tuple[str, ...]
    eos_token_ids: tuple[int, ...]


class SamplingControls(NamedTuple):
    """The settings of B rows, each [B]: float32, int32, float32, float32, bool."""

    temperature: jax.Array
    top_k: jax.Array
    top_p: jax.Array
    repetition_penalty: jax.Array
    greedy: jax.Array

    @classmethod
    def stack(cls, rows: Sequence[ResolvedSampling]) -> SamplingControls:
        """One row for each setting, on the host."""
        dtypes: tuple[Any, ...] = (np.float32, np.int32, np.float32, np.float32, np.bool)
        columns: list[Any] = [
            np.array([getattr(row, name) for row in rows], dtype)
            for name, dtype in zip(cls._fields, dtypes, strict=True)
        ]
        return cls(*columns)


def row_seeds(rows: Sequence[ResolvedSampling]) -> np.ndarray:
    """The seed of each row in two words, on the host: uint32[B, 2]."""
    return np.array([divmod(row.seed, 2**32) for row in rows], np.uint32).reshape(-1, 2)


def step_keys(seeds_B2: jax.Array | np.ndarray, step_B: jax.Array) -> jax.Array:
    """Typed keys [B] for the draw of each row's token number `step_B` (int32[B]), from `row_seeds`.

    Always of the threefry kind: only there does a row's draw under `vmap` not depend on the other rows.
    """
    keys_B = jax.random.wrap_key_data(jnp.asarray(seeds_B2), impl="threefry2x32")
    return jax.vmap(jax.random.fold_in)(keys_B, step_B)


def seen_tokens(tokens_BT: jax.Array, lengths_B: jax.Array, vocab_size: int) -> jax.Array:
    """Which tokens each prompt holds, for the repetition penalty: bool[B, V].

    Args:
        tokens_BT: int32[B, T] prompts, padded at the end.
        lengths_B: int32[B], real tokens of each.
        vocab_size: V of the model.
    """
    rows_B1 = jnp.arange(len(tokens_BT))[:, None]
    real_BT = jnp.arange(tokens_BT.shape[1]) < lengths_B[:, None]
    # Padding goes to column V, which is out of bounds and dropped.
    columns_BT = jnp.where(real_BT, tokens_BT, vocab_size)
    empty_BV = jnp.zeros((len(tokens_BT), vocab_size), bool)
    return empty_BV.at[rows_B1, columns_BT].set(True, mode="drop")


def mark_seen(seen_BV: jax.Array, token_B: jax.Array) -> jax.Array:
    """`seen_BV` with one more token a row (int32[B])."""
    return seen_BV.at[jnp.arange(len(token_B)), token_B].set(True)


def sample(
    logits_BV: jax.Array, seen_BV: jax.Array, controls: SamplingControls, keys_B: jax.Array
) -> jax.Array:
    """The next token of every row.

    Args:
        logits_BV: float32[B, V].
        seen_BV: bool[B, V], tokens the repetition penalty applies to.
        controls: settings of each row.
        keys_B: one key a row and step, from `step_keys`.

    Returns:
        int32[B]. Greedy rows take the first of the largest penalised logits.
    """
    penalised_BV = _penalised(logits_BV, seen_BV, controls)
    best_B = jnp.argmax(penalised_BV, -1).astype(jnp.int32)

    def draw() -> jax.Array:
        drawn_B = jax.vmap(jax.random.categorical)(keys_B, _filtered(penalised_BV, controls))
        return jnp.where(controls.greedy, best_B, drawn_B.astype(jnp.int32))

    # Filters and random bits cost far more than the argmax: none of them when every row is greedy.
    return lax.cond(controls.greedy.all(), lambda: best_B, draw)


def filtered_logits(logits_BV: jax.Array, seen_BV: jax.Array, controls: SamplingControls) -> jax.Array:
    """The logits `sample` draws from: float32[B, V], -inf where filtered, 0 at each row's best.

    Tokens that tie with the last one that top-k or top-p lets through pass as well, so the result does not
    depend on the order of the vocabulary.
    """
    return _filtered(_penalised(logits_BV, seen_BV, controls), controls)


def _penalised(logits_BV: jax.Array, seen_BV: jax.Array, controls: SamplingControls) -> jax.Array:
    penalty_B1 = controls.repetition_penalty[:, None]
    logits_BV = logits_BV.astype(jnp.float32)
    lowered_BV = jnp.where(logits_BV > 0, logits_BV / penalty_B1, logits_BV * penalty_B1)
    return jnp.where(seen_BV, lowered_BV, logits_BV)


def _filtered(logits_BV: jax.Array, controls: SamplingControls) -> jax.Array:
    # The best logit moves to 0 first: dividing by a small temperature then cannot overflow.
    scaled_BV = (logits_BV - logits_BV.max(-1, keepdims=True)) / controls.temperature[:, None]
    vocab_size = logits_BV.shape[-1]
    top_k_B = jnp.where(controls.top_k > 0, jnp.minimum(controls.top_k, vocab_size), vocab_size)
    narrow_B = ((top_k_B < vocab_size) | (controls.top_p < 1)) & ~controls.greedy
    narrowed = functools.partial(_narrowed, scaled_BV, top_k_B, controls.top_p)
    return lax.cond(
        narrow_B.any(), lambda: jnp.where(narrow_B[:, None], narrowed(), scaled_BV), lambda: scaled_BV
    )


def _narrowed(scaled_BV: jax.Array, top_k_B: jax.Array, top_p_B: jax.Array) -> jax.Array:
    """-inf for what top-k, and then top-p among the rest, leave out of logits whose best is 0."""
    # The bits of floats from 0 up are ordered like the floats: a threshold is found by bisection on integers.
    depth_BV = lax.bitcast_convert_type(jnp.abs(scaled_BV), jnp.int32)
    kth_B = _depth_reaching(depth_BV, jnp.ones_like(scaled_BV), top_k_B.astype(jnp.float32))
    weight_BV = jnp.where(depth_BV <= kth_B[:, None], jnp.exp(scaled_BV), 0.0)
    last_B = _depth_reaching(depth_BV, weight_BV, top_p_B * weight_BV.sum(-1))
    # Rounding must not cost the tail when top-p is off.
    last_B = jnp.where(top_p_B < 1, last_B, kth_B)
    return jnp.where(depth_BV <= last_B[:, None], scaled_BV, -jnp.inf)


def _depth_reaching(depth_BV: jax.Array, weight_BV: jax.Array, target_B: jax.Array) -> jax.Array:
    """The least depth down to which the weights add up to the target: int32[B], the depth of -inf if they never do.

    31 passes over the row, which on a CPU is several times faster than one sort of it.
    """

    def halve(_: int, bounds: tuple[jax.Array, jax.Array]) -> tuple[jax.Array, jax.Array]:
        low_B, high_B = bounds
        middle_B = low_B + (high_B - low_B) // 2
        reached_B = jnp.where(depth_BV <= middle_B[:, None], weight_BV, 0.0).sum(-1) >= target_B
        return jnp.where(reached_B, low_B, middle_B + 1), jnp.where(reached_B, middle_B, high_B)

    deepest = jnp.full(len(depth_BV), np.float32(np.inf).view(np.int32))
    return lax.fori_loop(0, 31, halve, (jnp.zeros_like(deepest), deepest))[1]


# Limits of a normal float32: the device computes in it.
_TINY, _HUGE = float(np.finfo(np.float32).tiny), float(np.finfo(np.float32).max)


def _first[T](value: T | None, default: T) -> T:
    return default if value is None else value


def _listed(value: Any) -> tuple[Any, ...]:
    """One value, or several."""
    return tuple(value) if isinstance(value, (list, tuple)) else (value,)


def _is_number(value: object) -> bool:
    return isinstance(value, (int, float, np.integer, np.floating)) and not isinstance(value, bool)


def _is_integer(value: object) -> bool:
    return isinstance(value, (int, np.integer)) and not isinstance(value, bool)


def _check(good: bool, name: str, wanted: str, value: object) -> None:
    if not good:
        raise SamplingError(f"{name} must be {wanted}, got {value!r:.80}")
