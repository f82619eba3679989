"""Rotary positions: plain RoPE, YaRN, dual chunk attention's four positions, and the length temperature.

Keys are rotated once, at `j mod s`, and cached. A query is rotated at one of three positions, by where the key lies:

    stage   keys of                      query position
    INTRA   the query's own chunk        i mod s
    SUCC    the chunk before             min(i mod s + s, C)
    INTER   all older chunks             min(2s - 1, C)

so that every key is seen at distance min(i - j, C - (j mod s)) (`algorithms.md` 2.2, 2.3). Without dual chunk attention
there is one endless chunk: everything is INTRA.

Sparse prefill chooses its lines with *critical* positions, i mod s + s for SUCC and i mod s + C for INTER: distances then
grow by one along a row and stay the same along a diagonal, so that diagonals stay coherent (`algorithms.md` 4.7).
"""

from __future__ import annotations

import dataclasses
import functools
import math
from enum import IntEnum

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.typing import DTypeLike

from qwen_jax.config import DualChunk, ModelConfig, Yarn
from qwen_jax.kernels.mixing import mix
from qwen_jax.kernels.rotations.api import mixed_rotations

_TURN = 32  # bits of a phase: an angle in units of 2**-32 turns, which uint32 arithmetic takes modulo a turn
_MOST_BITS = 11  # of each of the two words of a speed behind the point of a phase
_MANY = 1024  # positions whose sines are worth a pass of their own


class Stage(IntEnum):
    """Where a key lies as seen from a query; in key order the stages come INTER, SUCC, INTRA."""

    INTRA = 0
    SUCC = 1
    INTER = 2


def inverse_frequencies(theta: float, head_dim: int, yarn: Yarn | None = None) -> tuple[np.ndarray, float]:
    """Rotation speeds of the H / 2 pairs in radians a token, float64[H / 2], and the factor on cos and sin.

    The factor is 1 without YaRN. Source: `algorithms.md` 1.2 and 3.3; YaRN, arXiv 2309.00071, as transformers computes it.
    """
    speeds = theta ** (-np.arange(0, head_dim, 2, dtype=np.float64) / head_dim)
    if yarn is None:
        return speeds, 1.0

    def pair_turning(rotations: float) -> float:
        """The (fractional) pair that makes this many turns over the original context."""
        wavelengths = yarn.original_max_position_embeddings / (rotations * 2 * math.pi)
        return head_dim * math.log(wavelengths) / (2 * math.log(theta))

    low, high = pair_turning(yarn.beta_fast), pair_turning(yarn.beta_slow)
    if yarn.truncate:
        low, high = math.floor(low), math.ceil(high)
    low, high = max(low, 0), min(high, head_dim - 1)
    width = high - low if high != low else 0.001
    interpolated = np.clip((np.arange(head_dim // 2) - low) / width, 0, 1)
    speeds = speeds * (1 - interpolated) + speeds / yarn.factor * interpolated
    attention_factor = yarn.attention_factor
    if attention_factor is None:
        attention_factor = 0.1 * math.log(yarn.factor) + 1.0 if yarn.factor > 1 else 1.0
    return speeds, attention_factor


@dataclasses.dataclass(frozen=True)
class Rotary:
    """Rotates queries and keys for one model; immutable, hashable, safe to close over in a jitted function.

    Angles are exact to float32 at any position up to 2**23: whole turns are dropped in integers, where one float32 product
    would be off by up to 0.06 rad at a million tokens. No table is looked up: the TPU compiler moved such a gather to the
    SparseCore and lost the table (docs/aot.md).

    Attributes:
        theta, yarn, dca: as in the config. head_dim: H. max_position: bounds positions without dual chunk attention.
        mixed: the keys that queries meet are mixed (`kernels.mixing`), as 8 and 16 bits hold them: queries come mixed too.
    """

    theta: float
    head_dim: int
    max_position: int
    yarn: Yarn | None = None
    dca: DualChunk | None = None
    mixed: bool = False

    @classmethod
    def from_config(cls, config: ModelConfig, max_position: int | None = None) -> Rotary:
        """The rotary of a model. `max_position` bounds positions without DCA (default: the config's maximum)."""
        limit = max(max_position or 0, config.max_position_embeddings)
        return cls(config.rope_theta, config.head_dim, limit, config.yarn, config.dual_chunk)

    @property
    def chunk_len(self) -> int | None:
        """s, or None without dual chunk attention."""
        return self.dca.chunk_len if self.dca else None

    @property
    def stages(self) -> tuple[Stage, ...]:
        """The stages that exist, in key order."""
        return (Stage.INTER, Stage.SUCC, Stage.INTRA) if self.dca else (Stage.INTRA,)

    def key_positions(self, j: jax.Array) -> jax.Array:
        """Positions at which keys are rotated, int32 like `j` (absolute positions)."""
        return j % self.dca.chunk_len if self.dca else j

    def query_positions(self, i: jax.Array, stage: Stage, *, critical: bool = False) -> jax.Array:
        """Positions at which queries are rotated for the keys of `stage`, int32 like `i` (absolute positions).

        `critical` positions choose the lines of sparse prefill; attention never uses them.
        """
        if self.dca is None:
            return i
        s, c = self.dca.chunk_len, self.dca.saturation
        if stage is Stage.INTRA:
            return i % s
        if critical:
            return i % s + (s if stage is Stage.SUCC else c)
        if stage is Stage.SUCC:
            return jnp.minimum(i % s + s, c)
        return jnp.full_like(i, min(2 * s - 1, c))

    def cos_sin(self, positions: jax.Array) -> tuple[jax.Array, jax.Array]:
        """cos and sin of the angles at `positions` int32[...]: float32[..., H / 2] each, YaRN's factor included."""
        words, bits, factor = _speeds(self)
        top, middle, low = (jnp.asarray(word) for word in words)
        position = positions.astype(jnp.uint32)[..., None]
        phase = position * top + (position * middle + (position * low >> bits) >> bits)
        quarter = phase + np.uint32(1 << (_TURN - 3)) >> (_TURN - 2)  # the nearest, modulo 4
        rest = (phase - (quarter << (_TURN - 2))).astype(jnp.int32)
        x = rest.astype(jnp.float32) * np.float32(2 * math.pi / 2**_TURN)
        sin, cos = x * _series(x * x, 1), _series(x * x, 0)
        odd = quarter % 2 == 1
        sin, cos = jnp.where(odd, cos, sin), jnp.where(odd, sin, cos)
        return (
            factor * jnp.where((quarter + 1) & 2 > 0, -cos, cos),
            factor * jnp.where(quarter & 2 > 0, -sin, sin),
        )

    def rotate(self, x: jax.Array, positions: jax.Array) -> jax.Array:
        """Rotates x [..., T, heads, H] by positions int32[..., T], half-split pairs: float32."""
        cos, sin = (sine[..., None, :] for sine in self._sines(positions))
        a, b = jnp.split(x.astype(jnp.float32), 2, axis=-1)
        return jnp.concatenate([a * cos - b * sin, b * cos + a * sin], axis=-1)

    def _sines(self, positions: jax.Array) -> tuple[jax.Array, jax.Array]:
        """`cos_sin`, of many positions an array of its own: else XLA computes them again for every head."""
        sines = self.cos_sin(positions)
        return lax.optimization_barrier(sines) if positions.shape[-1] >= _MANY else sines

    def rotate_keys(self, k_BTKH: jax.Array, positions_BT: jax.Array) -> jax.Array:
        """Keys rotated at j mod s, not scaled by any temperature, float32: the cache rounds them once it has mixed them."""
        return self.rotate(k_BTKH, self.key_positions(positions_BT))

    def rotate_queries(
        self,
        q_BTNH: jax.Array,
        positions_BT: jax.Array,
        stage: Stage,
        *,
        scale_B: jax.Array | None = None,
        critical: bool = False,
        dtype: DTypeLike | None = None,
    ) -> jax.Array:
        """Queries as keys of `stage` see them, times scale_B; rounded once, to q's dtype or, if that is no wider, to `dtype`,
        that of the keys they meet. `critical`: see `query_positions`."""
        dtype = _rounded_to(q_BTNH.dtype, dtype)
        q = q_BTNH.astype(jnp.float32)
        if scale_B is not None:
            q = q * scale_B.astype(jnp.float32)[:, None, None, None]
        q = self.rotate(q, self.query_positions(positions_BT, stage, critical=critical))
        return mix(q, dtype) if self.mixed else q.astype(dtype)

    def query_stages(
        self,
        q_BTNH: jax.Array,
        positions_BT: jax.Array,
        *,
        scale_B: jax.Array | None = None,
        critical: bool = False,
        dtype: DTypeLike | None = None,
        backend: str | None = None,
    ) -> jax.Array:
        """`rotate_queries` for each of `stages`: [stages, B, T, N, H]. `backend` is that of `kernels.rotations`."""
        if not self.mixed:
            return jnp.stack([
                self.rotate_queries(q_BTNH, positions_BT, stage, scale_B=scale_B, critical=critical, dtype=dtype)
                for stage in self.stages
            ])  # fmt: skip
        positions_PBT = jnp.stack([
            self.query_positions(jnp.atleast_2d(positions_BT), stage, critical=critical) for stage in self.stages
        ])  # fmt: skip
        cos_PBTJ, sin_PBTJ = self._sines(positions_PBT)
        if scale_B is not None:
            scale_B11 = scale_B.astype(jnp.float32)[:, None, None]
            cos_PBTJ, sin_PBTJ = cos_PBTJ * scale_B11, sin_PBTJ * scale_B11
        return mixed_rotations(
            q_BTNH, cos_PBTJ, sin_PBTJ, dtype=_rounded_to(q_BTNH.dtype, dtype), backend=backend
        )

    def stage_starts(self, i: jax.Array) -> tuple[jax.Array, jax.Array]:
        """First SUCC key and first INTRA key of a query at absolute position i, int32; INTER keys start at 0."""
        if self.dca is None:
            return jnp.zeros_like(i), jnp.zeros_like(i)
        intra = i - i % self.dca.chunk_len
        return jnp.maximum(intra - self.dca.chunk_len, 0), intra

    def stage_ranges(self, i: jax.Array, end: jax.Array) -> dict[Stage, tuple[jax.Array, jax.Array]]:
        """Keys [first, last) of every stage below `end`, as a query at absolute position i sees them; last may be < first."""
        succ, intra = self.stage_starts(i)
        bounds = {
            Stage.INTER: (jnp.zeros_like(succ), succ),
            Stage.SUCC: (succ, intra),
            Stage.INTRA: (intra, end),
        }
        return {stage: (bounds[stage][0], jnp.minimum(bounds[stage][1], end)) for stage in self.stages}


def _rounded_to(mine: np.dtype, keys: DTypeLike | None) -> np.dtype:
    """Products are of one dtype, that of the keys, which are many; queries that hold more than they keep it."""
    return mine if keys is None or mine.itemsize > jnp.dtype(keys).itemsize else jnp.dtype(keys)


def _series(square: jax.Array, first: int) -> jax.Array:
    """cos x (first = 0) or sin x / x (first = 1) of x**2: Taylor's series, off by under 2e-9 up to an eighth of a turn."""
    found = jnp.zeros_like(square)
    for power in range(first + 10, -1, -2):
        found = found * square + np.float32((-1) ** (power // 2) / math.factorial(power))
    return found


@functools.lru_cache(maxsize=32)
def _speeds(rotary: Rotary) -> tuple[np.ndarray, int, np.float32]:
    """Speeds in turns a token as uint32[3, H / 2] words, the bits of the last two, and the factor on cos and sin.

    A speed is words[0] / 2**32 + words[1] / 2**(32 + bits) + words[2] / 2**(32 + 2 bits), rounded to the nearest; a position
    times either of the last two, carries included, is below 2**32.
    """
    speeds, factor = inverse_frequencies(rotary.theta, rotary.head_dim, rotary.yarn)
    # The last row of a chunk at its critical position for INTER keys is the farthest.
    limit = rotary.dca.chunk_len + rotary.dca.saturation if rotary.dca else rotary.max_position
    bits = min(_TURN - limit.bit_length(), _MOST_BITS)
    fixed = np.rint(speeds / (2 * math.pi) * 2.0 ** (_TURN + 2 * bits)).astype(np.uint64)
    words = [fixed >> np.uint64(2 * bits), fixed >> np.uint64(bits), fixed]
    masks = [2**_TURN - 1, 2**bits - 1, 2**bits - 1]
    return (
        np.stack([word & np.uint64(mask) for word, mask in zip(words, masks, strict=True)]).astype(np.uint32),
        bits,
        np.float32(factor),
    )


def temperature(length: jax.Array | int, original: int) -> jax.Array:
    """m(L) = max(1, 0.1 ln(L / L0) + 1), float32; the factor on queries and on keys (`algorithms.md` 3.1).

    Args:
        length: L, int32 of any shape, tokens.
        original: L0, original_max_position_embeddings, tokens; 0 means no temperature: m = 1.
    """
    length = jnp.asarray(length)
    if original == 0:
        return jnp.ones(length.shape, jnp.float32)
    ratio = jnp.maximum(length, original).astype(jnp.float32) / original
    return 1.0 + 0.1 * jnp.log(ratio)
