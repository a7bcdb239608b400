"""The page of traces, opened once in a headless Chromium: what it shows, how it is operated, what it loads.

Its data is tested in tests/generation/test_trace.py.
"""

import json
import re
import shutil
import subprocess
from html.parser import HTMLParser

import pytest

from llamafactory_ddm.generation.trace import BLANK, Trace, write_html
from support.limits import LIMIT

BROWSER = shutil.which("chromium") or shutil.which("google-chrome")
pytestmark = pytest.mark.skipif(BROWSER is None, reason="neither chromium nor google-chrome is on this machine")

FLAGS = [
    *("--dump-dom", "--allow-file-access-from-files", "--virtual-time-budget=60000"),
    *("--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--disable-sync"),
    *("--disable-background-networking", "--disable-component-update", "--hide-scrollbars"),
    "--host-resolver-rules=MAP * ~NOTFOUND",
]
NASTY = ("</script>", "<|endoftext|>", "\"'&amp;<b>", " 😀", " שלום", "\n\n", "  two  spaces", "<!--", "${x}", "", "░")
TRACES = [
    Trace("sample 0", ("Max", None, None, None), ((0, 3, "."), (2, 1, " saw"), (2, 2, " it")), 4),
    Trace("nasty </select>", (None,) * len(NASTY), tuple((i, i, piece) for i, piece in enumerate(NASTY)), len(NASTY)),
    Trace(
        "edited",
        ("Once", None, None, None),
        ((0, 1, " a"), (1, 1, " the"), (1, 2, " b"), (2, 2, None), (3, 2, " b"), (3, 0, "Then"), (4, 3, "!")),
        5,
    ),
]
LONG = tuple((i // 4, (i * 7) % 1000, f" {i % 97}") for i in range(1000))
MANY = [Trace(f"sample {i}", (None,) * 1000, LONG, 250) for i in range(200)]
FACTS = {"strategy": "low_confidence", "<i>steps</i>": "4 & 11"}


class Page(HTMLParser):
    """What a dumped DOM holds of the page: the state, the spans of the text, the values and texts by id."""

    def __init__(self, dom):
        super().__init__()
        self.state, self.spans, self.texts, self.attributes, self.facts = {}, [], {}, {}, []
        self._open = []
        self.feed(dom)

    def handle_starttag(self, tag, attrs):
        attrs = dict(attrs)
        if tag in ("meta", "input", "br", "path"):
            return
        name = attrs.get("id")
        if tag == "main":
            self.state = {key[5:]: value for key, value in attrs.items() if key.startswith("data-")}
        if self._open and self._open[-1][1] == "text":
            self.spans.append([attrs.get("class", ""), ""])
        if name:
            self.attributes[name] = attrs
            self.texts[name] = ""
        self._open.append((tag, name))

    def handle_endtag(self, tag):
        while self._open and self._open.pop()[0] != tag:
            pass

    def handle_data(self, data):
        names = [name for _, name in self._open if name]
        for name in names:
            self.texts[name] += data
        if "text" in names:
            self.spans[-1][1] += data
        if "facts" in names:
            self.facts.append(data)

    def pieces(self):
        return [None if "mask" in kind.split() else text for kind, text in self.spans]

    def marked(self, kind):
        return [i for i, (kinds, _) in enumerate(self.spans) if kind in kinds.split()]


# What a reader does, beginning at step 1 of sample 0 -> the sample, the step and whether it plays.
ACTIONS = {
    "key('ArrowRight'); key('ArrowRight'); key('ArrowLeft')": ("0", "2", "false"),
    "key('End'); key('ArrowRight')": ("0", "4", "false"),
    "key('Home'); key('ArrowLeft')": ("0", "0", "false"),
    "key(' ')": ("0", "1", "true"),
    "key(' '); key(' ')": ("0", "1", "false"),
    "key('ArrowRight', {ctrlKey: true})": ("0", "1", "false"),
    "at('forth').click(); at('forth').click(); at('back').click()": ("0", "2", "false"),
    "at('later').click(); at('later').click(); at('later').click()": ("2", "1", "false"),
    "at('sample').value = 1; at('sample').dispatchEvent(new Event('change'))": ("1", "1", "false"),
    "at('step').value = 3; at('step').dispatchEvent(new Event('input'))": ("0", "3", "false"),
    "key('End'); at('play').click()": ("0", "0", "true"),
}
# Each case is opened in a frame of its own: the page, its fragment, what is done, and how many ms later it is read.
CASES = [
    *(("page.html", f"#sample={n}&step={i}", "", 0) for n, trace in enumerate(TRACES) for i in range(trace.steps + 1)),
    *(("page.html", "#sample=0&step=1", action, 0) for action in ACTIONS),
    ("page.html", "#sample=99&step=999", "", 0),
    ("page.html", "#sample=x&step=-1", "", 0),
    ("page.html", "", "", 15000),
    ("empty.html", "", "", 0),
    ("many.html", "#sample=199&step=100", "", 0),
    ("asking.html", "", "", 0),
]
DRIVER = """<!DOCTYPE html><body><script>
const cases = CASES, results = [];
let left = cases.length;
const safe = (text) => text.replace(/[^ -%'-;=?-~]/g, (c) => "\\\\u" + c.charCodeAt(0).toString(16).padStart(4, "0"));
cases.forEach(([file, fragment, actions, wait], i) => {
  const frame = document.createElement("iframe");
  frame.style = "border:0;width:400px;height:900px";
  frame.src = file + fragment;
  frame.onload = () => {
    const page = frame.contentWindow, inside = frame.contentDocument;
    const at = (id) => inside.getElementById(id);
    const press = (key, more) => new page.KeyboardEvent("keydown", {key, bubbles: true, ...more});
    const key = (key, more) => inside.body.dispatchEvent(press(key, more));
    const Event = page.Event;
    eval(actions);
    setTimeout(() => {
      const loads = page.performance.getEntriesByType("resource").map((entry) => entry.name);
      results[i] = [inside.documentElement.outerHTML, loads, inside.documentElement.scrollWidth];
      if (--left === 0) document.body.textContent = safe(JSON.stringify(results));
    }, wait);
  };
  document.body.append(frame);
});
</script>"""


@pytest.fixture(scope="module")
def opened(tmp_path_factory):
    """All cases in one start of the browser: case -> (the page, what it loaded, its width in a window of 400)."""
    folder = tmp_path_factory.mktemp("page")
    write_html(folder / "page.html", TRACES, heading="How & <why>", facts=FACTS)
    write_html(folder / "empty.html", [], heading="h", facts={})
    write_html(folder / "many.html", MANY, heading="h", facts={})
    (folder / "asking.html").write_text('<img src="http://one.invalid/a.png">')
    (folder / "driver.html").write_text(DRIVER.replace("CASES", json.dumps(CASES)))
    command = [BROWSER, *FLAGS, f"--user-data-dir={folder / 'profile'}", (folder / "driver.html").as_uri()]
    done = subprocess.run(command, capture_output=True, timeout=LIMIT, check=True)
    found = re.search(r"<body>(.*)</body>", done.stdout.decode("utf-8"), re.S)[1]
    return {
        tuple(case): (Page(dom), loads, width)
        for case, (dom, loads, width) in zip(CASES, json.loads(found), strict=True)
    }


def test_the_page_in_a_browser(opened):
    for index, trace in enumerate(TRACES):
        for step in range(trace.steps + 1):
            at, loads, width = opened["page.html", f"#sample={index}&step={step}", "", 0]
            assert at.pieces() == trace.frame(step), step
            assert at.state == {"sample": str(index), "step": str(step), "steps": str(trace.steps), "playing": "false"}
            assert set(at.marked("fresh")) == {position for when, position, _ in trace.events if when == step - 1}
            assert (at.texts["title"], at.texts["where"]) == (trace.title, f"step {step} of {trace.steps}")
            assert (at.texts["heading"], at.facts) == (
                "How & <why>",
                ["strategy", "low_confidence", "<i>steps</i>", "4 & 11"],
            )
            assert all(text == BLANK for kind, text in at.spans if "mask" in kind.split())
            assert (loads, width) == ([], 400)
    check_marks([opened["page.html", f"#sample={n}&step={i}", "", 0][0] for n, i in ((0, 2), (0, 4))], opened)
    for action, expected in ACTIONS.items():
        state = opened["page.html", "#sample=0&step=1", action, 0][0].state
        assert (state["sample"], state["step"], state["playing"]) == expected, action
    state = {"sample": "2", "step": "5", "steps": "5", "playing": "false"}
    assert opened["page.html", "#sample=99&step=999", "", 0][0].state == state
    state = {"sample": "0", "step": "4", "steps": "4", "playing": "false"}
    assert opened["page.html", "#sample=x&step=-1", "", 0][0].state == state
    assert opened["page.html", "", "", 15000][0].state == state  # it has played to its end
    empty = opened["empty.html", "", "", 0][0]
    assert "hidden" not in empty.attributes["none"] and "hidden" in empty.attributes["replay"]
    assert opened["many.html", "#sample=199&step=100", "", 0][0].pieces() == MANY[199].frame(100)
    assert opened["asking.html", "", "", 0][1] == ["http://one.invalid/a.png"]  # so that a page's loads are seen


def check_marks(plain, opened):
    """What is marked as fixed, coloured and edited."""
    assert plain[0].marked("given") == [0] and not plain[0].marked("heat")
    assert plain[1].marked("heat") == [1, 2, 3]  # the final text is coloured, but for what was fixed
    assert "hidden" in plain[1].attributes["key-again"] and "hidden" not in plain[1].attributes["key-given"]
    edited = [opened["page.html", f"#sample=2&step={step}", "", 0][0] for step in range(6)]
    assert [at.marked("again") for at in edited] == [[], [], [1], [1, 2], [0, 1], [0, 1]]
    assert edited[5].marked("given") == []
    assert "hidden" not in edited[5].attributes["key-back"]
    assert edited[5].texts["counts"] == "0 masked, 1 new, 2 edited"
