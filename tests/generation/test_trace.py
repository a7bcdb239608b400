"""Traces, how they come from what the sampler wrote, and the page made of them."""

import json
import re
from types import SimpleNamespace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from llamafactory_ddm.data.canvas import Canvas
from llamafactory_ddm.generation.trace import Recorder, Trace, html_page, replay, write_html

MASK = 99
EDITED = Trace("sample 0", ("a", None, None), ((0, 1, "b"), (2, 2, "c"), (2, 1, None), (3, 1, "B")), 5)


def page_data(page):
    """The JSON of a page."""
    found = re.search(r'<script type="application/json" id="data">(.*?)</script>', page, re.S)
    return json.loads(found[1])


def test_frames_by_hand():
    assert [EDITED.frame(step) for step in range(6)] == [
        ["a", None, None],
        ["a", "b", None],
        ["a", "b", None],
        ["a", None, "c"],
        ["a", "B", "c"],
        ["a", "B", "c"],
    ]
    with pytest.raises(ValueError, match=r"step .*got 6"):
        EDITED.frame(6)
    with pytest.raises(ValueError, match="got -1"):
        EDITED.frame(-1)


def test_a_frame_is_a_copy():
    EDITED.frame(0)[0] = "changed"
    assert EDITED.frame(0)[0] == "a"


@pytest.mark.parametrize(
    ("events", "steps", "message"),
    [
        (((1, 0, "a"), (0, 0, "b")), 2, "got 0 after 1"),
        (((2, 0, "a"),), 2, r"in \[0, 2\)"),
        (((-1, 0, "a"),), 2, "got -1"),
        (((0, 1, "a"),), 2, "position .*got 1"),
        ((), -1, "steps .*-1"),
    ],
)
def test_invalid_events(events, steps, message):
    with pytest.raises(ValueError, match=message):
        Trace("t", (None,), events, steps)


@given(st.lists(st.text(), max_size=5), st.text(), st.text())
def test_every_text_survives_the_page(pieces, heading, fact):
    trace = Trace(heading, (None,) * len(pieces), tuple((0, i, piece) for i, piece in enumerate(pieces)), 1)
    page = html_page([trace], heading=heading, facts={"fact": fact, fact: "2"})
    data = page_data(page)
    events = data["samples"][0]["events"]
    assert [data["pieces"][number] for number in events[2::3]] == pieces
    assert events[0::3] == [0] * len(pieces) and events[1::3] == list(range(len(pieces)))
    assert data["samples"][0]["title"] == data["heading"] == heading
    assert data["facts"] == [[name, value] for name, value in {"fact": fact, fact: "2"}.items()]
    assert page.isascii()


def test_no_data_can_close_the_script_element():
    nasty = "</script><script>alert(1)</script><!--"
    page = html_page(
        [Trace(nasty, (nasty, None), ((0, 1, "{{data}}"),), 1)], heading=nasty, facts={nasty: "{{title}}"}
    )
    plain = html_page([Trace("", ("", None), ((0, 1, ""),), 1)], heading="", facts={"": ""})
    assert page.lower().count("<script") == plain.lower().count("<script")
    assert page.lower().count("</script") == plain.lower().count("</script")
    assert page.count("<!--") == plain.count("<!--")
    assert page_data(page)["facts"] == [[nasty, "{{title}}"]]
    assert "{{data}}" in page_data(page)["pieces"]


def test_the_recorder_records_changes_only():
    """Decoding, editing, remasking, and a step without changes."""
    frames = [[[9, 9, 4], [9, 9, 9]], [[1, 9, 4], [9, 9, 9]], [[1, 9, 4], [9, 9, 9]], [[2, 3, 4], [9, 9, 5]]]
    frames.append([[9, 3, 4], [9, 9, 5]])
    note = Recorder(torch.tensor(frames[0]))
    for step, frame in enumerate(frames[1:]):
        note(step, torch.tensor(frame))
    assert note.events == [[(0, 0, 1), (2, 0, 2), (2, 1, 3), (3, 0, 9)], [(2, 2, 5)]]


def test_the_page_is_self_contained():
    page = html_page([EDITED], heading="h", facts={})
    assert "default-src 'none'" in page
    assert not re.search(r"https?:|\bsrc=|@import|url\(|innerHTML|document\.write|\beval\(|<link", page)


def test_the_page_is_written_atomically(tmp_path):
    path = tmp_path / "new" / "page.html"
    write_html(path, [EDITED], heading="h", facts={"steps": "5"})
    assert path.read_text() == html_page([EDITED], heading="h", facts={"steps": "5"})
    assert [file.name for file in path.parent.iterdir()] == ["page.html"]


def pieces(ids):
    """Each piece holds the token and the one before it, so that it shows the step that it is from."""
    return [None if token == MASK else f"{before}.{token}" for before, token in zip([0, *ids], ids, strict=False)]


CODEC = SimpleNamespace(mask_id=MASK, pieces=pieces)
CANVAS = Canvas((7, 5, 0, 0, 0), (False, False, True, True, True), n_start=1)


def test_pieces_are_of_the_final_text_or_of_their_step():
    events = [(0, 3, 30), (2, 2, 20), (2, 3, MASK), (3, 2, 21), (3, 3, 31), (5, 3, 32), (5, 4, 40)]
    trace = replay(CODEC, CANVAS, [7, 5, 21, 32, 40], events)
    assert trace.start == ("0.5", None, None, None) and trace.steps == 6
    assert trace.events == (
        (0, 2, "99.30"),  # what stands before it is masked yet
        (2, 1, "5.20"),
        (2, 2, None),
        (3, 1, "5.21"),  # stands to the end
        (3, 2, "21.31"),
        (5, 2, "21.32"),
        (5, 3, "32.40"),
    )
    assert trace.frame(6) == pieces([5, 21, 32, 40])
    assert trace.frame(3) == ["0.5", "5.20", None, None]


def test_a_trace_without_events_has_no_steps():
    trace = replay(CODEC, CANVAS, [7, 5, 1, 1, 1], [])
    assert trace.steps == 0 and trace.frame(0) == ["0.5", None, None, None]
