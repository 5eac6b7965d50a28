"""Text of any origin: encodings, numbers of YAML, limits, and what a terminal would obey."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from wanlab.core import limits
from wanlab.core.errors import WanlabError, clean
from wanlab.core.text import convert, decode_text, parse_json, read_json, read_text
from wanlab.core.yaml_lines import load_yaml, read_yaml, write_yaml


def yaml(text: str):
    return read_yaml(text, "grid.yaml", "the grid").data


@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig", "utf-16", "utf-16-le", "utf-32"])
def test_text_is_read_in_the_encoding_that_its_bytes_show(tmp_path, encoding):
    file = tmp_path / "file"
    file.write_bytes("name: été\r\nn: 1\r\n".encode(encoding))
    assert read_text(file) == "name: été\nn: 1\n"
    assert load_yaml(file, "the grid").data == {"name": "été", "n": 1}
    file.write_bytes('{"name": "été"}'.encode(encoding))
    assert read_json(file) == {"name": "été"}


def test_text_of_another_encoding_is_refused_with_its_byte_and_the_mend(tmp_path):
    file = tmp_path / "prompt.txt"
    file.write_bytes("un été".encode("latin-1"))
    with pytest.raises(WanlabError) as error:
        read_text(file)
    assert str(error.value) == (
        f"{file}, byte 3: 0xe9 is not UTF-8; save the file as UTF-8 (if it is Latin-1: iconv -f latin1 -t utf-8, "
        "which makes 'é' of it)"
    )
    with pytest.raises(WanlabError, match="byte 2: 0x00 is not UTF-16"):
        decode_text(b"\xff\xfe\x00\xd8", "a file")


@pytest.mark.parametrize(
    ("text", "value"),
    [
        *[("1e-3", 0.001), ("1E5", 1e5), ("-.5", -0.5), ("5.", 5.0), ("010", 10), ("0o10", 8), ("0x1F", 31)],
        *[
            ("yes", "yes"),
            ("off", "off"),
            ("12:30", "12:30"),
            ("1_000", "1_000"),
            ("2026-02-30", "2026-02-30"),
        ],
        *[
            ("~", None),
            ("True", True),
            ("-.inf", float("-inf")),
            ("'1e-3'", "1e-3"),
            ("!!str 3", "3"),
            ("", None),
        ],
    ],
)
def test_words_of_yaml_have_the_types_of_version_1_2(text, value):
    found = yaml(f"a: {text}")["a"]
    assert (type(found), found) == (type(value), value)
    assert str(yaml("a: .nan")["a"]) == "nan"


TEXT = st.text(st.characters(exclude_categories=["Cs"]), max_size=12) | st.sampled_from(
    [
        "yes",
        "NO",
        "010",
        "0o7",
        "1e-3",
        "1_0",
        "12:30",
        "2026-01-31",
        "~",
        "null",
        ".nan",
        ".inf",
        "<<",
        "=",
        "",
        "#",
        "- a",
    ]
)
VALUE = TEXT | st.integers() | st.floats(allow_nan=False) | st.booleans() | st.none()


@given(
    st.dictionaries(
        TEXT, st.recursive(VALUE, lambda inner: st.lists(inner, max_size=4), max_leaves=8), max_size=4
    )
)
def test_yaml_that_is_written_reads_back_the_same(data):
    assert yaml(write_yaml(data)) == data


BOMB = "a: &a [x, x, x, x, x, x, x, x, x]\n" + "".join(
    f"{new}: &{new} [{', '.join([f'*{old}'] * 9)}]\n"
    for old, new in zip("abcdefghi", "bcdefghij", strict=True)
)
WILD = {
    BOMB: "with those that aliases repeat: 200,001 is over the limit of 200,000; WANLAB_LIMITS='yaml_values=400000'",
    BOMB.replace("[*", "{<<: [*")
    .replace("]\n", "]}\n")
    .replace("&a [x, x, x, x, x, x, x, x, x]}", "&a {k: 1}"): "yaml_values",
    "[" * 50_000: "line 1: exceeded maximum nesting depth",
    "["
    * 500: "line 1: lists and maps inside one another: 101 is over the limit of 100; WANLAB_LIMITS='depth=200'",
    "a: &a [*a]": "line 1: a value contains itself by an alias",
    "? [a]\n: b": "line 1: a key is a list or a map",
    "a:\n  b: 1\n  b: 2": "line 3: 'b' is given twice",
    "a: !!int ten": "line 1: 'ten' is no int; quote it where text is meant",
    "a: !!bool maybe": "line 1: 'maybe' is no bool",
    f"a: {'9' * 5000}": "line 1: 5,000 digits are no number",
    "a: !!python/object:os.system x": "line 1: could not determine a constructor",
    "a: !!binary aGk=": "line 1: could not determine a constructor",
    "<<: 3": "line 1: expected a mapping",
    "a: \x01": "control characters are not allowed",
    "a: [1": "grid.yaml, line 1: did not find expected",
}


@pytest.mark.parametrize(("text", "said"), WILD.items(), ids=range(len(WILD)))
def test_wild_yaml_is_one_line_and_takes_no_time(text, said):
    with pytest.raises(WanlabError) as error:
        yaml(text)
    assert said in str(error.value)
    assert "\n" not in str(error.value)


def test_wild_json_is_one_line(tmp_path):
    for text, said in {
        "[" * 100_000 + "]" * 100_000: "too deep",
        "[" * 150 + "]" * 150: "x.json: lists and maps inside one another: 101 is over the limit of 100",
        "1" * 5000: "Exceeds the limit (4300 digits)",
        '{"a": 1,\n "b": }': "cannot read x.json, line 2: not JSON: Expecting value",
        "": "not JSON",
    }.items():
        with pytest.raises(WanlabError, match=r"x\.json") as error:
            parse_json(text, "x.json")
        assert said in str(error.value)
    with pytest.raises(WanlabError, match=r"cannot read x.json, \[1\]: Expected `int`, got `str`"):
        convert([1, "a"], list[int], "x.json")
    for value in ({"x": 10**400}, {"x": "\ud800"}):
        with pytest.raises(WanlabError, match=r"cannot read x\.json"):
            convert(value, dict[str, float], "x.json", strict=False)
    for name in ("nothing.json", ".", "a\0b"):
        with pytest.raises(WanlabError, match="cannot read"):
            read_json(tmp_path / name)


def test_a_user_can_raise_every_limit(tmp_path, monkeypatch):
    deep = "[" * 150 + "]" * 150
    monkeypatch.setenv("WANLAB_LIMITS", " depth=1000 , text_mib=0.00001")
    assert yaml(deep) == parse_json(deep, "x")
    (tmp_path / "x").write_text("a: " + "b" * 100)
    with pytest.raises(
        WanlabError, match=r"x: 0 MiB is over the limit of 0 MiB; WANLAB_LIMITS='text_mib=1' raises it"
    ):
        read_text(tmp_path / "x")
    monkeypatch.setenv("WANLAB_LIMITS", "depth=1e6")
    with pytest.raises(WanlabError, match=r"too deep|nesting depth"):
        yaml("[" * 5000)
    for words, said in {
        "dept=3": "no limit 'dept' .did you mean 'depth'",
        "depth=x": "depth='x' is not a number",
    }.items():
        monkeypatch.setenv("WANLAB_LIMITS", words)
        with pytest.raises(WanlabError, match=said):
            limits.limit("depth")


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("\x1b[2J\x1b[1;31mred\x1b[0m", "red"),
        ("\x1b]0;title\x07\x1b]8;;http://x\x1b\\link\x1b]8;;\x1b\\", "link"),
        ("\x9b2Ja\x9d0;t\x9cb\x1bPq\x1b\\c\x1bcd", "abcd"),
        (
            "a\x00b\x08c\x7f\ud800\u202e",
            "a\N{REPLACEMENT CHARACTER}b" + "\N{REPLACEMENT CHARACTER}c" + 3 * "\N{REPLACEMENT CHARACTER}",
        ),
        (
            "naïve \N{ZERO WIDTH JOINER} 日本語 \N{RAT}\n\tx",
            "naïve \N{ZERO WIDTH JOINER} 日本語 \N{RAT}\n\tx",
        ),
    ],
)
def test_what_a_terminal_would_obey_is_cleaned_and_other_text_stays(text, shown):
    assert clean(text) == shown
    assert str(WanlabError(text)) == shown.replace("\n", " ")


@given(st.text(st.characters(), max_size=30))
def test_cleaned_text_holds_nothing_that_a_terminal_obeys(text):
    assert clean(clean(text)) == clean(text)
    assert all(
        character.isprintable() or ord(character) > 0x9F or character in "\n\t" for character in clean(text)
    )
    clean(text).encode()
