"""Rules map logical axes to mesh axes and refuse what cannot be."""

import jax
import pytest
from jax.sharding import PartitionSpec as P

from lcx.parallel.mesh import MeshSpec
from lcx.parallel.rules import Rules
from lcx.spec import SpecError


def test_partition_of_parameters_and_activations():
    rules = Rules()
    assert rules.partition(("layers", "width", "heads", None)) == P(None, ("fsdp",), ("tensor",), None)
    assert rules.partition(("batch", "sequence", None)) == P(("data", "fsdp"), ("context",), None)


def test_collisions_are_refused():
    with pytest.raises(SpecError, match="shard two axes of one array"):
        Rules(hidden=("fsdp",)).partition(("width", "hidden"))
    with pytest.raises(SpecError, match=r"Rules\.sequence"):
        Rules(sequence=("data",))
    with pytest.raises(SpecError, match=r"Rules\.width = \('fsdb',\)"):
        Rules(width=("fsdb",))
    with pytest.raises(SpecError, match="no logical axis 'widht'"):
        Rules().partition(("widht",))


def test_mesh_needs_its_devices():
    assert dict(MeshSpec(data=2, tensor=4).build().shape) == {"data": 2, "fsdp": 1, "context": 1, "tensor": 4}
    with pytest.raises(SpecError, match=r"context 16 .* = 16 devices, but there are 8"):
        MeshSpec(context=16).build()
    with pytest.raises(SpecError, match=r"MeshSpec\.data = 0"):
        MeshSpec(data=0)
    assert MeshSpec(data=2).build(jax.devices()[4:6]).devices.flat[0] == jax.devices()[4]
