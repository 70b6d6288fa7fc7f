"""Scripts that `docs/integrations.md` shows as diffs: before and after."""

import re
from pathlib import Path

PAGE = Path(__file__).parents[2] / "docs" / "integrations.md"


def script(section: str, *, changed: bool) -> str:
    """Return one side of the diff below a heading."""
    found = re.search(rf"^## {re.escape(section)}$.*?^```diff\n(.*?)^```$", PAGE.read_text(), re.M | re.S)
    assert found is not None, section
    sides = " +" if changed else " -"
    return "\n".join(line[1:] for line in found[1].splitlines() if (line or " ")[0] in sides)
