"""Schedules against numbers worked out by hand; updates are counted from 0."""

import pytest

from lcx.spec import SpecError
from lcx.training.schedules import WSD, Constant, Cosine, Linear

TABLE = [
    (Constant(peak=8.0), 4, [8, 8, 8, 8]),
    (Constant(peak=8.0, warmup=1), 3, [8, 8, 8]),
    (Constant(peak=8.0, warmup=4), 6, [2, 4, 6, 8, 8, 8]),
    (Linear(peak=8.0, final=0.0), 4, [8, 6, 4, 2]),
    (Linear(peak=8.0, warmup=2, final=0.5), 6, [4, 8, 8, 7, 6, 5]),
    (Cosine(peak=8.0, final=0.0), 4, [8, 4 + 4 * 0.5**0.5, 4, 4 - 4 * 0.5**0.5]),
    (Cosine(peak=8.0, warmup=2, final=0.25), 4, [4, 8, 8, 5]),
    (WSD(peak=8.0, warmup=2, decay=4, final=0.0), 9, [4, 8, 8, 8, 8, 8, 6, 4, 2]),
    (WSD(peak=8.0, decay=2, final=0.5), 4, [8, 8, 8, 6]),
]


@pytest.mark.parametrize(("schedule", "steps", "wanted"), TABLE)
def test_each_update_has_its_rate(schedule, steps, wanted):
    built = schedule.build(steps)
    assert [float(built(n)) for n in range(steps)] == pytest.approx(wanted, rel=1e-5)


@pytest.mark.parametrize(("schedule", "steps", "final"), [(Linear(peak=8.0), 5, 0.8), (Cosine(peak=8.0, warmup=1), 5, 0.8)])
def test_final_share_is_reached_after_the_last_update(schedule, steps, final):
    assert float(schedule.build(steps)(steps)) == pytest.approx(final, rel=1e-5)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: Constant(peak=1.0, warmup=5).build(5), "warmup = 5: expected fewer than the 5 steps"),
        (lambda: WSD(peak=1.0, warmup=3, decay=3).build(5), "decay = 3: expected at most the 2 updates"),
        (lambda: Cosine(peak=0.0), "peak = 0.0"),
        (lambda: Linear(peak=1.0, final=1.5), "final = 1.5"),
        (lambda: Constant(peak=1.0, warmup=-1), "warmup = -1"),
    ],
)
def test_phases_that_do_not_fit_are_refused(make, message):
    with pytest.raises(SpecError, match=message):
        make()
