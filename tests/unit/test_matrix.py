"""The matrix of layouts covers what it says."""

import itertools

from tests.matrix import DEFAULT, LAYOUTS, OPTIONS, rows


def test_every_pair_is_covered():
    found = [{"layout": case.layout, **dict(case.options)} for case in rows()]
    for layout in LAYOUTS:
        assert {"layout": layout, **DEFAULT} in found
    values = {"layout": tuple(LAYOUTS), **OPTIONS}
    for a, b in itertools.combinations(values, 2):
        met = {(row[a], row[b]) for row in found}
        assert met == set(itertools.product(values[a], values[b])), (a, b)


def test_the_matrix_stays_small():
    """Each layout once for each value of the longest option, and with the defaults."""
    assert len(rows()) <= 4 * len(LAYOUTS)
