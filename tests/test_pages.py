"""README and the pages of `docs/` agree with the code, and their links and commands can be followed."""

import ast
import json
import re
import shlex
from collections.abc import Iterator
from itertools import product
from pathlib import Path

import cli_page
import config_page
import parallelism_tables as tables
import performance_tables
import pytest
import typer
from ranks import Ranks
from test_laws import ALLOWED

from uni3d.cli import app
from uni3d.config import Config, load_config
from uni3d.config.deepspeed_keys import NO_MEANING, READ_AS, REFUSED
from uni3d.config.sections import CheckpointConfig

ROOT = Path(__file__).parents[1]
README = ROOT / "README.md"
ARCHITECTURE = ROOT / "docs" / "architecture.md"
RELIABILITY = ROOT / "docs" / "reliability.md"
PAGES = [README, *sorted((ROOT / "docs").glob("*.md")), ROOT / "benchmarks" / "RESULTS.md"]
WRAPPED = [p for p in PAGES if p.stem not in ("cli", "format", "from-deepspeed", "importing")]
LONGEST_LINE = 120
LONGEST_README = 150
page = pytest.mark.parametrize("page", PAGES, ids=lambda p: p.name)


def blocks(page: Path, language: str) -> list[str]:
    """Content of a page's fenced blocks in this language."""
    return re.findall(rf"^ *```{language}\n(.*?)^ *```$", page.read_text(), re.MULTILINE | re.DOTALL)


def prose(page: Path) -> str:
    """Text of a page without its fenced blocks."""
    return re.sub(r"^ *```.*?^ *```$", "", page.read_text(), flags=re.MULTILINE | re.DOTALL)


def anchors(page: Path) -> set[str]:
    """Anchors of a page's headings, by GitHub's rule."""
    headings = re.findall(r"^#+ (.*)$", prose(page), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


def test_readme_is_short() -> None:
    assert len(README.read_text().splitlines()) <= LONGEST_README


@pytest.mark.parametrize("page", WRAPPED, ids=lambda p: p.name)
def test_lines_outside_tables_are_wrapped(page: Path) -> None:
    lines = prose(page).splitlines()
    assert [line for line in lines if len(line) > LONGEST_LINE and not line.startswith("|")] == []


@page
def test_links_lead_somewhere(page: Path) -> None:
    links = re.findall(r"(?<!!)\[[^\]]*\]\(([^)\s]+)\)", prose(page))
    for path, _, anchor in (link.partition("#") for link in links if "://" not in link):
        target = (page.parent / path).resolve() if path else page
        assert target.exists(), path
        assert not anchor or anchor in anchors(target), f"{path}#{anchor}"


def test_pictures_are_there() -> None:
    pictures = re.findall(r"!\[[^\]]+\]\(([^)]+)\)", README.read_text())
    assert pictures == ["docs/images/resize.png"]
    assert all((ROOT / picture).is_file() for picture in pictures)


def commands() -> Iterator[tuple[str, list[str]]]:
    """Every command line of the pages' shell blocks, as `(page, words)`."""
    for path in PAGES:
        for block in blocks(path, "sh"):
            for line in block.replace("\\\n", " ").splitlines():
                if words := shlex.split(line, comments=True):
                    yield path.name, words


def test_shell_commands_exist() -> None:
    group = typer.main.get_command(app)
    known = {
        name: {flag for parameter in command.params for flag in parameter.opts}
        for name, command in group.commands.items()
    }
    found = list(commands())
    ours = [(page, words) for page, words in found if words[0] == "uni3d"]
    assert len(ours) > 10
    for page, words in ours:
        assert words[1] in known, page
        flags = {word for word in words[2:] if word.startswith("--")}
        assert flags <= known[words[1]], (page, words[1])
    for page, words in found:
        for word in words:
            if re.match(r"(examples|tests|benchmarks)/", word):
                assert (ROOT / word).exists(), (page, word)


def test_readme_config() -> None:
    (text,) = blocks(README, "json")
    assert len(text.splitlines()) == 12
    assert load_config(json.loads(text)).parallel.dp == "auto"
    diff, own_loop = blocks(README, "diff")
    assert len(re.findall(r"^[+-]", diff, re.MULTILINE)) == 6
    assert own_loop in blocks(ROOT / "docs" / "integrations.md", "diff"), "which tests run"


def test_checkpoint_section_shows_the_defaults() -> None:
    (text,) = blocks(ROOT / "docs" / "your-script.md", "json")
    assert json.loads(text)["checkpoint"] == CheckpointConfig().model_dump()


def test_readme_figures_are_those_measured() -> None:
    rows = [line for line in README.read_text().splitlines() if line.startswith("| ") and "--only" in line]
    assert len(rows) == 5
    measured = (ROOT / "benchmarks" / "RESULTS.md").read_text()
    for row in rows:
        for number, unit in re.findall(r"([\d.]+) (s|x)\b", row):
            assert re.search(rf"(?<![\d.]){re.escape(number)} (\([^)]*\) )?{unit}\b", measured), (row, number)


@page
def test_python_blocks_compile(page: Path) -> None:
    for block in blocks(page, "python"):
        compile(block, page.name, "exec")


def test_refused_combinations() -> None:
    assert tables.table_in(tables.PAGE.read_text(), "refused") == tables.refused()


@pytest.mark.parametrize("name", performance_tables.TABLES)
def test_computed_tables(name: str) -> None:
    page = performance_tables.PAGE.read_text()
    assert tables.table_in(page, name) == performance_tables.TABLES[name]()


def test_every_promised_cell_has_been_measured() -> None:
    degrees = [(pp, dp, tp) for pp, dp, tp in product((1, 2, 4), (1, 2, 3), (1, 2)) if pp * dp * tp <= 4]
    expected = [(*place, zero) for place in [*degrees, (2, 2, 2)] for zero in range(4)]
    rows = tables.table_in(tables.PAGE.read_text(), "parity").splitlines()
    number = r"\d+e[+-]\d+"
    cell = rf"{number} / {number} / {number}"
    row = re.compile(rf"\| \((\d), (\d), (\d)\) \| (\d) \| {cell} \| {cell} \| {cell} \|")
    found = [tuple(int(n) for n in match.groups()) for match in map(row.fullmatch, rows) if match]
    assert found == expected


PATHS = ("initialize", "train_batch", "save_checkpoint", "load_checkpoint")
"""Sections of the architecture page that follow a call through the code."""
FILE_AND_NAMES = r"`[\w/]+\.py` `[\w.]+`(?:, `[\w.]+`)*"


def section(title: str) -> list[str]:
    """Return the lines below a heading of the architecture page."""
    (text,) = re.findall(rf"^## {re.escape(title)}\n(.*?)(?=^## |\Z)", ARCHITECTURE.read_text(), re.M | re.S)
    return str(text).splitlines()


def definitions(path: Path) -> set[str]:
    """Return the functions, classes and methods (`Class.method`) that a file defines."""
    kinds = (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef)
    names: set[str] = set()
    for node in ast.parse(path.read_text()).body:
        if isinstance(node, kinds):
            names.add(node.name)
        if isinstance(node, ast.ClassDef):
            names |= {f"{node.name}.{member.name}" for member in node.body if isinstance(member, kinds)}
    return names


def test_architecture_names_what_is_there() -> None:
    named = re.findall(r"`([\w/]+\.py)`((?:,? `[\w.]+`)*)", prose(ARCHITECTURE))
    assert len(named) > 100
    missing = [path for path, _ in named if not (ROOT / path).is_file()]
    assert missing == []
    for path, names in named:
        assert set(re.findall(r"`([\w.]+)`", names)) - definitions(ROOT / path) == set(), path


def test_reliability_names_tests_and_campaigns_that_are_there() -> None:
    text = prose(RELIABILITY)
    named = re.findall(r"`([\w/]+\.py)`((?:,? `\w+`)*)", text)
    assert len(named) > 20
    for path, names in named:
        assert set(re.findall(r"`(\w+)`", names)) - definitions(ROOT / path) == set(), path
    faults = "".join(path.read_text() for path in (ROOT / "tests" / "faults").glob("test_*.py"))
    campaigns = re.findall(r'Campaign\(\s*"([^"]+)"', faults)
    assert len(campaigns) >= 6
    assert [name for name in campaigns if f"| {name} | " not in text] == []


def test_architecture_lists_the_allowed_imports() -> None:
    picture, table = blocks(ARCHITECTURE, "")
    rows = re.findall(r"^(\w+) +(.*(?:\n +.*)*)", table, re.MULTILINE)
    allowed = {name: found for name, found in ALLOWED.items() if found}
    assert {name: set(re.findall(r"\w+", found)) for name, found in rows} == allowed
    assert allowed.keys() - set(re.findall(r"\w+", picture)) <= {"deepspeed", "resume_rules"}


@pytest.mark.parametrize("path", PATHS)
def test_architecture_follows_each_path(path: str) -> None:
    entries = [line for line in section(path) if re.match(r"\d", line)]
    assert len(entries) >= 6
    for number, entry in enumerate(entries, start=1):
        assert re.fullmatch(rf"{number}\. {FILE_AND_NAMES}: .+", entry), entry


def test_architecture_says_where_to_look() -> None:
    rows = [line for line in section("Where do I look?") if line.startswith("| ")][2:]
    assert len(rows) > 20
    for row in rows:
        assert re.fullmatch(rf"\| .+ \| {FILE_AND_NAMES} \|", row), row


@pytest.mark.slow
def test_the_commands_print_what_their_page_shows(ranks: Ranks) -> None:
    found, written = cli_page.page(ranks).splitlines(), cli_page.PAGE.read_text().splitlines()
    assert found == written, "update it with python tests/support/cli_page.py"


def test_tables_of_config_keys() -> None:
    text = (ROOT / "docs" / "from-deepspeed.md").read_text().partition("<!-- tables -->\n")[2]
    update = "replace the text after the mark with the output of `python tests/support/config_page.py`"
    assert text.strip() == config_page.tables().strip(), update
    keys = re.findall(r"`([a-z0-9_.]+)`", text)
    for key in (*NO_MEANING, *REFUSED, *READ_AS):
        assert keys.count(key) == 1, f"{key} should be in exactly one table"
        section, _, rest = key.partition(".")
        assert rest or section not in Config.model_fields, f"{key} is honoured too"
