"""jax's TPU interpreter as the tests of TPU kernels use it: races between copies and reads noted, unwritten memory NaN."""

from __future__ import annotations

from jax._src.pallas.mosaic.interpret import interpret_pallas_call
from jax.experimental.pallas import tpu as pltpu

INTERPRETER = pltpu.InterpretParams(detect_races=True, uninitialized_memory="nan")


def races_found() -> bool:
    """Whether the last kernel that was interpreted had a race. Fails if none was: there is nothing to say then."""
    assert interpret_pallas_call.races is not None
    return interpret_pallas_call.races.races_found
