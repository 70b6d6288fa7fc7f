"""Name maps: the first pattern that matches a whole name counts; what is wrong is named."""

import json
import re
from pathlib import Path

import pytest

import uni3d.name_map
from uni3d.name_map import NameMap

RULES = {
    r"layers\.(\d+)\.attn\.(q|k)\.(.*)": r"model.layers.\1.\2_proj.\3",
    r"layers\.(?P<layer>\d+)\.(.*)": r"model.layers.\g<layer>.\2",
    r"rope\..*": None,
    r"norm": "model.norm",
}


@pytest.fixture
def file(tmp_path: Path) -> Path:
    return tmp_path / "map.json"


def load(file: Path, text: str) -> NameMap:
    file.write_text(text)
    return NameMap.load(file)


def test_the_first_pattern_that_matches_the_whole_name(file: Path) -> None:
    names = load(file, json.dumps(RULES))
    expected = {
        "layers.11.attn.q.weight": "model.layers.11.q_proj.weight",
        "layers.11.attn.o.weight": "model.layers.11.attn.o.weight",
        "rope.table": None,
        "norm": "model.norm",
        "norm.weight": "norm.weight",
        "my.norm": "my.norm",
        "head.weight": "head.weight",
    }
    assert {name: names.rename(name) for name in expected} == expected
    assert list(names.rename_all(expected).items()) == [(k, v) for k, v in expected.items() if v is not None]
    assert load(file, "{}").rename_all(["a"]) == {"a": "a"}


def test_no_two_tensors_get_one_name(file: Path) -> None:
    names = load(file, json.dumps({r"(.*)\.(weight|bias)": r"\1"}))
    with pytest.raises(ValueError, match=r"map\.json renames both a\.weight and a\.bias to a$"):
        names.rename_all(["a.weight", "b.weight", "a.bias"])
    assert names.rename_all(["a.weight", "b.weight"]) == {"a.weight": "a", "b.weight": "b"}
    with pytest.raises(ValueError, match=r"renames both a\.weight and a to a$"):
        names.rename_all(["a.weight", "a"])
    assert NameMap({"a": None, "b": "a"}).rename_all(["a", "b"]) == {"b": "a"}, (
        "one that is left out has none"
    )


def test_nothing_left_of_a_name(file: Path) -> None:
    with pytest.raises(ValueError, match=r"renames rope\.x to an empty name .*; to leave .* out, give null"):
        load(file, json.dumps({"(a)?rope.*": r"\1"})).rename("rope.x")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("{", "can't be read as JSON: Expecting property name"),
        ('{"a": "b", "a": "c"}', "can't be read as JSON: duplicate key 'a'"),
        ('["a"]', "must be a JSON object of pattern: replacement, not a list"),
        ('{"a(": "b"}', "the pattern 'a(' isn't a regular expression: missing ), unterminated"),
        ('{"a": 1}', "the replacement of 'a' must be a string or null, not a number"),
        ('{"a": {"b": "c"}}', "the replacement of 'a' must be a string or null, not an object"),
        (r'{"(a)": "\\2"}', r"the replacement '\\2' doesn't fit the pattern '(a)': invalid group reference"),
        (r'{"(a)": "\\g<b>"}', r"doesn't fit the pattern '(a)': unknown group name 'b'"),
        (r'{"(a)": "\\q"}', r"doesn't fit the pattern '(a)': bad escape \q"),
    ],
)
def test_what_is_wrong_with_a_file(file: Path, text: str, message: str) -> None:
    with pytest.raises(ValueError, match=re.escape(message)) as caught:
        load(file, text)
    assert str(caught.value).startswith(f"the name map {file}")


def test_a_file_that_is_none(file: Path) -> None:
    with pytest.raises(FileNotFoundError, match=re.escape(str(file))):
        NameMap.load(file)
    file.write_bytes(b"\xff")
    with pytest.raises(ValueError, match="can't be read as JSON: 'utf-8' codec"):
        NameMap.load(file)


def test_a_pattern_that_takes_years(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(uni3d.name_map, "SECONDS", 0.2)
    names = NameMap({"(a+)+b": "x"})
    assert names.rename("aab") == "x"
    with pytest.raises(ValueError, match=r"the pattern '\(a\+\)\+b' takes more than 0.2 s to match 'aaaa"):
        names.rename("a" * 60)
    assert names.rename("aab") == "x"
