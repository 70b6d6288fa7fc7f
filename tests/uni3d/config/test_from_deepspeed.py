"""The tables of `docs/from-deepspeed.md` match the code."""

from __future__ import annotations

import re
from pathlib import Path

from config_page import tables

from uni3d.config import Config
from uni3d.config.deepspeed_keys import NO_MEANING, READ_AS, REFUSED

PAGE = (Path(__file__).resolve().parents[3] / "docs" / "from-deepspeed.md").read_text()


def test_its_tables_are_current() -> None:
    update = "replace the text after the mark with the output of `python tests/support/config_page.py`"
    assert PAGE.partition("<!-- tables -->\n")[2].strip() == tables().strip(), update


def test_every_key_is_in_exactly_one_table() -> None:
    keys = re.findall(r"`([a-z0-9_.]+)`", tables())
    for key in (*NO_MEANING, *REFUSED, *READ_AS):
        assert keys.count(key) == 1, key
        section, _, rest = key.partition(".")
        assert rest or section not in Config.model_fields, f"{key} is honoured too"
