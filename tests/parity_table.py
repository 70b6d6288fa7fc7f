"""Write what `tests/uni3d/test_parity.py` measures into `docs/parallelism.md`.

OMP_NUM_THREADS=1 python tests/parity_table.py
"""

from __future__ import annotations

import sys
from pathlib import Path

TESTS = Path(__file__).parent
ROOT = TESTS.parent
for folder in (TESTS / "uni3d", TESTS / "support", ROOT / "examples" / "megatron_gpt", ROOT):
    sys.path.insert(0, str(folder))

PAGE = ROOT / "docs" / "parallelism.md"
BEGIN, END = "<!-- parity: begin -->\n", "<!-- parity: end -->\n"


def main() -> None:
    from ranks import Ranks
    from test_parity import ALL_CELLS, PRECISIONS, TOPOLOGIES, Errors, Topology, check, measure

    rows = [
        f"| (pp, dp, tp) | ZeRO | {' | '.join(PRECISIONS)} |\n",
        "| --- | --- |" + " --- |" * len(PRECISIONS) + "\n",
    ]
    four, eight = Ranks(4), Ranks(8)
    try:
        for topology in [*TOPOLOGIES, Topology(2, 2, 2)]:
            pool = eight if topology.world > 4 else four
            errors = measure(pool, topology, ALL_CELLS)
            for zero in range(4):
                cells: list[Errors] = [errors[zero, precision] for precision in PRECISIONS]
                for precision, cell in zip(PRECISIONS, cells, strict=True):
                    check(topology, zero, precision, cell)
                texts = [f"{c.loss:.0e} / {c.norm:.0e} / {c.parameters:.0e}" for c in cells]
                rows.append(f"| {tuple(topology)} | {zero} | {' | '.join(texts)} |\n")
            print("".join(rows[-4:]), end="", flush=True)
    finally:
        four.stop()
        eight.stop()
    before, _, rest = PAGE.read_text().partition(BEGIN)
    _, _, after = rest.partition(END)
    PAGE.write_text(before + BEGIN + "".join(rows) + END + after)


if __name__ == "__main__":
    main()
