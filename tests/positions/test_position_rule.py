"""Position rules: what they promise for documents of any length, and the published constructions."""

import itertools

import numpy as np
import pytest

from lcx.data.copying import Tiles
from lcx.data.packing import PackedText
from lcx.data.pipeline import Pipeline, Weighted
from lcx.data.rows import Joined
from lcx.data.sources import StandardLibrary
from lcx.parts import parts
from lcx.positions.clex_positions import CLEXPositions
from lcx.positions.position_rule import ChunkSlots, DenseAndMoved, PoSE, PositionRule, RandomPositions, RandomSteps
from lcx.spec import SpecError

RULES = [rule for cls in parts(PositionRule) for rule in cls.examples()]


@pytest.mark.parametrize("rule", RULES, ids=str)
def test_positions_never_fall_and_stay_in_reach(rule):
    for seed in range(20):
        length = 1 + seed
        found = rule.positions(length, np.random.default_rng(seed))
        assert found.shape == (length,) and found.dtype == np.float32 and found[0] >= 0
        assert (np.diff(found) >= 0).all() and (rule.reach is None or found[-1] < rule.reach)
        assert found[-1] - found[0] < rule.spread(length) <= rule.spread(length + 1)
        np.testing.assert_array_equal(found, rule.positions(length, np.random.default_rng(seed)))


def test_pose_skips_once_after_at_most_half():
    """Both parts are contiguous; over many draws any skip up to the target occurs."""
    last = []
    for seed in range(300):
        found = PoSE(target=40).positions(16, np.random.default_rng(seed))
        steps = np.diff(found)
        assert found[0] == 0 and (steps != 1).sum() <= 1 and (steps[8:] == 1).all()
        last.append(found[-1])
    assert {*map(int, last)} == set(range(15, 40))


def test_how_far_apart_positions_are_by_hand():
    """The last of three is of two windows of 8 but a token, spread over four times its length."""
    assert [PoSE(target=40, chunks=chunks).spread(16) for chunks in (1, 2)] == [16, 40]
    assert [DenseAndMoved(densest=4, original_length=64, sinks=sinks).spread(16) for sinks in (0, 4)] == [16, 64]
    assert [CLEXPositions(original_length=8, largest=4).spread(n) for n in (4, 15, 40)] == [16, 60, 60]
    assert RandomSteps().spread(16) == 16 and RandomPositions(target=40).spread(16) == ChunkSlots(target=40).spread(16) == 40


def test_sinks_of_e2_llm_stand_at_the_start():
    rule = DenseAndMoved(densest=4, original_length=64)
    densities = set()
    for seed in range(100):
        found = rule.positions(20, np.random.default_rng(seed))
        density = round(1 / float(found[1]))
        densities.add(density)
        np.testing.assert_allclose(found[:4], np.arange(4) / density, rtol=1e-6)
        np.testing.assert_allclose(np.diff(found[4:]), 1 / density, atol=1e-5)
        assert found[-1] < 64
    assert densities == {1, 2, 3, 4}


def test_e2_llm_does_not_move_what_fills_the_window():
    found = DenseAndMoved(densest=1, original_length=8).positions(30, np.random.default_rng(0))
    np.testing.assert_array_equal(found, np.arange(30))


def test_slots_hold_a_chunk_each_and_the_tail_ends_the_range():
    rule = ChunkSlots(target=1000, chunks=4, tail=5)
    for seed in range(20):
        found = rule.positions(45, np.random.default_rng(seed))
        for n, chunk in enumerate(found[:40].reshape(4, 10)):
            np.testing.assert_array_equal(np.diff(chunk), 1)
            assert 248 * n <= chunk[0] and chunk[-1] < 248 * (n + 1)
        np.testing.assert_array_equal(found[40:], np.arange(995, 1000))


def test_random_steps_have_mean_one():
    found = RandomSteps().positions(4000, np.random.default_rng(0))
    assert 0.9 * 4000 < found[-1] <= 4000


def test_what_does_not_fit_is_refused():
    for rule in (PoSE(target=8), RandomPositions(target=8), ChunkSlots(target=8, chunks=2)):
        with pytest.raises(SpecError, match=r"target = 8: expected at least the 9 tokens of a document"):
            rule.positions(9, np.random.default_rng(0))
    with pytest.raises(SpecError, match=r"chunks = 7: expected slots of 1 positions that hold the 2 tokens of a chunk"):
        ChunkSlots(target=13, chunks=7).positions(13, np.random.default_rng(0))


def test_clex_spreads_a_document_over_windows():
    """The length says for how many; one window is the index, k windows of text are drawn together by k."""
    rule, told = CLEXPositions(original_length=16, largest=4), set()
    for seed in range(60):
        found, length = rule.placed(16, np.random.default_rng(seed))
        told.add(length)
        assert (found[0], found[-1]) == (0, length - 1) and (np.diff(found) >= 1).all() and (found % 1 == 0).all()
        if length == 16:
            np.testing.assert_array_equal(found, np.arange(16))
        long, length = rule.placed(32, np.random.default_rng(seed))
        assert (long * 2 % 1 == 0).all() and long[-1] == length - 1 and (np.diff(long) >= 0).all()
    assert told == {16, 32, 48, 64}
    assert rule.placed(1, np.random.default_rng(0))[0].tolist() == [0]


def test_a_batch_may_draw_the_same():
    """Rows of one batch in the same way, of the next in another; hosts agree without a word."""
    rows = Joined(rows_of=Tiles(shortest=2, longest=4), parts=2)
    make = lambda **at: iter(
        Pipeline(
            mixture=(Weighted(rows=rows),),
            length=64,
            batch_size=4,
            positions=CLEXPositions(original_length=32, largest=8, shared="batch"),
        ).dataset(**at)
    )
    batches, draws = make(), []
    for batch, *halves in zip(itertools.islice(batches, 5), make(host=0, hosts=2), make(host=1, hosts=2), strict=False):
        assert len(np.unique(batch.info.lengths)) == 1
        first = batch.info.positions[0, :32]
        for row in batch.info.positions:
            np.testing.assert_array_equal(row[:32], first)
            np.testing.assert_array_equal(row[32:], first)
        whole = np.concatenate([half.info.positions for half in halves])
        np.testing.assert_array_equal(whole, batch.info.positions)
        draws.append(int(batch.info.lengths[0, 0]))
    assert len(set(draws)) > 1


def pipeline(**options) -> Pipeline:
    rows = PackedText(source=StandardLibrary(split="heldout"))
    return Pipeline(mixture=(Weighted(rows=rows),), length=64, batch_size=4, **options)


def test_the_pipeline_gives_every_document_positions_of_its_own():
    """Text, index and mask stay; a batch is the same in every process, a row's positions are new when it comes again."""
    plain, batches = iter(pipeline().dataset()), iter(pipeline(positions=PoSE(target=512)).dataset())
    again = iter(pipeline(positions=PoSE(target=512)).dataset())
    moved = 0
    for _ in range(3):
        wanted, found, same = next(plain), next(batches), next(again)
        np.testing.assert_array_equal(found.tokens, wanted.tokens)
        for field in ("index", "order", "segments"):
            np.testing.assert_array_equal(getattr(found.info, field), getattr(wanted.info, field))
        np.testing.assert_array_equal(found.info.positions, same.info.positions)
        shift = (found.info.positions - wanted.info.positions)[..., 0]
        assert (shift >= 0).all() and (found.info.positions < 512).all()
        moved += (shift > 0).sum()
    assert moved > 0
    hosts = [next(iter(pipeline(positions=PoSE(target=512)).dataset(host=n, hosts=2))) for n in range(2)]
    first = next(iter(pipeline(positions=PoSE(target=512)).dataset()))
    np.testing.assert_array_equal(np.concatenate([batch.info.positions for batch in hosts]), first.info.positions)
