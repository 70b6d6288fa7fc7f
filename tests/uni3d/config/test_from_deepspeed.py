"""`docs/from-deepspeed.md` says what the code does."""

from __future__ import annotations

import re
from pathlib import Path

from config_page import tables

from uni3d.config import Config
from uni3d.config.deepspeed_keys import NO_MEANING, READ_AS, REFUSED

PAGE = (Path(__file__).resolve().parents[3] / "docs" / "from-deepspeed.md").read_text()


def test_its_tables_are_current() -> None:
    made = "replace what follows the mark with what `python tests/support/config_page.py` prints"
    assert PAGE.partition("<!-- tables -->\n")[2].strip() == tables().strip(), made


def test_every_key_is_in_one_place() -> None:
    keys = re.findall(r"`([a-z0-9_.]+)`", tables())
    for key in (*NO_MEANING, *REFUSED, *READ_AS):
        assert keys.count(key) == 1, key
        section, _, rest = key.partition(".")
        assert rest or section not in Config.model_fields, f"{key} is honoured too"
