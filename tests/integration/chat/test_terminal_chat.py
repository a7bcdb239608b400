"""Chat in the terminal: what it shows on a terminal and in a pipe, its commands, errors and Ctrl-C."""

import io
import re
import threading
from types import SimpleNamespace

import pytest

from llamafactory_ddm import load
from llamafactory_ddm.generation.trace import BLANK
from llamafactory_ddm.integration.chat.terminal import TerminalChat
from llamafactory_ddm.integration.data.templates import DiffuLlamaTemplate
from llamafactory_ddm.sampling import LogitsConfig, SamplingSettings
from llamafactory_ddm.serving import Limits, Request, Server
from support.screen import Screen
from support.tiny import save_model


@pytest.fixture(scope="module")
def generator(tmp_path_factory):
    return load(save_model(tmp_path_factory.mktemp("chat") / "model", positions=160))


def all_but(generator, characters):
    """Return the tokens whose spelling holds other characters."""
    vocabulary = generator.tokenizer.get_vocab()
    return tuple(i for piece, i in vocabulary.items() if not re.fullmatch(f"[{characters}]+", piece))


class Engine:
    """What `TerminalChat` uses of an engine, with a template of lines."""

    def __init__(self, generator, n_tokens=12, limits=None, template=None, **settings):
        self.generator, self.tokenizer, self.template = generator, generator.tokenizer, template
        self.server = Server(generator, limits or Limits())
        logits = LogitsConfig(0.0, suppress=all_but(generator, "a-z"))
        self.settings = SamplingSettings(**{"logits": logits, "diffusion_steps": 4, **settings})
        self.n_tokens = n_tokens
        self.asked = []

    def close(self):
        self.server.close(drain=False)

    def prepare(self, messages):
        self.asked.append([dict(message) for message in messages])
        prompt = "".join(f"{message['content']}\n" for message in messages)
        return Request(self.generator.from_prompt(prompt, self.n_tokens), self.settings)

    def expected(self, *messages):
        """Return the answer that the generator itself gives."""
        prompt = "".join(f"{message}\n" for message in messages)
        canvas = self.generator.from_prompt(prompt, self.n_tokens)
        (made,) = self.generator.sample_batch([canvas], self.settings, sample_indices=[0])
        return made.predict


@pytest.fixture
def chat(generator, monkeypatch):
    """Return a function that chats over the given lines; an exception in place of a line is raised."""

    def run(lines, stream, **keys):
        engine = Engine(generator, **keys)
        given = iter([*lines, EOFError()])

        def read(prompt):
            stream.write(prompt)
            line = next(given)
            if isinstance(line, BaseException):
                raise line
            stream.write(f"{line}\n")
            return line

        monkeypatch.setattr("builtins.input", read)
        TerminalChat(engine, stream).run()
        assert not any(thread.name == "denoising" for thread in threading.enumerate())
        return engine

    return run


@pytest.fixture
def screen(monkeypatch):
    """Return a function that makes a terminal of a given size."""
    for name in ("NO_COLOR", "FORCE_COLOR", "TTY_COMPATIBLE", "COLORTERM"):
        monkeypatch.delenv(name, raising=False)

    def make(columns=60, lines=20, term="xterm"):
        monkeypatch.setenv("TERM", term)
        monkeypatch.setenv("COLUMNS", str(columns))
        monkeypatch.setenv("LINES", str(lines))
        return Screen()

    return make


def answers(text):
    return re.findall(r"^Assistant: (.*)$", text, re.M)


def test_a_pipe_gets_the_answers_as_they_are(chat):
    stream = io.StringIO()
    engine = chat(["cat", "", "dog"], stream)
    first = engine.expected("cat")
    assert answers(stream.getvalue()) == [first, engine.expected("cat", first, "dog")]
    assert "\x1b" not in stream.getvalue() and len(engine.asked) == 2
    assert engine.asked[1] == [
        {"role": "user", "content": "cat"},
        {"role": "assistant", "content": first},
        {"role": "user", "content": "dog"},
    ]


def test_a_pipe_gets_the_text_before_the_answer_is_finished(chat):
    pieces = []

    class Stream(io.StringIO):
        def write(self, text):
            pieces.append(text)
            return super().write(text)

    engine = chat(["cat"], Stream(), block_length=4)
    text = pieces[pieces.index("Assistant: ") + 1 : -3]
    assert (
        "".join(text).rstrip("\n") == engine.expected("cat") and len([piece for piece in text if piece.strip()]) >= 3
    )


def test_a_terminal_shows_the_denoising(chat, screen):
    stream = screen()
    engine = chat(["cat"], stream)
    drawn = stream.getvalue()
    assert "step 0/4" in drawn and "step 4/4" in drawn
    assert f"Assistant: {3 * BLANK}" in re.sub(r"\x1b\[[0-9;]*m", "", drawn)
    assert "\x1b[1;32m" in drawn
    assert f"Assistant: {engine.expected('cat')}" in stream.lines() and stream.has_cursor
    assert not any(line.startswith("step ") or BLANK in line[:11] for line in stream.lines())


@pytest.mark.parametrize(("name", "value"), [("NO_COLOR", "1"), ("TERM", "dumb")])
def test_a_terminal_may_refuse_colours_or_all(chat, screen, monkeypatch, name, value):
    stream = screen()
    monkeypatch.setenv(name, value)
    engine = chat(["cat"], stream)
    assert "32m" not in stream.getvalue() and ("\x1b" in stream.getvalue()) == (name == "NO_COLOR")
    assert f"Assistant: {engine.expected('cat')}" in stream.lines()


def test_a_long_answer_scrolls_and_is_printed_whole(chat, screen):
    stream = screen(columns=30, lines=5)
    engine = chat(["cat"], stream, n_tokens=140, diffusion_steps=8)
    assert re.search(r"lines \d+-\d+ of \d+", stream.getvalue())
    shown = "".join(stream.lines())
    assert engine.expected("cat").replace(" ", "") in shown.replace(" ", "")


def test_a_terminal_may_be_resized_during_an_answer(chat, screen, monkeypatch):
    stream = screen(columns=60)

    def resize(text, write=stream.write):
        if "step 2/" in text:
            monkeypatch.setenv("COLUMNS", "16")
        return write(text)

    stream.write = resize
    engine = chat(["cat"], stream, n_tokens=40)
    shown = "".join(stream.lines()).replace(" ", "")
    assert engine.expected("cat").replace(" ", "") in shown


def test_commands_and_blank_lines(chat):
    stream = io.StringIO()
    engine = chat(["cat", "clear", "  ", "dog", " exit ", "never"], stream)
    assert [len(messages) for messages in engine.asked] == [1, 1]
    assert engine.asked[1][0]["content"] == "dog"


def test_a_template_of_one_turn_keeps_no_history(chat):
    stream = io.StringIO()
    engine = chat(["cat", "dog"], stream, template=object.__new__(DiffuLlamaTemplate))
    assert [[message["content"] for message in messages] for messages in engine.asked] == [["cat"], ["dog"]]
    assert answers(stream.getvalue()) == [engine.expected("cat"), engine.expected("dog")]


def test_an_error_is_one_line_and_leaves_the_history(chat):
    stream = io.StringIO()
    engine = chat(["cat", "dog" * 200, "dog"], stream)
    assert len(re.findall(r"^error: .*positions", stream.getvalue(), re.M)) == 1
    assert [message["content"] for message in engine.asked[2]] == ["cat", engine.expected("cat"), "dog"]
    assert len(answers(stream.getvalue())) == 2


def test_a_request_that_fails_on_its_way_is_reported_too(chat, generator, monkeypatch):
    def fail(*args, **kwargs):
        raise MemoryError("no memory\nleft")

    stream = io.StringIO()
    monkeypatch.setattr(generator.model, "forward", fail)
    engine = chat(["cat", "dog"], stream)
    assert stream.getvalue().count("error: MemoryError: no memory left\n") == 2
    assert [len(messages) for messages in engine.asked] == [1, 1]


@pytest.mark.parametrize("is_terminal", [True, False])
def test_ctrl_c_cancels_the_answer_but_not_the_chat(chat, generator, screen, monkeypatch, is_terminal):
    stream = screen() if is_terminal else io.StringIO()
    interrupted, forward = threading.Event(), generator.model.forward

    def wait(*args, **kwargs):
        assert interrupted.wait(60)
        return forward(*args, **kwargs)

    def interrupt(text, write=stream.write):
        written = write(text)
        if not interrupted.is_set() and ("step " in text if is_terminal else text == "Assistant: "):
            interrupted.set()
            raise KeyboardInterrupt
        return written

    stream.write = interrupt
    monkeypatch.setattr(generator.model, "forward", wait)
    engine = chat(["cat", "dog"], stream, limits=Limits(max_rows=1), n_tokens=140, diffusion_steps=140)
    assert engine.server.stats.cancelled == 1 and engine.server.stats.answered == 1
    assert [message["content"] for message in engine.asked[1]] == ["dog"]
    assert "cancelled" in stream.getvalue()
    if is_terminal:
        assert stream.has_cursor and BLANK in "".join(stream.lines())


def test_ctrl_c_at_the_prompt_ends_the_chat_the_second_time(chat):
    stream = io.StringIO()
    engine = chat([KeyboardInterrupt(), "cat", KeyboardInterrupt(), KeyboardInterrupt(), "dog"], stream)
    assert len(engine.asked) == 1


def test_bytes_that_are_no_text_are_asked_for_again(chat):
    stream = io.StringIO()
    engine = chat([UnicodeDecodeError("utf-8", b"\xff", 0, 1, "x"), "cat"], stream)
    assert len(engine.asked) == 1 and "UTF-8" in stream.getvalue()


def test_what_follows_eos_is_not_drawn(chat, screen):
    stream = screen()
    logits = LogitsConfig(0.0, eos_penalty=-1000.0)
    engine = chat(["cat"], stream, logits=logits)
    assert engine.expected("cat") == "" and "<|endoftext|>" not in stream.getvalue()


def test_control_characters_of_an_answer_reach_a_pipe_alone(chat, generator, screen):
    # Ġ and what follows it stand for the bytes that are no visible characters; ě for the escape byte.
    logits = LogitsConfig(0.0, suppress=all_but(generator, "\u011b"))
    for stream in (screen(), io.StringIO()):
        engine = chat(["cat"], stream, logits=logits)
        assert engine.expected("cat") == 12 * "\x1b"
        assert (12 * "\x1b" in stream.getvalue()) == (not stream.isatty())


def test_a_stream_that_fails_ends_the_server(generator):
    engine = Engine(generator)
    stream = SimpleNamespace(write=lambda text: 1 / 0, isatty=lambda: False, flush=lambda: None)
    with pytest.raises(ZeroDivisionError):
        TerminalChat(engine, stream).run()
    assert not any(thread.name == "denoising" for thread in threading.enumerate())
