"""Collectives and overlap read off hand-written programs, whose bytes are counted by hand, and off compiled ones.

Run as a program it compiles attention over a ring of four described chips in every way of communication and prints what each
sends, since only a process that has not touched devices can describe others.
"""

import importlib.util
import json
import os
import subprocess
import sys

import pytest

from lcx.attention.ring import full_journeys
from lcx.parallel.hlo import Collective, Overlap, collectives, overlaps, shape_bytes

HEADER = "HloModule m, is_scheduled=true, num_partitions=8\n\n"

ONCE = """ENTRY %main (x: f32[4,128]) -> f32[32,128] {
  %x = f32[4,128]{1,0:T(8,128)} parameter(0)
  %sum = f32[4,128]{1,0:T(8,128)S(1)} all-reduce(%x), replica_groups={{0,1,2,3},{4,5,6,7}}, to_apply=%add
  %start = (f32[4,128]{1,0}, f32[32,128]{1,0}) all-gather-start(%sum), replica_groups=[1,8]<=[8], dimensions={0}
  %done = f32[32,128]{1,0:T(8,128)} all-gather-done(%start)
  %part = f32[8,128]{1,0} reduce-scatter(%done), replica_groups=mesh['a'=2,'b'=4] {'b'}, dimensions={0}, to_apply=%add
  %even = f32[8,128]{1,0} all-to-all(%part), replica_groups=mesh['a'=8] {'a':(1)2}, dimensions={0}
  ROOT %last = f32[32,128]{1,0} copy(%done)
}
"""

FUSED = """%all-reduce-scatter.1 (p: bf16[16,128]) -> bf16[2,128] {
  %p = bf16[16,128]{1,0:T(8,128)(2,1)} parameter(0)
  %whole = bf16[16,128]{1,0} all-reduce(%p), replica_groups={}, to_apply=%add
  ROOT %own = bf16[2,128]{1,0} dynamic-slice(%whole, %place, %zero), dynamic_slice_sizes={2,128}
}

%fused_computation.1 (p.1: f32[2,128]) -> (f32[2,128], f32[16,128]) {
  %p.1 = f32[2,128]{1,0} parameter(0)
  %gather.1 = f32[16,128]{1,0} all-gather(%p.1), replica_groups={}, frontend_attributes={chain_id="0"}
  ROOT %begin = (f32[2,128]{1,0}, f32[16,128]{1,0}) custom-call(%gather.1), custom_call_target="AsyncCollectiveStart"
}

%async_collective_fusion.1 (p.2: f32[2,128]) -> f32[16,128] {
  %p.2 = f32[2,128]{1,0} parameter(0)
  ROOT %gather.2 = f32[16,128]{1,0} all-gather(%p.2), replica_groups={}, frontend_attributes={chain_id="0"}
}

ENTRY %main (x: bf16[16,128], y: f32[2,128]) -> bf16[2,128] {
  %x = bf16[16,128]{1,0} parameter(0)
  %y = f32[2,128]{1,0} parameter(1)
  %begun = (f32[2,128]{1,0}, f32[16,128]{1,0}) fusion(%y), kind=kCustom, calls=%fused_computation.1
  %going = f32[16,128]{1,0} fusion(%y), kind=kCustom, calls=%async_collective_fusion.1
  ROOT %out = bf16[2,128]{1,0} fusion(%x), kind=kCustom, calls=%all-reduce-scatter.1
}
"""

BODY = """%body (state: (s32[], f32[64])) -> (s32[], f32[64]) {
  %state = (s32[]{:T(128)}, f32[64]{0}) parameter(0)
  %i = s32[]{:T(128)} get-tuple-element(%state), index=0
  %x = f32[64]{0} get-tuple-element(%state), index=1
  %one = s32[] constant(1)
  %sent = (f32[64]{0}, f32[64]{0}, u32[], u32[]) collective-permute-start(%x), source_target_pairs={{0,1},{1,0}}
  %k = f32[64]{0} custom-call(%x), custom_call_target="tpu_custom_call"
  %moved = f32[64]{0} collective-permute-done(%sent)
  %late = f32[64]{0} collective-permute(%k), source_target_pairs={{0,1},{1,0}}
  %next = s32[] add(%i, %one)
  ROOT %new = (s32[], f32[64]{0}) tuple(%next, %late)
}

%condition (state.1: (s32[], f32[64])) -> pred[] {
  %state.1 = (s32[], f32[64]{0}) parameter(0)
  %i.1 = s32[] get-tuple-element(%state.1), index=0
  %stop = s32[] BOUND
  ROOT %less = pred[] compare(%i.1, %stop), direction=LT
}

ENTRY %main (x.1: f32[64]) -> f32[64] {
  %x.1 = f32[64]{0} parameter(0)
  %two = s32[] constant(2)
  %from = s32[] copy(%two)
  %first = (s32[], f32[64]{0}) tuple(%from, %x.1)
  %loop = (s32[], f32[64]{0}) while(%first), condition=%condition, body=%body, metadata={op_name="NAME"}NOTE
  ROOT %out.1 = f32[64]{0} get-tuple-element(%loop), index=1
}
"""


def loop(bound="constant(7)", name="jit(f)/while", note=""):
    return HEADER + BODY.replace("BOUND", bound).replace("NAME", name).replace("NOTE", note)


def test_bytes_of_each_kind_by_hand():
    """x is 2,048 bytes: summed over 4, gathered over 8, scattered over 4, exchanged over 2."""
    assert collectives(HEADER + ONCE) == {
        "all-reduce": Collective(1, 2 * 2048 * 3 // 4),
        "all-gather": Collective(1, 7 * 2048),
        "reduce-scatter": Collective(1, 8 * 2048 * 3 // 4),
        "all-to-all": Collective(1, 2 * 2048 // 2),
    }


def test_what_the_compiler_fuses_is_counted_once_and_by_what_it_does():
    assert collectives(HEADER + FUSED) == {
        "all-gather": Collective(1, 7 * 1024),
        "reduce-scatter": Collective(1, 4096 * 7 // 8),
    }


@pytest.mark.parametrize(
    "text, count, assumed",
    [
        (loop(), 2 * 5, False),
        (loop().replace("%one = s32[] constant(1)", "%one = s32[] constant(2)"), 2 * 3, False),
        (loop("get-tuple-element(%state.1), index=0"), 0, False),
        (loop("parameter(1)"), 2, True),
        (loop("parameter(1)", note=', backend_config={"known_trip_count":{"n":"11"}}'), 2 * 11, False),
        (loop("parameter(1)", "jit(f)/ring over context hops/while"), 2 * 8, True),
    ],
    ids=["constants", "two at a time", "nothing to do", "unknown", "noted", "a ring"],
)
def test_loops_count_as_often_as_they_run(text, count, assumed):
    found = collectives(text, full_journeys({"context": 8})).get("collective-permute", Collective(0, 0, False))
    assert found == Collective(count, count * 256, assumed)


def test_a_permute_overlaps_the_kernels_between_its_start_and_its_end():
    assert overlaps(loop()) == [Overlap("body", "sent", 256, ("k",)), Overlap("body", "late", 256, ())]
    assert overlaps(loop(), kernel="another") == []


def test_a_kernel_may_be_in_what_a_computation_calls():
    called = HEADER + BODY.replace("BOUND", "constant(7)").replace(
        'custom-call(%x), custom_call_target="tpu_custom_call"', "fusion(%x), calls=%inner"
    )
    inner = (
        '%inner (p: f32[64]) -> f32[64] {\n  ROOT %c = f32[64]{0} custom-call(%p), custom_call_target="tpu_custom_call"\n}\n'
    )
    assert overlaps(called.replace("%body (", inner + "\n%body (", 1))[0] == Overlap("body", "sent", 256, ("k",))


def test_shapes_and_what_is_not_a_schedule():
    assert shape_bytes("(bf16[2,3]{1,0:T(8,128)(2,1)}, pred[5], s4[3], f8e4m3fn[2], u32[])") == 12 + 5 + 2 + 2 + 4
    with pytest.raises(ValueError, match="not a scheduled HLO module"):
        collectives("HloModule m\n")


W, c, H, K, D = 4, 256, 8, 2, 128  # devices, tokens a device, heads
KEYS, TOKENS, GRADIENTS = 2 * c * K * D * 2, 4 * c * 4, 2 * c * K * D * 4
HEADS, ROWS = c * H * D, c * H * 4  # an array of query heads, and bytes of a float32 a head
REPEATED = c * 4 * D  # keys of the 4 devices, each of whom needs a head


@pytest.mark.slow
def test_compiled_programs_send_what_the_formulas_say():
    """Queries stay in all but all-to-all. The compiler takes what is cast to bfloat16 after an exchange before it."""
    if importlib.util.find_spec("libtpu") is None:
        pytest.skip("needs libtpu, the TPU compiler")
    environment = {**os.environ, "JAX_PLATFORMS": "cpu", "XLA_FLAGS": "", "PYTHONPATH": os.pathsep.join(filter(None, sys.path))}
    run = subprocess.run([sys.executable, __file__], env=environment, capture_output=True, text=True, timeout=300)
    assert run.returncode == 0, run.stderr[-3000:]
    found = json.loads(run.stdout.splitlines()[-1])
    share = lambda size: size * (W - 1) // W
    gathered, ring = (W - 1) * (KEYS + TOKENS), W * (KEYS + TOKENS)
    exchanged = share(HEADS * 2 + 2 * REPEATED * 2 + HEADS * 4 + ROWS)
    assert found["AllGather forward"] == {"all-gather": gathered}
    assert found["AllGather both"] == {"all-gather": gathered, "reduce-scatter": share(W * GRADIENTS)}
    assert found["Ring forward"]["collective-permute"] == ring
    assert found["Ring both"]["collective-permute"] == 2 * ring + W * GRADIENTS + GRADIENTS
    assert found["Ulysses forward"] == {"all-to-all": exchanged, "all-gather": (W - 1) * TOKENS}
    back = share(2 * HEADS * 2 + 2 * ROWS + 2 * REPEATED * 4)
    assert found["Ulysses both"] == {"all-to-all": exchanged + back, "all-gather": 2 * (W - 1) * TOKENS}


def main():
    import jax
    import jax.numpy as jnp
    from jax.sharding import NamedSharding, PartitionSpec

    from lcx.attention.all_gather import AllGather
    from lcx.attention.mask import Causal
    from lcx.attention.ring import Ring
    from lcx.attention.sharded import sharded_attend
    from lcx.attention.ulysses import Ulysses
    from lcx.batch import TokenInfo
    from lcx.parallel.mesh import MeshSpec
    from lcx.parallel.rules import Rules
    from lcx.parallel.topology import topology_devices

    mesh, found = MeshSpec(context=W).build(topology_devices("v5e:2x2")), {}
    sharding = NamedSharding(mesh, PartitionSpec(None, "context"))
    array = lambda dtype, *shape: jax.ShapeDtypeStruct((1, W * c, *shape), dtype, sharding=sharding)
    field = array(jnp.int32)
    info = TokenInfo(index=field, order=field, positions=array(jnp.float32, 1), segments=field, roles=field)
    q, k = array(jnp.bfloat16, H, D), array(jnp.bfloat16, K, D)
    options = {"rules": Rules(), "mask": Causal(), "scale": 0.1, "backend": "xla"}
    for way in (AllGather(), Ring(), Ulysses()):

        def forward(q, k, v, info, way=way):
            return sharded_attend(q, k, v, info, info, communication=way, **options)

        def both(q, k, v, info, d_out, d_lse, forward=forward):
            return jax.vjp(lambda *x: forward(*x, info), q, k, v)[1]((d_out, d_lse))

        cotangents = array(jnp.float32, H, D), array(jnp.float32, H)
        for run, more in ((forward, ()), (both, cotangents)):
            with jax.set_mesh(mesh):
                text = jax.jit(run).lower(q, k, k, info, *more).compile().as_text()
            sent = collectives(text, full_journeys(mesh.shape))
            found[f"{type(way).__name__} {run.__name__}"] = {kind: each.bytes for kind, each in sent.items()}
    print(json.dumps(found))


if __name__ == "__main__":
    main()
