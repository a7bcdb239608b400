"""The page of traces in a headless Chromium: what it shows at each step, how it is operated, what it asks for."""

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


@pytest.fixture(scope="module")
def browse(tmp_path_factory):
    """Return a function that runs Chromium on a page and returns its standard output."""

    def run(path, *flags, fragment=""):
        profile = tmp_path_factory.mktemp("profile")
        command = [BROWSER, *FLAGS, f"--user-data-dir={profile}", *flags, path.as_uri() + fragment]
        done = subprocess.run(command, capture_output=True, timeout=LIMIT, check=True)
        shutil.rmtree(profile, ignore_errors=True)
        return done.stdout.decode("utf-8")

    return run


@pytest.fixture(scope="module")
def page(tmp_path_factory):
    """A page with a text that is written once, one of difficult pieces and one that is edited."""
    path = tmp_path_factory.mktemp("page") / "page.html"
    write_html(path, TRACES, heading="How & <why>", facts=FACTS)
    return path


@pytest.fixture(scope="module")
def opened(page, browse):
    """Return a function that opens the page at a fragment and returns what it holds."""
    return lambda fragment, *flags: Page(browse(page, "--dump-dom", *flags, fragment=fragment))


@pytest.fixture(scope="module")
def every_step(page, browse):
    """A function that returns the page at each step of a sample."""

    def steps(index):
        # One frame a step, each at an address of its own: the browser starts once and not for every step.
        path = page.with_name(f"frames{index}.html")
        path.write_text(
            "<!DOCTYPE html><body><script>"
            f"let left = {TRACES[index].steps} + 1; const doms = [];"
            f"for (let step = 0; step <= {TRACES[index].steps}; step++) {{"
            "  const frame = document.createElement('iframe');"
            f"  frame.src = 'page.html#sample={index}&step=' + step;"
            "  frame.onload = () => {"
            "    doms[step] = frame.contentDocument.documentElement.outerHTML;"
            "    if (--left === 0) document.body.textContent = JSON.stringify(doms).replaceAll('&', '\\\\u0026')"
            "      .replaceAll('<', '\\\\u003c').replaceAll('>', '\\\\u003e').replaceAll('\\u00a0', '\\\\u00a0');"
            "  };"
            "  document.body.append(frame);"
            "}</script>"
        )
        dom = browse(path, "--dump-dom", "--allow-file-access-from-files", "--virtual-time-budget=10000")
        return [Page(each) for each in json.loads(re.search(r"<body>(.*)</body>", dom, re.S)[1])]

    return steps


@pytest.mark.slow
@pytest.mark.parametrize("index", range(len(TRACES)))
def test_each_step_shows_its_frame(every_step, index):
    trace = TRACES[index]
    shown = every_step(index)
    assert len(shown) == trace.steps + 1
    for step, at in enumerate(shown):
        assert at.pieces() == trace.frame(step), step
        assert at.state == {"sample": str(index), "step": str(step), "steps": str(trace.steps), "playing": "false"}
        assert set(at.marked("fresh")) == {place for when, place, _ in trace.events if when == step - 1}
        assert at.texts["title"] == trace.title
        assert at.texts["where"] == f"step {step} of {trace.steps}"
        assert all(text == BLANK for kind, text in at.spans if "mask" in kind.split())


@pytest.mark.parametrize(("index", "step"), [(0, 2), (1, 11), (2, 4)])
def test_the_address_opens_a_step_directly(opened, index, step):
    at = opened(f"#sample={index}&step={step}")
    assert at.pieces() == TRACES[index].frame(step)
    assert (at.state["sample"], at.state["step"], at.state["playing"]) == (str(index), str(step), "false")
    assert at.texts["heading"] == "How & <why>"
    assert at.facts == ["strategy", "low_confidence", "<i>steps</i>", "4 & 11"]


@pytest.mark.slow
def test_an_address_out_of_range_is_brought_into_it(opened):
    assert opened("#sample=99&step=999").state == {"sample": "2", "step": "5", "steps": "5", "playing": "false"}
    assert opened("#sample=x&step=-1").state == {"sample": "0", "step": "4", "steps": "4", "playing": "false"}


@pytest.mark.slow
def test_what_is_marked(every_step):
    plain = every_step(0)
    assert plain[2].marked("given") == [0] and not plain[2].marked("heat")
    assert plain[4].marked("heat") == [1, 2, 3]  # the final text is coloured, but for what was given
    assert "hidden" in plain[4].attributes["key-again"] and "hidden" not in plain[4].attributes["key-given"]
    edited = every_step(2)
    assert [at.marked("again") for at in edited] == [[], [], [1], [1, 2], [0, 1], [0, 1]]
    assert edited[5].marked("given") == []
    assert "hidden" not in edited[5].attributes["key-back"]
    assert edited[5].texts["counts"] == "0 masked, 1 new, 2 rewritten"


@pytest.mark.slow
def test_it_plays_to_the_end(opened):
    """Virtual time, so that nine seconds take none."""
    assert opened("", "--virtual-time-budget=200").state["playing"] == "true"
    at = opened("", "--virtual-time-budget=20000")
    assert (at.state["step"], at.state["playing"]) == ("4", "false")
    assert at.pieces() == TRACES[0].frame(4)


@pytest.mark.slow
def test_reduced_motion_shows_the_end_at_once(opened):
    at = opened("", "--force-prefers-reduced-motion")
    assert (at.state["step"], at.state["playing"]) == ("4", "false")


@pytest.mark.slow
@pytest.mark.parametrize(
    ("actions", "expected"),
    [
        ("key('ArrowRight'); key('ArrowRight'); key('ArrowLeft')", ("0", "2", "false")),
        ("key('End'); key('ArrowRight')", ("0", "4", "false")),
        ("key('Home'); key('ArrowLeft')", ("0", "0", "false")),
        ("key(' ')", ("0", "1", "true")),
        ("key(' '); key(' ')", ("0", "1", "false")),
        ("key('ArrowRight', {ctrlKey: true})", ("0", "1", "false")),
        ("at('forth').click(); at('forth').click(); at('back').click()", ("0", "2", "false")),
        ("at('later').click(); at('later').click(); at('later').click()", ("2", "1", "false")),
        ("at('sample').value = 1; at('sample').dispatchEvent(new Event('change'))", ("1", "1", "false")),
        ("at('step').value = 3; at('step').dispatchEvent(new Event('input'))", ("0", "3", "false")),
        ("key('End'); at('play').click()", ("0", "0", "true")),
    ],
)
def test_keys_and_buttons(page, browse, tmp_path, actions, expected):
    script = (
        "<script>const at = (id) => document.getElementById(id);"
        "const key = (key, more) => document.body.dispatchEvent("
        f"new KeyboardEvent('keydown', {{key, bubbles: true, ...more}})); {actions}</script>"
    )
    path = tmp_path / "page.html"
    path.write_text(page.read_text().replace("</body>", script + "</body>"))
    state = Page(browse(path, "--dump-dom", fragment="#sample=0&step=1")).state
    assert (state["sample"], state["step"], state["playing"]) == expected


@pytest.mark.slow
def test_no_samples(browse, tmp_path):
    write_html(tmp_path / "page.html", [], heading="h", facts={})
    at = Page(browse(tmp_path / "page.html", "--dump-dom"))
    assert "hidden" not in at.attributes["none"] and "hidden" in at.attributes["replay"]


def requests(browse, path, tmp_path):
    """The addresses that a page asks the network for."""
    log = tmp_path / "net.json"
    browse(path, "--dump-dom", f"--log-net-log={log}", "--virtual-time-budget=15000")
    return asked_by_pages(log.read_text(encoding="utf-8"))


def asked_by_pages(log):
    """Leave out what Chromium asks for on its own, of updates and the like: its log says who asked."""
    lines = [line for line in log.splitlines() if '"initiator":"' in line and '"not an origin"' not in line]
    return set(re.findall(r'"url":"((?:https?|wss?)://[^"]*)"', "\n".join(lines)))


def test_what_the_browser_asks_for_is_not_the_pages():
    lines = [
        '{"params":{"initiator":"not an origin","url":"https://update.googleapis.com/service/update2/json"},"type":2},',
        '{"params":{"initiator":"null","url":"https://one.invalid/a"},"type":2},',
        '{"params":{"url":"https://update.googleapis.com/service/update2/json"},"type":101},',
    ]
    assert asked_by_pages("\n".join(lines)) == {"https://one.invalid/a"}


@pytest.mark.slow
def test_the_network_is_left_alone(page, browse, tmp_path):
    asking = tmp_path / "asking.html"
    asking.write_text('<img src="http://one.invalid/a.png"><script>fetch("https://two.invalid/b")</script>')
    assert requests(browse, asking, tmp_path) == {"http://one.invalid/a.png", "https://two.invalid/b"}
    assert requests(browse, page, tmp_path) == set()


@pytest.mark.slow
def test_many_long_samples_open_at_once(browse, tmp_path):
    """Only the chosen sample is in the document."""
    length = 1000
    events = tuple((i // 4, (i * 7) % length, f" {i % 97}") for i in range(length))
    traces = [Trace(f"sample {i}", (None,) * length, events, 250) for i in range(200)]
    write_html(tmp_path / "page.html", traces, heading="h", facts={})
    at = Page(browse(tmp_path / "page.html", "--dump-dom", fragment="#sample=199&step=100"))
    assert at.pieces() == traces[199].frame(100)


@pytest.mark.slow
@pytest.mark.parametrize("width", [400, 1280])
def test_it_can_be_seen(page, browse, tmp_path, width):
    """A picture comes out; that nothing is wider than the window is checked in the page."""
    picture = tmp_path / "page.png"
    browse(page, f"--screenshot={picture}", f"--window-size={width},900", fragment="#sample=2&step=3")
    assert picture.read_bytes().startswith(b"\x89PNG") and picture.stat().st_size > 5000
    frame = tmp_path / "frame.html"
    frame.write_text(
        f'<iframe style="border:0;width:{width}px;height:900px" src="{page.as_uri()}#sample=1&step=11" '
        'onload="const d = this.contentDocument.documentElement; document.title = d.scrollWidth"></iframe>'
    )
    dom = browse(frame, "--dump-dom", "--allow-file-access-from-files", "--window-size=1400,1000")
    assert f"<title>{width}</title>" in dom
