"""The XLA backend of decode attention."""

from __future__ import annotations

from collections.abc import Iterator

import jax
import jax.numpy as jnp
import pytest

from qwen_jax.kernels.decode_attention import reference
from tests.kernels.decode_attention.suite import DecodeSuite


class TestXla(DecodeSuite):
    backend = "xla"


class TestXlaBfloat16(DecodeSuite):
    backend = "xla"
    dtype = jnp.bfloat16
    tolerance = 1e-2
    large_scale = 1.0


class TestXlaKeysOfFloat16(TestXlaBfloat16):
    keys_dtype = jnp.float16


class TestXlaOverSeveralTiles(DecodeSuite):
    """Tiles of 24 keys: they straddle stages, and the last one overhangs the cache."""

    backend = "xla"

    @pytest.fixture(autouse=True, scope="class")
    @classmethod
    def small_tiles(cls) -> Iterator[None]:
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(reference, "KEY_TILE", 24)
            jax.clear_caches()
            yield
        jax.clear_caches()
