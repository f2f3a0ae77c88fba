"""A few draws of the support matrix: the long form is run_draws.py. What must always run is among them, one in eight."""

import pytest
from draws import always, check, config

SOME = [*range(0, len(always()), 8), 34, 35, 50, 51]  # with a tensor axis, its key heads on every device, two axes, bfloat16


@pytest.mark.parametrize("number", SOME)
def test_a_draw_is_refused_or_equal_to_the_reference(number):
    rows = [check(number, data) for data in range(3)]
    assert len({row.get("refused") for row in rows}) == 1


def test_what_must_run_is_not_refused():
    assert [chosen.refusal() for chosen in always()] == [None] * 32


def test_at_least_three_in_five_configs_run():
    refusals = [config(number).refusal() for number in range(200)]
    assert sum(reason is None for reason in refusals) >= 120
