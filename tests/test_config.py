"""A config is a tree that any field of can be set, that names what is refused, and that survives storage."""

import dataclasses

import fiddle
import jaxtyping
import pytest
from fiddle.experimental.auto_config import auto_config

from configs.models import byte
from lcx.attention.mask import Or, Sink, Window
from lcx.channels.glu import GLU
from lcx.config import assign, build, dumps, expand, loads, of_spec
from lcx.config_text import fields, first_difference, parse, render
from lcx.mixers.attention import Attention
from lcx.models.decoder import Decoder
from lcx.models.layer import Layer
from lcx.parts import parts
from lcx.positions.frequencies import FrequencyRule
from lcx.positions.rope import Rope
from lcx.positions.yarn import YaRN
from lcx.spec import SpecError, edit


@pytest.fixture(autouse=True)
def _only_specs_check_types(monkeypatch):
    """As in a program, where no import hook stands before the specs' own check."""
    monkeypatch.setattr(jaxtyping.config, "jaxtyping_disable", True)


def changed(path, text):
    """The toy decoder with one field set as the command line does it."""
    return build(assign(expand(byte.toy.as_buildable()), path, parse(text)))


def test_a_tree_builds_what_the_config_function_builds():
    assert build(expand(byte.toy.as_buildable(width=64))) == byte.toy(width=64)


@pytest.mark.parametrize(
    ("path", "text", "value"),
    [
        ("width", "96", 96),
        ("periods", "3", 3),
        ("compute", "bfloat16", "bfloat16"),
        ("compute", "'bfloat16'", "bfloat16"),
        ("logit_softcap", "30.0", 30.0),
        ("embed_mixer", "None", None),
        ("rope.base", "5e5", 5e5),
        ("pattern[0].mixer.heads", "8", 8),
        ("pattern[0].channel.bias", "true", True),
        ("rules.width", "('fsdp', 'context')", ("fsdp", "context")),
        ("rope", "YaRN(factor=4.0, original_length=128)", YaRN(factor=4.0, original_length=128)),
        ("rope", "lcx.positions.rope.Rope(base=2e4)", Rope(base=2e4)),
        ("pattern[0].mixer.mask", "Sink(size=4) | Window(size=8)", Or(terms=(Sink(size=4), Window(size=8)))),
        ("pattern[0].mixer.mask", "Or(terms=(Sink(size=4), Window(size=8)))", Or(terms=(Sink(size=4), Window(size=8)))),
    ],
)
def test_a_field_of_any_depth_is_set(path, text, value):
    assert changed(path, text) == edit(byte.toy(), path, value)


def test_a_field_of_a_default_part_and_of_a_part_just_set_can_be_set():
    tree = assign(expand(byte.toy.as_buildable()), "rope", parse("YaRN(factor=4.0, original_length=128)"))
    assert build(assign(tree, "rope.ramp", "rotations")) != build(tree)
    assert build(assign(assign(tree, "rope.truncate", False), "rope.factor", 8.0)).rope == YaRN(
        factor=8.0, original_length=128, truncate=False
    )


def test_fields_that_need_each_other_are_checked_only_at_the_end():
    tree = assign(expand(byte.toy.as_buildable()), "pattern[0].mixer.heads", 6)
    with pytest.raises(SpecError, match="heads = 6"):
        build(tree)
    assert build(assign(tree, "pattern[0].mixer.kv_heads", 3)).pattern[0].mixer.heads == 6


@auto_config
def _twice():
    mixer = Attention(heads=4, kv_heads=4, head_dim=8)
    layer = Layer(mixer=mixer, channel=GLU(hidden=8))
    return Decoder(vocab=8, width=8, periods=1, pattern=(layer, layer))


def test_one_part_in_two_places_is_set_in_one():
    decoder = build(assign(expand(_twice.as_buildable()), "pattern[0].mixer.heads", 8))
    assert [layer.mixer.heads for layer in decoder.pattern] == [8, 4]


@pytest.mark.parametrize(
    ("path", "text", "message"),
    [
        ("widht", "3", "Decoder has no field 'widht'. Did you mean width?"),
        ("pattern[0].mixer.head", "3", "pattern[0].mixer: Attention has no field 'head'. Did you mean heads"),
        ("pattern[1].mixer.heads", "3", "pattern has no element [1]: it has 1"),
        ("width.x", "3", "width = 128 has no fields, so no 'x'"),
        ("pattern[0", "3", "'pattern[0' is no path"),
        ("width", "abc", "Decoder.width = 'abc': expected int"),
        ("width", "96.0", "Decoder.width = 96.0: expected int"),
        ("periods", "True", "Decoder.periods = True: expected int"),
        ("compute", "float16", "expected one of 'float32', 'bfloat16'"),
        ("rope", "yarn", "Decoder.rope = 'yarn': expected FrequencyRule or None"),
        ("rope", "Window(size=3)", "Decoder.rope = Window(size=3): expected FrequencyRule or None"),
        ("rope", "NTK", "; the part is written NTK(factor=...)"),
        ("rope", "lcx.positions.ntk.NTK", "; the part is written NTK(factor=...)"),
        ("rope", "yarn", "; did you mean YaRN(factor=..., original_length=...)?"),
        ("rope", "none", "Decoder.rope = 'none': expected FrequencyRule or None"),
        ("rope", "none", "; write None"),
        ("pattern[0].mixer.rope", "None", "Attention.rope = None: expected FrequencyRule or one of 'model', 'none'"),
        ("pattern[0].mixer.rope", "None", "; write none, not None"),
        ("rope", "ALiBi()", "Decoder.rope = ALiBi(): expected FrequencyRule or None (AxialRope, "),
        ("rope", "ALiBi()", "; ALiBi is a LinearBias, for pattern[0].mixer.distance_bias"),
        ("rope", "ALiBi", "; ALiBi is a LinearBias, for pattern[0].mixer.distance_bias"),
        (
            "pattern[0].mixer.distances",
            "YaRN(factor=2.0, original_length=8)",
            "DualChunk, LongHeads, ReRoPE, SelfExtend); YaRN is a FrequencyRule, for pattern[0].mixer.rope or rope",
        ),
        (
            "pattern[0].mixer.distances",
            "YaRN(factor=2.0, original_length=8)",
            "Attention.distances = YaRN(factor=2.0, original_length=8): expected DistancePlan or None (DimensionGroups, ",
        ),
        ("pattern[0].mixer.distances", "PoSE(target=8)", "; PoSE is a PositionRule, for Pipeline.positions"),
        ("embed_mixer", "Layer(mixer=ShortConvolution(), channel=GLU(hidden=8))", "; Layer is for pattern"),
        ("pattern[0].mixer", "GLU(hidden=8)", "; GLU is a Channel, for pattern[0].channel"),
        ("rope", "YaRM(factor=2.0)", "there is no part 'YaRM'. Did you mean YaRN?"),
        (
            "pattern[0].mixer.cache",
            "KVCache(policy=Evict(score=Quest(), keep=8))",
            "pattern[0].mixer.cache.policy.score = Quest(budget=...): expected Scorer (Chance, ",
        ),
        ("pattern[0].mixer.cache", "KVCache(codec=Int9())", "'Int9'. Did you mean Int8? KVCache.codec takes Codec (Fp8, Int8,"),
        ("pattern[0].mixer.cache", "KVCache(codec=Int8)", "'Int8': the part is written Int8()"),
        (
            "pattern[0].mixer.cache.codec",
            "Int8()",
            "DenseCache has no field 'codec'. It has keys; KVCache and PagedCache have it",
        ),
        ("rope", "YaRN(factr=2.0)", "YaRN has no field 'factr'. Did you mean factor"),
        ("pattern[0].mixer.cache", "RingCache(codec=Int8())", "It has keys, size; KVCache and PagedCache have it"),
        ("pattern[0].mixer.cache", "KVCache(policy=SnapKV(keep=0.2))", "pool; Evict(score=SnapKV(), keep=...) has it"),
        ("rope", "YaRN(2.0)", "YaRN: fields are given by name, such as YaRN(factor=..., original_length=...)"),
        ("rope", "YaRN(factor=0.5, original_length=8)", "rope: YaRN.factor = 0.5: expected at least 1"),
        ("rope", "YaRN(original_length=8)", "rope: YaRN.factor is missing: expected float"),
        ("rope", "YaRN()", "rope: YaRN.factor is missing: expected float; YaRN.original_length is missing: expected int"),
        ("rope", "YaRN(factor=2.0, ramp=index)", "a string needs quotes"),
        ("rope", "__import__('os').system('true')", "there is no part"),
        ("pattern[0].mixer.heads", "3", "pattern[0].mixer: Attention.heads = 3: expected a multiple of kv_heads = 4"),
    ],
)
def test_what_cannot_be_set_is_named(path, text, message):
    with pytest.raises(SpecError) as error:
        changed(path, text)
    assert message in str(error.value)


def test_stored_configs_give_the_same_specs_and_nothing_else():
    decoder = changed("rope", "YaRN(factor=4.0, original_length=128)")
    assert build(loads(dumps(decoder))) == decoder
    for text in ("{}", "steps: 3", dumps(decoder).replace("lcx.positions.yarn", "os"), dumps(decoder).replace("YaRN", "YaRM")):
        with pytest.raises(SpecError, match="not a config of this version"):
            loads(text)


def test_a_stored_config_of_unknown_fields_is_refused():
    text = dumps(byte.toy()).replace('"logit_softcap"', '"logit_cap"')
    with pytest.raises(SpecError, match=r"Decoder has no field 'logit_cap'\. Did you mean logit_softcap"):
        build(loads(text))


def test_a_config_that_calls_something_else_is_a_mistake_of_its_author():
    with pytest.raises(TypeError, match="auto_config"):
        expand(fiddle.Config(dataclasses.asdict, byte.toy()))


def test_render_shows_every_field_under_the_path_that_sets_it():
    text = render(byte.toy(), "config")
    assert "config = Decoder\n  vocab = 264\n" in text
    assert "\n  pattern[0] = Layer\n    mixer = Attention\n      heads = 4\n" in text
    assert len(text.splitlines()) == len([path for path, _ in fields(byte.toy()) if path != "pattern"])


@pytest.mark.parametrize(
    ("path", "text", "difference"),
    [
        ("rope.base", "5e5", "rope.base: 10000.0 against 500000.0"),
        ("embed_mixer", "None", "embed_mixer: 'ShortConvolution' against None"),
        ("rope", "YaRN(factor=4.0, original_length=128)", "rope: 'Rope' against 'YaRN'"),
    ],
)
def test_the_first_difference_is_found(path, text, difference):
    assert first_difference(byte.toy(), changed(path, text)) == difference
    assert first_difference(byte.toy(), byte.toy()) is None


@pytest.mark.parametrize("cls", parts(), ids=lambda cls: cls.__name__)
def test_every_part_can_be_written_on_a_command_line_and_stored(cls):
    for example in cls.examples():
        assert build(parse(repr(example))) == example
        assert build(loads(dumps(example))) == example
        assert build(of_spec(example)) == example


def test_parts_are_found_by_walking():
    assert {Rope, YaRN} <= set(parts(FrequencyRule))
    assert FrequencyRule not in parts(FrequencyRule)
    assert not [cls for cls in parts() if cls.__name__.startswith("_")]
