"""Tables of `docs/parallelism.md`: refused combinations, and the errors that `test_parity.py` measures.

python tests/support/parallelism_tables.py                          # refused combinations
OMP_NUM_THREADS=1 python tests/support/parallelism_tables.py parity # minutes: the errors of each cell, too
"""

import sys
from pathlib import Path

TESTS = Path(__file__).parents[1]
ROOT = TESTS.parent
PAGE = ROOT / "docs" / "parallelism.md"


def marks(name: str) -> tuple[str, str]:
    return f"<!-- {name}: begin -->\n", f"<!-- {name}: end -->\n"


def table_in(page: str, name: str) -> str:
    """Return the text between a table's marks."""
    begin, end = marks(name)
    return page.partition(begin)[2].partition(end)[0]


def refused() -> str:
    from parallel.combinations import REFUSED

    rows = [f"| {r.what} | {r.reason} |\n" for r in REFUSED]
    return "".join(["| refused | why |\n", "| --- | --- |\n", *rows])


def parity() -> str:
    from ranks import Ranks
    from test_parity import ALL_CELLS, PRECISIONS, TOPOLOGIES, Topology, check, measure

    rows = [
        f"| (pp, dp, tp) | ZeRO | {' | '.join(PRECISIONS)} |\n",
        "| --- | --- |" + " --- |" * len(PRECISIONS) + "\n",
    ]
    four, eight = Ranks(4), Ranks(8)
    try:
        for topology in [*TOPOLOGIES, Topology(2, 2, 2)]:
            errors = measure(eight if topology.world > 4 else four, topology, ALL_CELLS)
            for zero in range(4):
                cells = {precision: errors[zero, precision] for precision in PRECISIONS}
                for precision, cell in cells.items():
                    check(topology, zero, precision, cell)
                texts = [f"{c.loss:.0e} / {c.norm:.0e} / {c.parameters:.0e}" for c in cells.values()]
                rows.append(f"| {tuple(topology)} | {zero} | {' | '.join(texts)} |\n")
            print("".join(rows[-4:]), end="", flush=True)
    finally:
        four.stop()
        eight.stop()
    return "".join(rows)


def write(name: str, table: str) -> None:
    begin, end = marks(name)
    page = PAGE.read_text()
    assert begin in page, f"{PAGE} has no place for the table {name}"
    before, _, rest = page.partition(begin)
    PAGE.write_text(before + begin + table + end + rest.partition(end)[2])


if __name__ == "__main__":
    for folder in (TESTS / "uni3d", TESTS / "support", ROOT / "examples" / "megatron_gpt", ROOT):
        sys.path.insert(0, str(folder))
    write("refused", refused())
    if sys.argv[1:] == ["parity"]:
        write("parity", parity())
