"""What a program keeps on the way is told by size and origin."""

import jax
import jax.numpy as jnp

from lcx.parallel.temporaries import Temporary, compiled_with_temporaries, largest

ASSIGNMENT = """BufferAssignment:
allocation 0: size 4096, parameter 0, shape |f32[32,32]| at ShapeIndex {}:
 value: <1 x.1 @0> (size=4096,offset=0): f32[32,32]{1,0:T(8,128)}
allocation 1: size 8192, color 1, preallocated-temp:
 value: <2 copy.1 @1> (size=8192,offset=0): f32[32,64]{1,0:T(8,128)S(1)}
allocation 2: size 6144, preallocated-temp:
 value: <3 fusion.2 @0> (size=2048,offset=0): bf16[32,32]{1,0}
 value: <4 fusion.3 @0> (size=2048,offset=2048): bf16[32,32]{1,0}
 value: <5 copy.7{1} @0> (size=4096,offset=0): f32[32,32]{1,0}
"""
PROGRAM = """HloModule jit_f, is_scheduled=true
ENTRY %main (x.1: f32[32,32]) -> f32[32,32] {
  %x.1 = f32[32,32]{1,0} parameter(0)
  %fusion.2 = bf16[32,32]{1,0} tanh(%x.1), metadata={op_name="jit(f)/tanh"}
  %fusion.3 = bf16[32,32]{1,0} tanh(%x.1), metadata={op_name="jit(f)/tanh"}
}
"""


def test_by_hand():
    """Neither arguments nor what lies in the chip's small memory; alike ones once."""
    copy, tanh = Temporary(4096, "f32[32,32]", "copy.7"), Temporary(2048, "bf16[32,32]", "jit(f)/tanh")
    assert largest(ASSIGNMENT, PROGRAM, 5) == [copy, tanh]
    assert largest(ASSIGNMENT, PROGRAM, 1) == [copy]
    assert largest("", PROGRAM, 5) == []


def test_of_a_program():
    def f(x):
        return jnp.sin(jnp.cos(x) @ x) @ x

    lowered = jax.jit(f).lower(jax.ShapeDtypeStruct((128, 128), jnp.float32))
    program, found = compiled_with_temporaries(lowered.compile, 3)
    assert found[0].bytes == 4 * 128 * 128 and found[0].shape == "f32[128,128]" and found[0].name.startswith("jit(f)/")
    assert found[0].bytes <= program.memory_analysis().temp_size_in_bytes
