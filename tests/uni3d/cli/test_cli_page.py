"""`docs/cli.md` matches the output of the commands."""

from __future__ import annotations

import cli_page
import pytest
from ranks import Ranks


@pytest.mark.slow
def test_the_page_is_current(ranks: Ranks) -> None:
    found, written = cli_page.page(ranks).splitlines(), cli_page.PAGE.read_text().splitlines()
    assert found == written, "update it with python tests/support/cli_page.py"
