"""The animation, on a terminal that obeys the escape sequences it is sent."""

import io
import os
import re
import unicodedata

import pytest
from hypothesis import given
from hypothesis import strategies as st

from llamafactory_ddm.generation import terminal as module
from llamafactory_ddm.generation.terminal import TerminalAnimation
from llamafactory_ddm.generation.trace import BLANK, Trace

EDITED = Trace("sample 0", ("a", None, None), ((0, 1, "b"), (2, 2, "c"), (2, 1, None), (3, 1, "B")), 5)


class Terminal(io.StringIO):
    """A terminal of `columns` x `lines` that wraps and scrolls; a sequence that the animation should not use fails."""

    def __init__(self, columns=20, lines=10):
        super().__init__()
        self.columns, self.lines = columns, lines
        self.screen = [[" "] * columns for _ in range(lines)]
        self.bold = set()  # (row, column) written in bold
        self.scrolled = []
        self.row = self.column = 0
        self.wraps = self.cursor = True
        self.style = ""

    def isatty(self):
        return True

    def text(self):
        return "\n".join("".join(row).rstrip() for row in self.screen).rstrip()

    def highlighted(self):
        return "".join(self.screen[row][column] for row, column in sorted(self.bold))

    def _down(self):
        self.row += 1
        if self.row == self.lines:
            self.scrolled.append("".join(self.screen.pop(0)).rstrip())
            self.screen.append([" "] * self.columns)
            self.bold = {(row - 1, column) for row, column in self.bold if row}
            self.row -= 1

    def _clear(self, row, first):
        self.screen[row][first:] = [" "] * (self.columns - first)
        self.bold -= {(row, column) for column in range(first, self.columns)}

    def write(self, text):
        for code, char in re.findall(r"\x1b\[([?0-9;]*[A-Za-z])|(.)", text, re.S):
            if code:
                self._obey(code)
            elif char == "\n":
                self._down()
                self.column = 0
            elif char == "\r":
                self.column = 0
            else:
                self._put(char)
        return super().write(text)

    def _obey(self, code):
        if code in ("?25l", "?25h"):
            self.cursor = code == "?25h"
        elif code in ("?7l", "?7h"):
            self.wraps = code == "?7h"
        elif code == "K":
            self._clear(self.row, min(self.column, self.columns - 1))
        elif code == "J":
            self._clear(self.row, min(self.column, self.columns - 1))
            for row in range(self.row + 1, self.lines):
                self._clear(row, 0)
        elif code.endswith("A"):
            assert self.row >= int(code[:-1]), "moved up past the top of the screen"
            self.row -= int(code[:-1])
        elif code.endswith("m"):
            self.style = code
        else:
            raise AssertionError(f"unexpected escape sequence {code!r}")

    def _put(self, char):
        assert unicodedata.category(char) not in ("Cc", "Cs"), f"control character {char!r}"
        if unicodedata.combining(char):
            return
        width = 2 if unicodedata.east_asian_width(char) in "WF" else 1
        if self.column + width > self.columns:
            if not self.wraps:
                return
            self._down()
            self.column = 0
        self.screen[self.row][self.column] = char
        if self.style == "1;32m":
            self.bold.add((self.row, self.column))
        if width == 2:
            self.screen[self.row][self.column + 1] = ""
        self.column += width


@pytest.fixture
def terminal(monkeypatch):
    """Return a function that makes a terminal of a size; it is the size the animation finds."""
    monkeypatch.delenv("NO_COLOR", raising=False)
    monkeypatch.setenv("TERM", "xterm")

    def make(columns=20, lines=10):
        monkeypatch.setattr(module.shutil, "get_terminal_size", lambda *_: os.terminal_size((columns, lines)))
        return Terminal(columns, lines)

    return make


def animation(pieces, stream, **keys):
    return TerminalAnimation(pieces, stream=stream, delay=0, **keys)


def test_a_stream_that_is_no_terminal_gets_the_final_text_alone():
    stream = io.StringIO()
    with animation([None, None], stream) as shown:
        shown.update(1, 2, ["one\t", None])
        assert stream.getvalue() == ""
        shown.update(2, 2, ["one\t", "two\nthree \x1b[31m"])
    assert stream.getvalue() == "one\ttwo\nthree ␛[31m\n"


def test_neither_does_a_dumb_terminal_get_more(terminal, monkeypatch):
    stream = terminal()
    monkeypatch.setenv("TERM", "dumb")
    with animation([None], stream) as shown:
        shown.update(1, 1, ["one"])
    assert stream.getvalue() == "one\n"


def test_the_text_is_redrawn_in_place(terminal):
    stream = terminal()
    stream.write("$ run\n")
    with animation([None] * 4, stream) as shown:
        shown.update(1, 3, [None, " old", None, None])
        assert stream.text() == f"$ run\nstep 1/3\n{BLANK} old{BLANK}{BLANK}"
        assert stream.highlighted() == " old"
        assert not stream.cursor
        shown.update(2, 3, ["An", " old", None, " went over the sea"])
        assert stream.text() == f"$ run\nstep 2/3\nAn old{BLANK} went over\nthe sea"
        assert stream.highlighted() == "An went over the sea"
        shown.update(3, 3, ["An", " old", " man", " sat"])
        assert stream.text() == "$ run\nstep 3/3\nAn old man sat"
    assert stream.text() == "$ run\nAn old man sat"
    assert stream.cursor and stream.wraps and not stream.highlighted() and not stream.scrolled
    assert (stream.row, stream.column) == (2, 0)


def test_it_starts_at_the_bottom_of_the_screen_as_well(terminal):
    stream = terminal(lines=5)
    stream.write("1\n2\n3\n4\n")
    with animation([None], stream) as shown:
        shown.update(1, 2, ["a\nb"])
        shown.update(2, 2, ["a\nb\nc"])
        assert stream.text() == "4\nstep 2/2\na\nb\nc"
    assert stream.scrolled == ["1", "2", "3"]
    assert stream.text() == "4\na\nb\nc"


def test_a_full_row_is_neither_lost_nor_wrapped_twice(terminal):
    stream = terminal(columns=5)
    with animation([None] * 12, stream) as shown:
        shown.update(0, 9, [None] * 12)
        assert stream.text() == f"step\n{BLANK * 5}\n{BLANK * 5}\n{BLANK * 2}"
        shown.update(1, 9, ["abcde", "fghij"])
        assert stream.text().splitlines()[1:] == ["abcde", "fghij"]
    assert stream.text() == "abcde\nfghij"


def test_a_space_at_the_edge_makes_no_empty_row(terminal):
    stream = terminal(columns=5)
    with animation([None], stream) as shown:
        shown.update(1, 1, ["abcde \nfg ab   cd\nabcde  f"])
        assert stream.text().splitlines()[1:] == ["abcde", "fg ab", "cd", "abcde", "f"]


def test_wide_characters_take_two_columns(terminal):
    stream = terminal(columns=5)
    with animation([None], stream) as shown:
        shown.update(1, 1, ["日本語です"])
        assert stream.text().splitlines()[1:] == ["日本", "語で", "す"]
        shown.update(1, 1, ["e\u0301" * 5 + "x"])
        assert stream.text().splitlines()[1:] == ["eeeee", "x"]


@pytest.mark.parametrize("width", [1, 2, 7])
def test_a_given_width_is_kept(terminal, width):
    stream = terminal()
    with animation([], stream, width=width) as shown:
        shown.update(1, 1, ["a b", "cdefghijk", " 日本", None, "\t", "x\n\ny"])
        rows = stream.text().splitlines()
    assert all(len(row) <= max(2, width) for row in rows)


@given(st.lists(st.none() | st.text("ab \n\t日é\u0301👍🏽", max_size=9), max_size=8), st.integers(2, 9))
def test_rows_fit_and_hold_everything_but_spaces(pieces, width):
    rows = module._rows(pieces, [False] * len(pieces), width)
    assert all(sum(cell.columns for cell in row) <= width for row in rows)
    text = "".join(BLANK if piece is None else piece for piece in pieces)
    assert "".join("".join(cell.text for cell in row) for row in rows).replace(" ", "") == re.sub(r"\s", "", text)


def test_a_text_taller_than_the_screen_shows_where_it_changed(terminal):
    stream = terminal(lines=6)
    lines = [f"line {i}\n" for i in range(40)]
    with animation(lines, stream) as shown:
        lines[30] = "changed\n"
        shown.update(1, 3, lines)
        assert stream.text() == "step 1/3  rows 29-33\nline 28\nline 29\nchanged\nline 31\nline 32"
        lines[31] = "near by\n"
        shown.update(2, 3, lines)
        assert stream.text().splitlines()[1:] == ["line 28", "line 29", "changed", "near by", "line 32"]
        lines[0] = "top\n"
        shown.update(3, 3, lines)
        assert stream.text().splitlines()[1:] == ["top", "line 1", "line 2", "line 3", "line 4"]
        assert stream.highlighted() == "top"
        assert not stream.scrolled
    whole = "\n".join([*stream.scrolled, stream.text()])
    assert whole == "".join(lines).rstrip()


def test_a_terminal_of_one_line(terminal):
    stream = terminal(lines=1)
    with animation(["a\nb"], stream) as shown:
        shown.update(1, 1, ["a\nc"])
        assert stream.text() == "c"
        assert not stream.scrolled


def test_no_color(terminal, monkeypatch):
    monkeypatch.setenv("NO_COLOR", "1")
    stream = terminal()
    with animation([None, None], stream) as shown:
        shown.update(1, 2, ["a", None])
        assert stream.text() == f"step 1/2\na{BLANK}"
    assert not re.search(r"\x1b\[[0-9;]*m", stream.getvalue())


def test_control_characters_are_shown_not_obeyed(terminal):
    stream = terminal(columns=40)
    piece = "a\x1b[2J\x07\x00\x7f\x9b1A\x85\rb\u202ec\ud800\u2028d\r\ne\tf\u00adg"
    with animation([None], stream) as shown:
        shown.update(1, 1, [piece])
        assert stream.text() == "step 1/1\na␛[2J␇␀␡\ufffd1A\ufffd␍bc\ufffd\nd\ne   fg"


def test_the_terminal_is_itself_again_after_an_error(terminal):
    stream = terminal()
    with pytest.raises(KeyboardInterrupt), animation([None, None], stream) as shown:
        shown.update(1, 2, ["half", None])
        raise KeyboardInterrupt
    assert stream.cursor and stream.wraps
    assert stream.text() == f"half{BLANK}"


def test_the_cursor_comes_back_even_if_the_text_cannot_be_drawn(terminal, monkeypatch):
    stream = terminal()
    shown = animation([None], stream)
    shown.update(1, 1, ["a"])
    monkeypatch.setattr(module, "_rows", lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        shown.close()
    assert stream.cursor and stream.wraps


def test_closing_twice_and_updating_after_it_print_nothing_more(terminal):
    stream = terminal()
    shown = animation([None], stream)
    shown.update(1, 1, ["a"])
    shown.close()
    before = stream.getvalue()
    shown.close()
    shown.update(1, 1, ["b"])
    assert stream.getvalue() == before


def test_an_encoding_without_the_blank():
    raw = io.BytesIO()
    stream = io.TextIOWrapper(raw, encoding="latin-1", newline="\n")
    animation([None, "é", "日"], stream).close()
    assert raw.getvalue() == "?é?\n".encode("latin-1")


def test_it_waits_after_each_step_on_a_terminal_only(terminal, monkeypatch):
    waits = []
    monkeypatch.setattr(module.time, "sleep", waits.append)
    for stream in (terminal(), io.StringIO()):
        with TerminalAnimation([None], stream=stream, delay=0.25) as shown:
            shown.update(1, 1, ["a"])
    assert waits == [0.25]
