"""The HTML of a canvas: what a browser reads from it is the text, and nothing of the text is read as anything else."""

import re
from html.parser import HTMLParser

import pytest
from transformers import AutoTokenizer

from llamafactory_ddm.data.text_codec import TextCodec
from llamafactory_ddm.integration.webui.live_canvas import BLANK, CSS, END, N_AGES, LiveCanvas, escaped, with_our_css
from support.cli import ROOT

NASTY = (
    "<script>alert(1)</script>",
    "<img src=x onerror=alert(1)>",
    "</span></div><b>",
    "\"'&amp;&lt;",
    "**bold** _it_ `code` $$x^2$$ \\(y\\) [a](javascript:x) ~~s~~ # h | t |",
    "https://example.org",
    " two  spaces\ttab",
    "\n\n1. one\n- two\n\n",
    "{{x}} ${x}",
    "שלום 😀 é 中文",
    "<!-- ",
    "]]>",
)


class Page(HTMLParser):
    """Reads back the pieces of a canvas as (class, text)."""

    def __init__(self, source):
        super().__init__(convert_charrefs=True)
        self.runs, self.tags, self._class = [], [], None
        self.feed(source)
        self.close()

    def handle_starttag(self, tag, attributes):
        self.tags.append((tag, *sorted(dict(attributes))))
        self._class = dict(attributes).get("class")
        self.runs.append((self._class, ""))

    def handle_data(self, data):
        self.runs[-1] = (self.runs[-1][0], self.runs[-1][1] + data)

    @property
    def text(self):
        return "".join(text for css_class, text in self.runs if css_class != "ddm-step")


def shown(*frames):
    canvas = LiveCanvas()
    for step, pieces in frames:
        canvas.update(step, pieces)
    return canvas


@pytest.mark.parametrize("text", NASTY)
def test_text_is_only_ever_text(text):
    source = shown((1, [text, None])).html(text)
    page = Page(source)
    assert set(page.tags) == {("div", "class"), ("span", "class")}
    assert page.text == text + BLANK
    assert page.runs[-1] == ("ddm-step", text)
    # Neither a Markdown nor a LaTeX renderer finds anything of its own, nor the empty line that ends a block of HTML.
    bare = re.sub(r"<[^<>]*>|&#?\w+;", "", source)
    assert not re.search(r"[\n<>*_`$\\\[\]~|#:]", bare)


def test_control_characters_and_turns_of_direction_are_replaced():
    assert escaped("a\x00b\x1b[2Jc\u202ed\ud800e") == "a\ufffdb\ufffd&#91;2Jc\ufffdd\ufffde"
    assert escaped("a\r\nb\u2028c\rd") == "a&#10;b&#10;c&#10;d"


def test_masks_are_blanks_of_their_own_class():
    page = Page(shown((1, [None, "a", None, None])).html())
    assert page.runs[1:] == [("ddm-mask", BLANK), ("ddm-fresh", "a"), ("ddm-mask", BLANK * 2)]


def test_colours_follow_the_step_at_which_a_token_appeared():
    pieces = [None] * 20
    canvas = LiveCanvas()
    for step in range(1, 21):
        pieces[step - 1] = f"{step} "
        canvas.update(step, pieces)
    assert (canvas.step, canvas.n_decoded, len(canvas)) == (20, 20, 20)
    runs = Page(canvas.html()).runs[1:]
    assert runs[-1] == ("ddm-fresh", "20 ")
    ages = [int(css_class.removeprefix("ddm-age")) for css_class, _ in runs[:-1]]
    assert ages == sorted(ages) and set(ages) == set(range(N_AGES))


def test_an_edited_token_is_fresh_and_a_remasked_one_a_mask():
    canvas = shown((1, ["a", "b", None]), (2, ["a", "c", None]), (3, [None, "c", "d"]))
    assert Page(canvas.html()).runs[1:] == [("ddm-mask", BLANK), ("ddm-age5", "c"), ("ddm-fresh", "d")]


def test_the_end_of_a_text_is_a_faint_dot():
    canvas = LiveCanvas(["<eos>", "<pad>"])
    canvas.update(1, ["a", "<eos>", None, None])
    canvas.update(2, ["a", "<eos>", "<pad>", None])
    runs = [("ddm-age4", "a"), ("ddm-end", END), ("ddm-fresh", END), ("ddm-mask", BLANK)]
    assert Page(canvas.html()).runs[1:] == runs


def test_a_canvas_may_grow_and_shrink():
    canvas = shown((1, ["a", None]), (2, ["a", None, None, "b"]))
    assert Page(canvas.html()).text == f"a{BLANK * 2}b"
    canvas.update(3, ["a"])
    assert (len(canvas), Page(canvas.html()).text) == (1, "a")
    assert Page(LiveCanvas().html()).text == ""


def test_characters_of_several_tokens_appear_whole():
    tokenizer = AutoTokenizer.from_pretrained(ROOT / "data" / "tiny_gpt2")
    text = "é 😀 中"
    ids = tokenizer.encode(text)
    assert len(ids) > len(text)  # bytes
    mask_id = len(tokenizer)
    codec = TextCodec(tokenizer, mask_id, (), ())
    canvas = LiveCanvas()
    for step in range(len(ids) + 1):
        canvas.update(step, codec.pieces([*ids[:step], *[mask_id] * (len(ids) - step)]))
        assert Page(canvas.html()).text.rstrip(BLANK).rstrip("\ufffd") in text
    assert Page(canvas.html()).text == text


def test_every_class_has_a_colour_on_light_and_dark_pages():
    for css_class in (*(f"ddm-age{age}" for age in range(N_AGES)), "ddm-fresh"):
        assert f"\n.{css_class} {{" in CSS and f".dark .{css_class} {{" in CSS
    assert with_our_css(".a {}").startswith(".a {}\n") and CSS in with_our_css("")
