"""`llamafactory-cli webchat` and `webui` with a diffusion model, operated in a headless Chromium as a user does.

The pages without a browser are tested in tests/integration/webui.
"""

import itertools
import json
import queue
import re
import threading
from types import SimpleNamespace

import pytest

from llamafactory_ddm.serving.request import Progress
from support.browser import PATIENCE, browser_or_skip, web_pages
from support.chat import PAIR, run_keys, save_data, save_decoder
from support.limits import ANSWER
from support.warm import free_port
from support.web_chat import Engine, answer, chat_model

pytestmark = pytest.mark.slow
PROMPT, REPLY = "Tom saw a cat.", "It was red. <img src=x onerror=hacked=1>"
WRITTEN = REPLY.removeprefix("It ")  # which the model learns before the rest
ATTACK = "<script>hacked=1</script><img src=x onerror=hacked=1><b>bold</b>"
# Keeps every state of the canvas that the page has shown.
WATCH = """
window.canvases = [];
new MutationObserver(() => {
    const canvas = document.querySelector('.ddm-canvas');
    const step = document.querySelector('.ddm-step');
    const shown = canvas && [canvas.innerText, step ? step.innerText : '', canvas.innerHTML];
    if (shown && shown[2] !== (window.canvases.at(-1) || [])[2]) window.canvases.push(shown);
}).observe(document, {subtree: true, childList: true, characterData: true});
"""


@pytest.fixture(scope="module")
def work(tmp_path_factory):
    """A folder with a model that was finetuned to give one answer, and its data."""
    folder = tmp_path_factory.mktemp("web")
    save_decoder(folder / "model")
    save_data(folder / "data", one=([{"q": PROMPT, "a": REPLY}] * 16, PAIR))
    learn = {"learning_rate": 1e-2, "max_steps": 200, "per_device_train_batch_size": 8, "antithetic_time": True}
    keys = {"do_train": True, "model_name_or_path": folder / "model", "template": "qwen", "dataset": "one"}
    out = folder / "saves" / "Custom" / "full" / "chat"
    run_keys(out, dataset_dir=folder / "data", stage="ddm-sft", **{**learn, **keys, "cutoff_len": 192})
    return folder


@pytest.fixture(scope="module")
def browser():
    yield from browser_or_skip()


@pytest.fixture(scope="module")
def webchat(work):
    words = ("--model_name_or_path", "saves/Custom/full/chat", "--template", "qwen", "--finetuning_type", "full")
    with web_pages("webchat", *words, folder=work) as address:
        yield address


@pytest.fixture(scope="module")
def webui(work):
    with web_pages("webui", folder=work) as address:
        yield address


@pytest.fixture
def open_page(browser, tmp_path):
    """Return a function that opens a page; afterwards its picture is in the test's folder."""
    contexts = []

    def open_it(address):
        contexts.append(browser.new_context(viewport={"width": 1400, "height": 1000}))
        page = contexts[-1].new_page()
        page.set_default_timeout(PATIENCE)
        page.add_init_script(WATCH)
        page.goto(address, wait_until="commit")  # fonts on the web are never loaded
        return page

    yield open_it
    for number, context in enumerate(contexts):
        context.pages[0].screenshot(path=tmp_path / f"page{number}.png", full_page=True)
        context.close()


@pytest.fixture
def chat(open_page, webchat):
    """The page of `webchat`, ready."""
    page = open_page(webchat)
    page.get_by_role("button", name="Clear history").wait_for()
    page.get_by_label("Diffusion steps").first.wait_for()
    return page


def ask(page, text, *, answers=1):
    """Send a message, wait for the answer, and return its text, which may be empty; `answers` are on the page then."""
    page.get_by_placeholder("Input...").fill(text)
    page.get_by_role("button", name="Submit").click()
    page.wait_for_function(
        """n => {
            const answers = document.querySelectorAll('.bot.message');
            const isThere = answers.length == n && answers[n - 1].innerText.trim() != 'Loading content';
            return isThere && !document.querySelector('.ddm-canvas');
        }""",
        arg=answers,
    )
    return page.locator(".bot.message").last.inner_text().strip()


def set_number(page, label, value):
    field = page.get_by_label(f"number input for {label}")
    field.fill(str(value))
    field.press("Enter")


def choose(page, label, value):
    box = page.get_by_label(label, exact=True).first
    box.click()
    box.fill(value)
    page.get_by_role("option", name=value, exact=True).click()


def is_hacked(page):
    page.wait_for_timeout(300)  # an image that fails to load runs its handler later
    return page.evaluate("'hacked' in window")


def test_an_answer_is_seen_while_it_is_denoised(chat):
    chat.get_by_label("Temperature").first.wait_for()
    set_number(chat, "Temperature", 0)
    set_number(chat, "Diffusion steps", 192)
    choose(chat, "Denoising strategy", "low_confidence")
    assert WRITTEN in ask(chat, PROMPT)
    shown = chat.evaluate("window.canvases")
    masks = [text.count("░") for text, _, _ in shown]
    assert masks == sorted(masks, reverse=True)  # how many a slow browser shows is its own affair
    steps = [int(re.search(r"step (\d+): \d+ of \d+ tokens", caption)[1]) for _, caption, _ in shown]
    assert steps == sorted(steps) and all(step <= 192 for step in steps)
    assert not any("<img" in source for _, _, source in shown) and not is_hacked(chat)


def test_colours_are_those_of_the_style_sheet(chat):
    ask(chat, PROMPT)
    colours = chat.evaluate(
        """() => ['ddm-age0', 'ddm-age7', 'ddm-fresh'].map(name => {
            const span = document.body.appendChild(document.createElement('span'));
            span.className = name;
            return getComputedStyle(span).color;
        })"""
    )
    assert len(set(colours)) == 3


@pytest.mark.parametrize("is_escaped", [True, False])
def test_html_of_a_message_or_an_answer_never_runs(chat, is_escaped):
    chat.get_by_label("Escape HTML tags").set_checked(is_escaped)
    ask(chat, ATTACK)
    ask(chat, PROMPT, answers=2)
    assert not is_hacked(chat)
    assert chat.locator(".user.message b, .bot.message b").count() == (0 if is_escaped else 1)


def test_fields_of_denoising_reach_the_sampler(chat):
    set_number(chat, "Diffusion steps", 24)
    ask(chat, PROMPT)
    captions = [caption for _, caption, _ in chat.evaluate("window.canvases")]
    assert all(int(re.search(r"step (\d+)", caption)[1]) <= 24 for caption in captions)
    threshold = chat.get_by_label("number input for Confidence threshold")
    assert threshold.is_visible()
    choose(chat, "Denoising strategy", "low_confidence")
    threshold.wait_for(state="hidden")
    chat.get_by_role("textbox", name="Seed").fill("seven")
    assert "seed" in ask(chat, PROMPT, answers=2) and "seven" in chat.locator(".bot.message").last.inner_text()
    chat.get_by_role("textbox", name="Seed").fill("7")
    assert not ask(chat, PROMPT, answers=3).startswith("⚠️")


def test_an_error_is_in_the_page_and_the_chat_goes_on(chat):
    set_number(chat, "Temperature", 0)
    assert ask(chat, "word " * 500).startswith("⚠️")
    assert WRITTEN in ask(chat, PROMPT, answers=2)
    chat.get_by_role("button", name="Clear history").click()
    chat.wait_for_function("!document.querySelector('.bot.message')")
    assert WRITTEN in ask(chat, PROMPT)


def test_system_prompt_tools_and_earlier_turns_are_taken(chat):
    tools = [{"name": "look", "description": "Looks.", "parameters": {"type": "object", "properties": {}}}]
    chat.get_by_placeholder("System prompt (optional)").fill("Be kind.")
    for answers in (1, 2):
        assert not ask(chat, PROMPT, answers=answers).startswith("⚠️")
    chat.get_by_placeholder("Tools (optional)").fill(json.dumps(tools))
    # The text of the tools alone is longer than this model's canvas.
    assert ask(chat, PROMPT, answers=3).startswith("⚠️")


def test_the_page_speaks_chinese(chat):
    choose(chat, "Language", "zh")
    chat.get_by_label("number input for 去噪步数").wait_for()
    chat.get_by_placeholder("输入...").wait_for()
    choose(chat, "语言", "en")  # the folder keeps it for the next page
    chat.get_by_placeholder("Input...").wait_for()


def test_two_pages_are_answered_at_once(open_page, webchat):
    pages = [open_page(webchat) for _ in range(2)]
    for page in pages:
        page.get_by_label("Diffusion steps").first.wait_for()
        set_number(page, "Diffusion steps", 192)
        page.get_by_placeholder("Input...").fill(PROMPT)
    for page in pages:
        page.get_by_role("button", name="Submit").click()
    for page in pages:
        page.wait_for_function("document.querySelector('.bot.message') && !document.querySelector('.ddm-canvas')")


@pytest.fixture
def board(open_page, webui):
    """LlamaBoard with the base model, and no checkpoint, chosen."""
    from playwright.sync_api import expect

    page = open_page(webui)
    page.get_by_role("button", name="Preview command").first.wait_for()
    page.get_by_label("Model name").wait_for()
    # Choosing a model fills its path in, a while later. It must not overwrite the path that is typed below.
    # A choice that is made while the page is still loading may be lost, so it is made again.
    page_is_loaded = page.get_by_label("Output dir").locator("visible=true").first
    expect(page_is_loaded).to_have_value(re.compile("^train_"), timeout=PATIENCE)
    for is_last in (False, False, True):
        choose(page, "Model name", "GPT-2-Small")
        try:
            expect(page.get_by_label("Model path")).to_have_value(re.compile("gpt2"), timeout=PATIENCE / 3)
            break
        except AssertionError:
            if is_last:
                raise
            choose(page, "Model name", "Custom")
    choose(page, "Model name", "Custom")
    expect(page.get_by_label("Model path")).not_to_have_value(re.compile("gpt2"), timeout=PATIENCE)
    page.get_by_label("Model path").fill("saves/Custom/full/chat")
    page.get_by_label("Model path").blur()
    choose(page, "Finetuning method", "full")
    choose(page, "Chat template", "qwen")
    return page


def test_the_chat_tab_recognises_a_diffusion_model(board):
    board.get_by_role("tab", name="Chat").click()
    board.get_by_role("button", name="Load model", exact=True).click()
    board.get_by_label("Diffusion steps").locator("visible=true").first.wait_for()
    ask(board, PROMPT)  # whether a browser shows a canvas before the answer depends on its speed
    board.get_by_role("button", name="Unload model").click()
    board.get_by_placeholder("Input...").wait_for(state="hidden")


def output_of(page):
    return page.locator("code, .prose").locator("visible=true").all_inner_texts()


def test_predictions_are_generated_by_our_sampler(board, work):
    board.get_by_role("tab", name="Evaluate & Predict").click()
    dataset = board.get_by_label("Dataset").locator("visible=true").first
    dataset.fill("one")
    dataset.press("Enter")
    board.get_by_label("Max samples").locator("visible=true").fill("2")
    board.get_by_label("Output dir").locator("visible=true").fill("predicted")
    board.get_by_role("button", name="Denoising (diffusion models)").click()
    field = board.get_by_label("number input for Diffusion steps").locator("visible=true")
    field.fill("16")
    field.press("Enter")
    board.get_by_role("button", name="Preview command").locator("visible=true").click()
    command = board.locator("code").locator("visible=true").first
    command.wait_for()
    assert "--stage ddm-sft" in command.inner_text() and "--diffusion_steps 16" in command.inner_text()
    board.get_by_role("button", name="Start").locator("visible=true").click()
    board.get_by_text("predict_tokens_per_forward").locator("visible=true").first.wait_for()
    lines = (work / "saves/Custom/full/predicted/generated_predictions.jsonl").read_text().splitlines()
    assert len(lines) == 2 and all("red" in json.loads(line)["predict"] for line in lines)


def test_keys_of_the_training_tab_are_trained_with(board, work):
    choose(board, "Stage", "Diffusion Finetuning")
    dataset = board.get_by_label("Dataset").locator("visible=true").first
    dataset.fill("one")
    dataset.press("Enter")
    choose(board, "Compute type", "fp32")
    board.get_by_label("Output dir").locator("visible=true").first.fill("trained")
    board.get_by_label("Output dir").locator("visible=true").first.press("Enter")
    board.get_by_role("button", name="Diffusion configurations").click()
    choose(board, "Attention", "block")
    board.get_by_label("Train block length").fill("8")
    board.get_by_role("button", name="Extra configurations").click()
    keys = {"max_steps": 2, "use_cpu": True, "cutoff_len": 96, "optim": "adamw_torch"}
    board.get_by_label("Extra arguments").locator("visible=true").fill(json.dumps(keys))
    board.get_by_role("button", name="Start").locator("visible=true").click()
    board.get_by_text("Finished.").locator("visible=true").first.wait_for()
    config = json.loads((work / "saves/Custom/full/trained/diffusion_config.json").read_text())
    assert (config["attention"], config["train_block_length"]) == ("block", 8)


@pytest.fixture
def scripted(browser, monkeypatch, tmp_path):
    """A page of `webchat` before a server that sends what the test puts into `events`, and nothing else."""
    from llamafactory.webui import interface

    monkeypatch.chdir(tmp_path)
    engine, events, is_cancelled = Engine(), queue.SimpleQueue(), threading.Event()

    def submit(request, on_event):
        def send():
            while (event := events.get()) is not None:
                on_event(event)

        threading.Thread(target=send, daemon=True).start()
        return SimpleNamespace(cancel=is_cancelled.set)

    engine.server.submit = submit
    model = chat_model(engine)
    monkeypatch.setattr("llamafactory.webui.engine.WebChatModel", lambda *args, **kwargs: model)
    blocks = interface.create_web_demo().queue()
    _, address, _ = blocks.launch(
        server_name="127.0.0.1", server_port=free_port(), prevent_thread_lock=True, quiet=True
    )
    page = browser.new_page()
    page.set_default_timeout(PATIENCE)
    try:
        page.goto(address, wait_until="commit")
        page.get_by_placeholder("Input...").fill("Hi")
        page.get_by_role("button", name="Submit").click()
        yield SimpleNamespace(page=page, events=events, is_cancelled=is_cancelled)
    finally:
        events.put(None)
        page.close()
        blocks.close()


def test_each_step_of_an_answer_is_seen(scripted):
    """Step by step: positions appear in place, and their colours follow the step at which they appeared."""
    page, events = scripted.page, scripted.events
    canvas = ["<b>", None, None, " the", None]
    for step, position in enumerate((None, 1, 4, 2)):
        if position is not None:
            canvas[position] = f" w{position}"
        events.put(Progress(0, step, "", tuple(canvas)))
        page.wait_for_function(
            "text => (document.querySelector('.ddm-canvas') || {}).innerText == text",
            arg="".join("░" if piece is None else piece for piece in canvas),
        )
        source = page.locator(".ddm-canvas").inner_html()
        assert ("ddm-mask" in source) == (None in canvas) and "ddm-fresh" in source
        assert ("ddm-age" in source) == (step > 0)
    events.put(Progress(0, 4, "<b> w1 w2 the w4"))
    for event in answer("<b> w1 w2 the w4", already="<b> w1 w2 the w4"):
        events.put(event)
    page.locator(".ddm-canvas").wait_for(state="detached")
    assert page.locator(".bot.message").last.inner_text().strip() == "<b> w1 w2 the w4"


def test_a_page_that_is_closed_frees_its_place(scripted):
    """The server here never ends; it is told to cancel once the page is gone."""
    is_over = threading.Event()

    def write():
        for step in itertools.count():
            if is_over.wait(0.02):
                return
            scripted.events.put(Progress(0, step, "", (str(step), None)))

    threading.Thread(target=write, daemon=True).start()
    try:
        scripted.page.locator(".ddm-canvas").wait_for()
        assert not scripted.is_cancelled.is_set()
        scripted.page.close()
        assert scripted.is_cancelled.wait(ANSWER)
    finally:
        is_over.set()
