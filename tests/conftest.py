"""Settings that must stand before JAX starts: the CPU, split into eight devices for the tests of sharding."""

import os
from collections.abc import Iterator

import pytest

os.environ.setdefault("JAX_PLATFORMS", "cpu")
if "xla_force_host_platform_device_count" not in os.environ.get("XLA_FLAGS", ""):
    os.environ["XLA_FLAGS"] = (
        f"{os.environ.get('XLA_FLAGS', '')} --xla_force_host_platform_device_count=8".strip()
    )


@pytest.fixture(scope="module")
def quick_compile() -> Iterator[None]:
    """Programs are compiled without most optimisations, for files that spend their time compiling: a third less of it."""
    import jax

    jax.config.update("jax_disable_most_optimizations", True)
    yield
    jax.config.update("jax_disable_most_optimizations", False)
