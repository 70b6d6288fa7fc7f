"""The tables of `docs/parallelism.md` are those of the code."""

from __future__ import annotations

import re
from itertools import product

import parallelism_tables as tables


def test_what_is_refused() -> None:
    assert tables.table_in(tables.PAGE.read_text(), "refused") == tables.refused()


def test_every_cell_that_is_promised_has_been_measured() -> None:
    degrees = [(pp, dp, tp) for pp, dp, tp in product((1, 2, 4), (1, 2, 3), (1, 2)) if pp * dp * tp <= 4]
    expected = [(*place, zero) for place in [*degrees, (2, 2, 2)] for zero in range(4)]
    rows = tables.table_in(tables.PAGE.read_text(), "parity").splitlines()
    number = r"\d+e[+-]\d+"
    cell = rf"{number} / {number} / {number}"
    row = re.compile(rf"\| \((\d), (\d), (\d)\) \| (\d) \| {cell} \| {cell} \| {cell} \|")
    found = [tuple(int(n) for n in match.groups()) for match in map(row.fullmatch, rows) if match]
    assert found == expected
