"""Values of keys: how they are parsed, and which are refused."""

from dataclasses import dataclass

import pytest

from llamafactory_ddm.utils.keys import Key, check_fields, key, keys_of
from llamafactory_ddm.utils.registry import Registry


@dataclass(frozen=True)
class Settings:
    colour: str = key("red", "Of the paint.", choices=("red", "green"))
    share: float = key(0.5, "Of the wall.", low=0, above_low=True, high=1)
    coats: int | None = key(None, "How many.", kind="integer", low=1)
    wet: bool = key(False, "Not dry.")
    other: int = 3

    def __post_init__(self):
        check_fields(self)


def test_strings_are_parsed():
    assert Settings(share="0.25", coats=2.0, wet="True") == Settings("red", 0.25, 2, True)
    assert Settings(coats=2**64 - 1).coats == 2**64 - 1  # more than a float holds
    assert list(keys_of(Settings)) == ["colour", "share", "coats", "wet"]


@pytest.mark.parametrize(
    ("changes", "pattern"),
    [
        ({"colour": "gren"}, "colour .*red, green.*'gren'.*'green'"),
        ({"colour": None}, "colour .*red"),
        ({"share": 0}, r"share .*\(0, 1\].*0"),
        ({"share": 1.5}, r"share .*\(0, 1\].*1\.5"),
        ({"coats": 0}, "coats .*1.*0"),
        ({"coats": 1.5}, r"coats .*1\.5"),
        ({"wet": "maybe"}, "wet .*true.*false.*'maybe'"),
    ],
)
def test_values_that_are_not_allowed(changes, pattern):
    with pytest.raises(ValueError, match=pattern):
        Settings(**changes)


def test_a_registry_is_read_when_a_value_is_checked():
    registry = Registry("colour")
    colours = Key(None, "", "text", choices=registry)
    with pytest.raises(ValueError, match=r"colour .*'blue'"):
        colours.checked("colour", "blue")
    registry.register("BLUE", name="blue")
    assert colours.checked("colour", "blue") == "blue" and colours.allowed == "`blue`"


@pytest.mark.parametrize(
    ("limits", "allowed"),
    [
        ({"low": 0, "high": 1, "below_high": True}, "number in [0, 1)"),
        ({"low": 0, "above_low": True}, "number in (0, inf)"),
        ({}, "number in (-inf, inf)"),
    ],
)
def test_intervals(limits, allowed):
    assert Key(0.5, "", "number", **limits).allowed == allowed


def test_lists_of_texts_and_of_names():
    texts, names = Key(None, "", "texts"), Key(None, "", "names")
    assert texts.checked("x", "a, b") == ["a, b"]
    assert texts.checked("x", ["a, b", "[c]"]) == ["a, b", "[c]"] == texts.checked("x", '["a, b", "[c]"]')
    assert names.checked("x", "a, b") == names.checked("x", ["a", "b"]) == "a,b"
    assert texts.checked("x", None) is None
    for wrong in ([], [""], "", [3], 3, {"a": "b"}):
        with pytest.raises(ValueError, match="x must be a text"):
            texts.checked("x", wrong)
