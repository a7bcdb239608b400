"""The animation, on a terminal that obeys the escape sequences it is sent."""

import io

import pytest
from rich.cells import cell_len

from llamafactory_ddm.generation import terminal as module
from llamafactory_ddm.generation.terminal import TerminalAnimation
from llamafactory_ddm.generation.trace import BLANK
from support.screen import Screen


@pytest.fixture
def screen(monkeypatch):
    """Return a function that makes a terminal of a given size, which the animation reads."""
    for name in ("NO_COLOR", "FORCE_COLOR", "TTY_COMPATIBLE", "COLORTERM"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("TERM", "xterm")

    def make(columns=20, lines=10):
        monkeypatch.setenv("COLUMNS", str(columns))
        monkeypatch.setenv("LINES", str(lines))
        return Screen()

    return make


def animation(pieces, stream, **keys):
    return TerminalAnimation(pieces, stream=stream, **{"delay": 0, **keys})


@pytest.mark.parametrize("variables", [{}, {"FORCE_COLOR": "1"}])
def test_a_stream_that_is_no_terminal_gets_only_the_final_text(monkeypatch, variables):
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    stream = io.StringIO()
    with animation([None, None], stream) as shown:
        shown.update(1, 2, ["one\t", None])
        assert stream.getvalue() == ""
        shown.update(2, 2, ["one\t", "two [bold]\nthree \x1b[31m"])
    assert stream.getvalue() == "one\ttwo [bold]\nthree \ufffd[31m\n"


def test_a_dumb_terminal_gets_only_the_final_text(screen, monkeypatch):
    stream = screen()
    monkeypatch.setenv("TERM", "dumb")
    with animation([None], stream) as shown:
        shown.update(1, 1, ["one"])
    assert stream.getvalue() == "one\n"


def test_the_text_is_redrawn_in_place(screen):
    stream = screen()
    stream.write("$ run\n")
    with animation([None] * 4, stream) as shown:
        shown.update(1, 3, [None, " old", None, None])
        assert stream.lines() == ["$ run", "step 1/3", f"{BLANK} old{BLANK}{BLANK}"]
        assert stream.highlighted() == " old" and not stream.has_cursor
        shown.update(2, 3, ["An", " old", None, " went over the sea"])
        assert stream.lines() == ["$ run", "step 2/3", f"An old{BLANK} went over", "the sea"]
        assert stream.highlighted() == "An went over the sea"
        shown.update(3, 3, ["An", " old", " man", " sat"])
        assert stream.lines() == ["$ run", "step 3/3", "An old man sat"]
    assert stream.lines() == ["$ run", "An old man sat"]
    assert stream.has_cursor and not stream.highlighted() and stream.rows[stream.row] == ""


@pytest.mark.parametrize("columns", [2, 5, 7])
def test_lines_fit_a_narrow_terminal_with_wide_characters(screen, columns):
    stream = screen(columns, 40)
    with animation([None], stream) as shown:
        shown.update(1, 1, ["日本語です ab\t" + "e\u0301" * 9, None, None])
        drawn = "".join(stream.lines()[1:])
        assert all(cell_len(line) <= columns for line in stream.lines())
    assert all(cell_len(line) <= columns for line in stream.lines())
    for text in (drawn, "".join(stream.lines())):
        assert text.replace(" ", "") == "日本語ですab" + "e\u0301" * 9 + 2 * BLANK


def test_a_tall_text_scrolls_to_its_changes_and_is_printed_whole_at_the_end(screen):
    stream = screen(30, 7)
    lines = [f"line {i}\n" for i in range(40)]
    with animation(lines, stream) as shown:
        for changed in (30, 31, 0):
            lines[changed] = f"new {changed}\n"
            shown.update(1, 3, lines)
            assert stream.lines()[0].startswith("step 1/3  lines ") and len(stream.lines()) <= 6
            assert f"new {changed}" in stream.lines()
    assert "\n".join(stream.lines()) == "".join(lines).rstrip()


def test_no_color(screen, monkeypatch):
    monkeypatch.setenv("NO_COLOR", "1")
    stream = screen()
    with animation([None, None], stream) as shown:
        shown.update(1, 2, ["a", None])
    assert "32m" not in stream.getvalue()


def test_control_characters_do_not_reach_the_terminal(screen):
    stream = screen(columns=40)
    with animation([None], stream) as shown:
        shown.update(1, 1, ["a\x1b[2J\x07\x00\x7f\x9b1A\x85\rb\u202ec\ud800\u2028d\r\ne\u00adg"])
        assert stream.lines()[1:] == ["a?[2J????1A??bc?".replace("?", "\ufffd"), "d", "eg"]


def test_the_terminal_is_restored_after_an_interrupt(screen):
    stream = screen()
    with pytest.raises(KeyboardInterrupt), animation([None, None], stream) as shown:
        shown.update(1, 2, ["half", None])
        raise KeyboardInterrupt
    assert stream.has_cursor and stream.lines() == [f"half{BLANK}"]


def test_the_cursor_is_restored_if_drawing_fails(screen, monkeypatch):
    stream = screen()
    shown = animation([None], stream)
    shown.update(1, 1, ["a"])
    monkeypatch.setattr(module.Text, "__rich_console__", lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        shown.close()
    assert stream.has_cursor


def test_closing_twice_and_updating_after_it_print_nothing_more(screen):
    stream = screen()
    shown = animation([None], stream)
    shown.update(1, 1, ["a"])
    shown.close("b")
    assert stream.lines() == ["b"]
    before = stream.getvalue()
    shown.close()
    shown.update(1, 1, ["c"])
    assert stream.getvalue() == before


def test_an_encoding_without_the_blank():
    raw = io.BytesIO()
    stream = io.TextIOWrapper(raw, encoding="latin-1", newline="\n")
    animation([None, "é", "日"], stream).close()
    stream.flush()
    assert raw.getvalue() == "?é?\n".encode("latin-1")


def test_it_waits_after_each_step_on_a_terminal_only(screen, monkeypatch):
    waits = []
    monkeypatch.setattr(module.time, "sleep", waits.append)
    for stream in (screen(), io.StringIO()):
        with animation([None], stream, delay=0.25) as shown:
            shown.update(1, 1, ["a"])
    assert waits == [0.25]
