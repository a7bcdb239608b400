"""What generation starts from, and the mistakes that a text with markers can hold."""

import pytest

from llamafactory_ddm.data.canvas import Canvas, canvas_of, infilling_canvas, split_at_markers, stack_canvases


def encode(text):
    return [ord(letter) for letter in text]


def test_parts_one_after_another():
    canvas = canvas_of([[5, 6], 2, [7]])
    assert canvas == Canvas((5, 6, 0, 0, 7), (False, False, True, True, False), 0)
    assert (len(canvas), canvas.n_editable) == (5, 2)


def test_the_start_token_is_put_in_front_once():
    assert canvas_of([[5], 1], start_id=9) == Canvas((9, 5, 0), (False, False, True), 1)
    assert canvas_of([[9, 5], 1], start_id=9) == Canvas((9, 5, 0), (False, False, True), 1)
    assert canvas_of([2, [9]], start_id=9) == Canvas((9, 0, 0, 9), (False, True, True, False), 1)


@pytest.mark.parametrize(("parts", "words"), [([[1, 2]], "no position to generate"), ([[1], 0], "got 0")])
def test_invalid_canvases(parts, words):
    with pytest.raises(ValueError, match=words):
        canvas_of(parts)


def test_markers():
    assert split_at_markers("a <|infill:8|> b<|infill|>") == ["a ", 8, " b", None]
    assert split_at_markers("<|infill:1|>") == [1]
    canvas = infilling_canvas("ab<|infill|>c<|infill:1|>", encode, label="xyz")
    assert canvas == Canvas((97, 98, 0, 0, 0, 99, 0), (False, False, True, True, True, False, True), 0)


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("no marker", r"marker.*<\|infill:8\|>"),
        ("", r"marker.*<\|infill:8\|>"),
        ("a <|infill:0|>", r"<\|infill:0\|> .*<\|infill:1\|>"),
        ("a <|infill:-3|>", r"<\|infill:-3\|> .*<\|infill:1\|>"),
        ("a <|infill:many|> b <|infill:2|>", r"^<\|infill:many\|> .*<\|infill:8\|>"),
        ("a <|infill:3|> b <|infill:3>", r"^<\|infill:3> .*<\|infill:8\|>"),
        ("a <|INFILL:3|>", r"^<\|INFILL:3\|> .*<\|infill:8\|>"),
        ("a <|infill|> b <|infill|>", r"<\|infill\|> .*<\|infill:8\|>"),
        ("a <|infill|> b", r"<\|infill\|> .*label"),
    ],
)
def test_invalid_markers(text, words):
    with pytest.raises(ValueError, match=words):
        infilling_canvas(text, encode)


def test_a_batch_is_padded_on_the_left():
    batch = stack_canvases([canvas_of([[5, 6], 2], start_id=9), canvas_of([[7], 1])], pad_id=1)
    assert batch.x.tolist() == [[9, 5, 6, 0, 0], [1, 1, 1, 7, 0]]
    assert batch.editable.int().tolist() == [[0, 0, 0, 1, 1], [0, 0, 0, 0, 1]]
    assert batch.is_padding.int().tolist() == [[0] * 5, [1, 1, 1, 0, 0]]
    assert batch.prompt.int().tolist() == [[0, 1, 1, 0, 0], [0, 0, 0, 1, 0]]


def test_a_canvas_is_cut_after_its_first_positions():
    canvas = canvas_of([[5, 6], 4], start_id=0)
    short = Canvas((0, 5, 6, 0, 0), (False, False, False, True, True), 1, room=2)
    assert canvas.cut(2) == short and canvas.cut(9) == canvas
    assert short.cut(1).room == 3
    assert short.grown(1) == Canvas((*canvas.ids[:6],), canvas.editable[:6], 1, room=1)
    assert short.grown(5) == canvas == canvas.grown(1)
    assert short.with_fixed([0, 5, 6, 7, 8]).grown(1) == Canvas((0, 5, 6, 7, 8, 0), (False,) * 5 + (True,), 1, room=1)
    between = canvas_of([[5], 3, [6]])
    assert between.cut(1) == between
    with pytest.raises(ValueError, match=r"n_editable.*got 0"):
        canvas.cut(0)
