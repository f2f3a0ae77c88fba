"""Tables, files and plots of rows written by hand, and scorers of answers written by hand."""

import numpy as np
import pytest

from lcx.evaluation import scorers
from lcx.evaluation.report import append_rows, heatmap, lines_plot, pivot, read_rows, select, table


def row(method, length, value, **more):
    return {"method": method, "length": length, "value": value, "low": value - 0.1, "high": value + 0.1, **more}


ROWS = [row("none", 128, 1.0), row("none", 256, 0.5), row("YaRN", 256, 0.75)]


def test_table_by_hand():
    expected = "| method | 128 | 256 |\n| --- | ---: | ---: |\n| none | 1.0 | 0.5 |\n| YaRN | – | 0.75 |"
    assert table(ROWS, "method", "length", lambda cell: str(cell["value"])) == expected
    assert select(ROWS, method="none", length=256) == [ROWS[1]]


def test_two_rows_never_share_a_cell():
    with pytest.raises(ValueError, match="two rows for method = none, length = 128"):
        pivot([*ROWS, row("none", 128, 0.2)], "method", "length")


def test_rows_survive_a_kill(tmp_path):
    path = tmp_path / "results.jsonl"
    assert read_rows(path) == []
    append_rows(path, ROWS[:2])
    with open(path, "a") as file:
        file.write('{"method": "YaR')
    assert read_rows(path) == ROWS[:2]
    append_rows(path, ROWS[2:])
    assert read_rows(path) == ROWS


def test_plots_are_pictures(tmp_path):
    lines_plot(tmp_path / "a.png", {"one": ROWS, "two": ROWS}, series="method", x="length", labels={"x": "x", "y": "y"})
    heatmap(tmp_path / "b.png", [row("m", n, 0.5, depth=d) for n in (8, 16) for d in (0.0, 0.5)], title="t")
    for name in ("a.png", "b.png"):
        assert (tmp_path / name).read_bytes().startswith(b"\x89PNG")


@pytest.mark.parametrize(
    ("score", "given", "reference", "expected"),
    [
        (scorers.exact_match, "a b", "a b", 1),
        (scorers.exact_match, [1, 2], [1, 2, 3], 0),
        (scorers.exact_match, [1, 2, 4], [1, 2, 3], 0),
        (scorers.prefix_match, "4821 and", "4821", 1),
        (scorers.prefix_match, "482", "4821", 0),
        (scorers.contains_all, "Paris and ROME", ["rome", "Oslo"], 0.5),
        (scorers.first_integer, "the key is 00482, not 7", "482", 1),
        (scorers.first_integer, "none", "482", 0),
    ],
)
def test_scorers_by_hand(score, given, reference, expected):
    assert score(given, reference) == expected


def test_normalisation_and_forced_scores_by_hand():
    assert scorers.squad_normalise("The  U.S.A., an  (old) country!") == "usa old country"
    greedy = np.asarray([True, False, True, True])
    assert (scorers.forced_exact(greedy), scorers.forced_token_accuracy(greedy)) == (0, 0.75)
    assert scorers.forced_exact(greedy[2:]) == 1
    assert scorers.forced_nll(np.log([0.5, 0.25])) == pytest.approx(1.5 * np.log(2))
