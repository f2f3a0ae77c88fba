"""The kind of decoder that each kind of model memory makes."""

from flax import nnx

from lcx.memory.activation_beacon import ActivationBeacon
from lcx.memory.gist import Gist
from lcx.memory.segment_memory import SegmentMemory
from lcx.memory.ttt_e2e import TTTE2E
from lcx.models.beacon_decoder import BeaconDecoderModel
from lcx.models.decoder import Decoder, DecoderModel
from lcx.models.gist_decoder import GistDecoderModel
from lcx.models.segmented import SegmentedModel
from lcx.models.ttt_e2e_decoder import TTTE2EDecoderModel

KINDS = {
    SegmentMemory: SegmentedModel,
    ActivationBeacon: BeaconDecoderModel,
    Gist: GistDecoderModel,
    TTTE2E: TTTE2EDecoderModel,
}


def decoder_with_memory(spec: Decoder, rngs: nnx.Rngs) -> DecoderModel:
    """The decoder of a spec whose `memory` is set."""
    found = [model for kind, model in KINDS.items() if isinstance(spec.memory, kind)]
    spec.check(bool(found), "memory", f"one of {', '.join(kind.__name__ for kind in KINDS)}")
    return found[0](spec, rngs)
