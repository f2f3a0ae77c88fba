"""Tables, files and plots of rows written by hand, and scorers of answers written by hand."""

import numpy as np
import pytest
from matplotlib.figure import Figure

from lcx.evaluation import scorers
from lcx.evaluation.report import (
    Lines,
    append_rows,
    caption,
    heatmap,
    lines_plot,
    pivot,
    read_rows,
    select,
    table,
    with_interval,
)
from lcx.evaluation.tasks.task import ANSWERS, NLL


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


def test_a_group_of_rows_survives_a_kill_or_is_not_there(tmp_path):
    path = tmp_path / "results.jsonl"
    assert read_rows(path) == []
    append_rows(path, ROWS[:1])
    first = path.stat().st_size
    append_rows(path, ROWS[1:])
    whole = path.read_bytes()
    assert read_rows(path) == ROWS
    for cut in range(first, len(whole)):
        path.write_bytes(whole[:cut])
        assert read_rows(path) == ROWS[:1]
    append_rows(path, ROWS[1:])
    assert path.read_bytes() == whole


def test_missing_rows_and_numbers_that_are_none_are_refused(tmp_path):
    path = tmp_path / "results.jsonl"
    append_rows(path, ROWS)
    append_rows(path, ROWS)
    lines = path.read_text().splitlines(keepends=True)
    path.write_text("".join(lines[:1] + lines[2:]))
    with pytest.raises(ValueError, match="part 3 of 3 follows 1 others: rows are missing"):
        read_rows(path)
    path.unlink()
    with pytest.raises(ValueError, match="not JSON compliant"):
        append_rows(path, [row("none", 8, np.nan)])
    assert not path.exists()


def test_captions_tell_the_number_of_examples():
    assert caption([row("a", 8, 0, examples=n) for n in (4, 4)]).endswith("over 4 examples")
    assert caption([row("a", 8, 0, examples=n) for n in (9, 4, 16)]).endswith("over 4 to 16 examples")
    assert with_interval({"value": 1.0, "low": 0.9, "high": 1.0}) == "1.000 [0.900, 1.000]"


def test_lines_of_a_plot(tmp_path, monkeypatch):
    saved = []
    monkeypatch.setattr(Figure, "savefig", lambda self, path, **_: saved.append(self))
    rows = [r | {"stage": "zero-shot"} for r in ROWS[::-1]] + [row("YaRN", 256, 0.9, stage="tuned")]
    panels = [Lines("exact match", ANSWERS, rows), Lines("text", NLL, rows)]
    lines_plot(tmp_path / "a.png", panels, series="method", style="stage")
    left, right = saved[0].axes
    assert (left.get_ylabel(), left.get_xlabel(), right.get_ylabel()) == ("share of answers", "length (tokens)", "nats a token")
    assert left.get_ylim() == (-0.03, 1.03) and right.get_ylim()[0] > 0.3
    assert [label.get_text() for label in left.get_xticklabels()] == ["128", "256"]
    drawn = [container.lines[0] for container in left.containers]
    points = [[[256, 0.75]], [[256, 0.9]], [[128, 1.0], [256, 0.5]]]
    for line, wanted in zip(drawn, points, strict=True):
        np.testing.assert_allclose(line.get_xydata(), wanted, rtol=0.05)
    assert [line.get_linestyle() for line in drawn] == ["-", "--", "-"]
    assert drawn[0].get_color() == drawn[1].get_color() != drawn[2].get_color()
    legend = [text.get_text() for text in saved[0].legends[0].get_texts()]
    assert legend == ["YaRN, zero-shot", "none, zero-shot", "YaRN, tuned"]


@pytest.mark.parametrize("lengths", [(128,), (128, 256), (500, 512, 1024)])
def test_lines_that_coincide_are_all_seen(lengths, tmp_path, monkeypatch):
    saved = []
    monkeypatch.setattr(Figure, "savefig", lambda self, path, **_: saved.append(self))
    rows = [row(name, length, 1.0, stage="zero-shot") for name in "abcdef" for length in lengths]
    lines_plot(tmp_path / "a.png", [Lines("exact match", ANSWERS, rows)], series="method", style="stage")
    places = np.asarray([container.lines[0].get_xdata() for container in saved[0].axes[0].containers], float)
    assert (np.diff(places, axis=0) > 0).all() and (places[-1, :-1] < places[0, 1:]).all()
    np.testing.assert_allclose(np.exp(np.log(places).mean(axis=0)), lengths)
    assert [label.get_text() for label in saved[0].axes[0].get_xticklabels()] == [str(length) for length in lengths]


def test_cells_of_a_heatmap(tmp_path, monkeypatch):
    saved = []
    monkeypatch.setattr(Figure, "savefig", lambda self, path, **_: saved.append(self))
    rows = [row("m", 16, 0.75, depth=0.5), row("m", 8, 0.5, depth=0.5), row("m", 16, 0.25, depth=0.0)]
    heatmap(tmp_path / "b.png", rows, title="t")
    image = saved[0].axes[0].images[0]
    np.testing.assert_array_equal(image.get_array().filled(np.nan), [[np.nan, 0.25], [0.5, 0.75]])
    assert image.get_clim() == (0, 1)
    assert [text.get_text() for text in saved[0].axes[0].texts] == ["0.25", "0.50", "0.75"]
    assert [label.get_text() for label in saved[0].axes[0].get_yticklabels()] == ["0%", "50%"]


def test_plots_are_pictures(tmp_path):
    rows = [r | {"stage": "zero-shot"} for r in ROWS]
    lines_plot(tmp_path / "a.png", [Lines("one", NLL, rows)] * 2, series="method", style="stage")
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
        (scorers.prefix_match, [1, 2, 9], [1, 2], 1),
        (scorers.prefix_match, [1], [1, 2], 0),
        (scorers.first_integer, "the key is 00482, not 7", "482", 1),
        (scorers.first_integer, "none", "482", 0),
        (scorers.first_integer, "½ ٣ 7", "7", 1),
    ],
)
def test_scorers_by_hand(score, given, reference, expected):
    assert score(given, reference) == expected


def test_forced_scores_by_hand():
    greedy = np.asarray([True, False, True, True])
    assert (scorers.forced_exact(greedy), scorers.forced_token_accuracy(greedy)) == (0, 0.75)
    assert scorers.forced_exact(greedy[2:]) == 1
    assert scorers.forced_nll(np.log([0.5, 0.25])) == pytest.approx(1.5 * np.log(2))
