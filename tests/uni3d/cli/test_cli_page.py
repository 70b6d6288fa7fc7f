"""`docs/cli.md` has what the commands say."""

from __future__ import annotations

import cli_page
import pytest
from ranks import Ranks


@pytest.mark.slow
def test_the_page_is_what_the_commands_say(ranks: Ranks) -> None:
    found, written = cli_page.page(ranks).splitlines(), cli_page.PAGE.read_text().splitlines()
    assert found == written, "make it anew by python tests/support/cli_page.py"
