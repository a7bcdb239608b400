"""Events of ids become pieces of text."""

from types import SimpleNamespace

from llamafactory_ddm.data.canvas import Canvas
from llamafactory_ddm.generation.trace import replay

MASK = 99


def pieces(ids):
    """Each token shows itself and the one in front of it, so that a piece tells when it was made."""
    return [None if token == MASK else f"{before}.{token}" for before, token in zip([0, *ids], ids, strict=False)]


CODEC = SimpleNamespace(mask_id=MASK, pieces=pieces)
CANVAS = Canvas((7, 5, 0, 0, 0), (False, False, True, True, True), n_start=1)


def test_pieces_are_those_of_the_text_or_of_their_time():
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


def test_nothing_written_is_no_step():
    trace = replay(CODEC, CANVAS, [7, 5, 1, 1, 1], [])
    assert trace.steps == 0 and trace.frame(0) == ["0.5", None, None, None]
