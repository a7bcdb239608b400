"""The web chat with a scripted server: what the page shows while a text is denoised, at its end and after an error."""

import inspect
import threading
from types import SimpleNamespace

import pytest

from llamafactory_ddm.integration.webui.chatter import is_diffusion
from llamafactory_ddm.integration.webui.fields import CHAT_KEYS, PREFIX, UNSET
from llamafactory_ddm.integration.webui.live_canvas import BLANK
from llamafactory_ddm.integration.webui.pages import CHANGING, MAX_CHATS, chat_changes
from llamafactory_ddm.integration.webui.texts import CHAT_TAB
from llamafactory_ddm.serving.request import Failure, Progress
from support.web_chat import Engine, answer, chat_model

gr = pytest.importorskip("gradio")
pytestmark = pytest.mark.usefixtures("patched_pages")
QUESTION = [{"role": "user", "content": "Hi"}]


def fields_of_upstream(lang="en", system="", tools="", escape=True, thinking=True):
    """Return the values of upstream's fields in the order of its parameters; 0.9.6 adds a seed."""
    from llamafactory.webui.engine import WebChatModel

    values = {
        "lang": lang,
        "system": system,
        "tools": tools,
        "max_new_tokens": 40,
        "top_p": 0.9,
        "temperature": 0.6,
        "skip_special_tokens": True,
        "escape_html": escape,
        "enable_thinking": thinking,
    }
    _self, _chatbot, _messages, *names = inspect.signature(WebChatModel.__mro__[1].stream).parameters
    return [values.get(name) for name in names]


def stream(engine, *ours, messages=QUESTION, **fields):
    """Return the pages of one answer: copies of the shown messages, and of those that the model gets."""
    chat, upstream = chat_model(engine), fields_of_upstream(**fields)
    shown = [dict(message) for message in messages]
    pages = chat.stream(shown, list(messages), *upstream, *ours)
    return [([dict(message) for message in page], list(history)) for page, history in pages]


def test_the_canvas_stands_where_the_answer_will_be():
    steps = [Progress(0, 0, "", (None, "B", None)), Progress(0, 1, "AB", ("A", "B", None))]
    pages = stream(Engine(*steps, *answer("ABC", already="AB")))
    canvases = [page[-1]["content"] for page, _ in pages[:-1]]
    assert canvases and all('class="ddm-canvas"' in html for html in canvases)
    assert pages[-1] == (
        [*QUESTION, {"role": "assistant", "content": "ABC"}],
        [*QUESTION, {"role": "assistant", "content": "ABC"}],
    )
    assert all(history == QUESTION for _, history in pages[:-1])


def test_each_change_is_shown_when_events_are_slow():
    engine, events = Engine(), [Progress(0, n, "a" * (n > 0), ("a",) * n + (None,) * (3 - n)) for n in range(4)]

    def submit(request, on_event):
        def work():
            for event in (*events, answer("aaa")[1]):
                seen.wait()
                seen.clear()
                on_event(event)

        threading.Thread(target=work, daemon=True).start()
        return SimpleNamespace(cancel=lambda: None)

    seen = threading.Event()
    seen.set()
    engine.server.submit = submit
    chat, contents = chat_model(engine), []
    for page, _ in chat.stream([*QUESTION], [*QUESTION], *fields_of_upstream()):
        contents.append(page[-1]["content"])
        seen.set()
    assert [content.count(BLANK) for content in contents] == [3, 2, 1, 0, 0]
    assert contents[-1] == "aaa" and "step 4" in contents[-2]


def test_nothing_of_model_or_error_is_html():
    attack = "<img src=x onerror=alert(1)>"
    pages = stream(Engine(Progress(0, 0, "", (attack, None)), *answer(attack)))
    pages += stream(Engine(error=ValueError(attack)))
    assert len(pages) > 2 and all("<img" not in page[-1]["content"] for page, _ in pages)


@pytest.mark.parametrize(
    "error", [ValueError("prompt: too long"), RuntimeError("a bug")], ids=lambda e: type(e).__name__
)
def test_an_error_is_shown_and_the_question_forgotten(error):
    for engine in (Engine(error=error), Engine(Progress(0, 0, "A", ("A", None)), Failure(error))):
        *_, (page, history) = stream(
            engine, messages=[*QUESTION, {"role": "assistant", "content": "Hello"}, *QUESTION]
        )
        assert [message["role"] for message in page] == ["user", "assistant"] * 2
        assert str(error).replace(":", "&#58;") in page[-1]["content"] and "ddm-canvas" not in page[-1]["content"]
        assert history == [*QUESTION, {"role": "assistant", "content": "Hello"}]


@pytest.mark.parametrize("n_before", [0, 1, 2])
def test_a_template_of_one_question_gets_the_last_message_and_the_page_says_so_once(n_before, monkeypatch):
    from llamafactory.data.template import TEMPLATES

    from llamafactory_ddm.integration.data.templates import register_templates

    register_templates()
    notes = []
    monkeypatch.setattr(gr, "Info", notes.append)
    engine = Engine(*answer("A"))
    engine.template = TEMPLATES["diffullama"]
    before = [{"role": "user", "content": "Ho"}, {"role": "assistant", "content": "Hello"}] * n_before
    *_, (page, history) = stream(engine, messages=[*before, *QUESTION])
    assert [prepared["messages"] for prepared in engine.prepared] == [QUESTION]
    assert len(page) == len(history) == len(before) + 2
    assert len(notes) == (n_before == 1)


def test_the_fields_of_the_page_are_keys_of_the_request():
    engine = Engine(*answer("A"))
    values = {"chat_steps": 16, "denoising_strategy": "random", "confidence_threshold": 0.5, "seed": "3"}
    stream(engine, *({"block_length": "", "kv_cache": UNSET, **values}[name] for name in CHAT_KEYS), system="Be kind.")
    assert engine.prepared == [
        {
            "messages": QUESTION,
            "system": "Be kind.",
            "tools": None,
            "max_new_tokens": 40,
            "top_p": 0.9,
            "temperature": 0.6,
            "diffusion_steps": 16,
            "denoising_strategy": "random",
            "seed": 3,
        }
    ]
    assert engine.server.requests[0].shows_canvas


@pytest.mark.parametrize(("theirs", "ours", "expected"), [(None, "", None), (5, "", 5), (None, "3", 3), (5, "3", 3)])
def test_a_seed_of_upstreams_page_counts_unless_ours_is_set(monkeypatch, theirs, ours, expected):
    """Upstream's page has a seed from 0.9.6 on, and passes None for a random seed."""
    from llamafactory.webui.engine import WebChatModel

    original = WebChatModel.__mro__[1]
    names = [name for name in inspect.signature(original.stream).parameters if name not in ("self", "lang")]

    def stream_with_seed(self, chatbot, messages, lang, seed):
        arguments = dict.fromkeys(names) | {"chatbot": chatbot, "messages": messages, "lang": lang}
        chat = SimpleNamespace(
            engine=self.engine, stream_chat=lambda *args, **keys: self.stream_chat(*args, **{**keys, "seed": seed})
        )
        yield from upstream_stream(chat, **arguments)

    upstream_stream = original.stream
    monkeypatch.setattr(original, "stream", stream_with_seed)
    engine = Engine(*answer("A"))
    values = dict.fromkeys(CHAT_KEYS, "") | {"seed": ours, "chat_steps": 16, "denoising_strategy": "random"}
    pages = chat_model(engine).stream([*QUESTION], [*QUESTION], "en", theirs, *values.values())
    *_, (page, _) = pages
    assert page[-1]["content"] == "A"
    assert engine.prepared[0]["seed"] == expected


@pytest.mark.parametrize("thinking", [True, False])
def test_the_switch_of_thinking_reaches_the_template(thinking):
    engine = Engine(*answer("<think>\nWhy?\n</think>\nSo."))
    *_, (page, _) = stream(engine, thinking=thinking)
    assert engine.thinks is thinking
    assert "thinking-container" in page[-1]["content"] and page[-1]["content"].endswith("So.")


def test_a_call_of_a_tool_is_shown_as_upstream_shows_it():
    engine = Engine(Progress(0, 0, "", ("x", None)), *answer("call"))
    call = SimpleNamespace(name="look", arguments='{"at": "moon"}')
    engine.template.extract_tool = lambda text: [call] if text == "call" else text
    *_, (page, history) = stream(engine, tools='[{"name": "look"}]')
    assert history[-1]["role"] == "function" and '"look"' in history[-1]["content"]
    assert page[-1]["content"].startswith("```json")


def test_a_page_that_is_closed_cancels_its_request():
    engine = Engine(Progress(0, 0, "", ("A", None)), *(Progress(0, n, "", ("A", None)) for n in range(1, 3)))
    chat = chat_model(engine)
    pages = chat.stream([*QUESTION], [*QUESTION], *fields_of_upstream())
    next(pages)
    assert not engine.server.cancelled
    pages.close()
    assert engine.server.cancelled == 1


def test_other_models_are_served_as_before():
    from llamafactory.webui import interface

    other = SimpleNamespace(template=SimpleNamespace(enable_thinking=None, thought_words=("<think>", "</think>")))
    chat = chat_model(other)
    chat.stream_chat = lambda messages, *args, **keywords: iter(["A", "B"])
    ours = [16, "random", 0.9, "", UNSET, ""]
    pages = chat.stream([*QUESTION], [*QUESTION], *fields_of_upstream(), *ours)
    contents = [page[-1]["content"] for page, _ in pages]
    assert contents == ["A", "AB"] and not is_diffusion(other) and not is_diffusion(None)
    assert interface.Engine is not None


def test_refused_arguments_are_shown_and_unloading_ends_the_server(monkeypatch):
    data = {
        "top.lang": "en",
        "top.model_name": "Custom",
        "top.model_path": "nowhere",
        "top.finetuning_type": "full",
        "top.checkpoint_path": None,
        "top.template": "default",
        "top.rope_scaling": "none",
        "top.booster": "auto",
        "top.quantization_bit": "none",
        "infer.infer_backend": "vllm",
        "infer.infer_dtype": "auto",
        "infer.extra_args": '{"stage": "ddm-sft"}',
    }
    warned = []
    monkeypatch.setattr(gr, "Warning", warned.append)
    chat = chat_model(None)
    *_, text = chat.load_model(data)
    assert text.startswith("infer_backend: vllm") and len(warned) == 1
    engine = chat.engine = Engine()
    list(chat.unload_model(data))
    assert chat.engine is None and engine.is_closed


def test_the_box_starts_at_the_models_own_values():
    changes = chat_changes(Engine())
    ours = [changes[f"{PREFIX}{name}"]["value"] for name in CHAT_KEYS]
    assert ours == [0, "confidence_threshold", 0.7, "8", UNSET, ""]
    yaml = Engine()
    yaml.served.chosen = {"diffusion_steps"}
    assert chat_changes(yaml)[f"{PREFIX}chat_steps"] == {"value": 32}
    assert changes["max_new_tokens"] == {"minimum": 1, "maximum": 48, "value": 48}
    assert changes["top_p"] == {"value": 0.8} and changes["temperature"] == {"minimum": 0, "value": 0.5}
    shown = {name: change["visible"] for name, change in changes.items() if "visible" in change}
    threshold = f"{PREFIX}confidence_threshold"
    assert shown == {CHAT_TAB: True, threshold: True, "skip_special_tokens": False, "mm_box": False}
    others = chat_changes(None)
    assert tuple(others) == tuple(changes) == CHANGING and others[CHAT_TAB] == {"visible": False}


def test_several_pages_of_a_served_model_are_answered_at_once(tmp_path, monkeypatch):
    from llamafactory.webui import interface

    monkeypatch.chdir(tmp_path)

    chat = chat_model(Engine())
    monkeypatch.setattr("llamafactory.webui.engine.WebChatModel", lambda *args, **kwargs: chat)
    blocks = interface.create_web_demo()
    events = blocks.fns.values()
    (event,) = [event for event in events if getattr(event.fn, "__name__", "") == "stream"]
    assert event.concurrency_limit == MAX_CHATS
    names = list(inspect.signature(type(chat).__mro__[1].stream).parameters)[1:]  # upstream's, without self
    sent = dict(zip(names, event.inputs, strict=False))
    assert len(event.inputs) == len(names) + len(CHAT_KEYS)
    ours = event.inputs[-len(CHAT_KEYS) :]
    assert [field.value for field in ours] == [0, "confidence_threshold", 0.7, "8", UNSET, ""]
    assert all(field.visible for field in ours)
    temperature = sent["temperature"]
    assert temperature.minimum == type(temperature)(**temperature.constructor_args).minimum == 0
