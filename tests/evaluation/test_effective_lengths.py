"""Group sizes are searched one range at a time, the others at twice the extension."""

from lcx.evaluation.effective_lengths import best, searched


def test_each_range_gets_its_own_best_size():
    wanted, asked = (4, 1, 2), []

    def loss(groups):
        asked.append(groups)
        return float(sum(abs(size - best) for size, best in zip(groups, wanted, strict=True)))

    found = list(searched(loss, 3, (1, 2, 4), 8))
    assert asked[:4] == [(1, 8, 8), (2, 8, 8), (4, 8, 8), (8, 1, 8)] and len(asked) == 9
    assert best(found) == wanted


def test_of_equal_sizes_the_smallest_reads_farthest():
    assert best([{4: 1.0, 2: 1.0, 8: 2.0}]) == (2,)
