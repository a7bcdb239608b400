"""`llamafactory-cli chat` with a diffusion model, as a user runs it: in a terminal and in a pipe."""

import fcntl
import os
import pty
import re
import select
import struct
import termios
import time

import pytest

from support.cli import run, start
from support.limits import ANSWER, LIMIT

QUESTION = "Sam has 3 eggs. He gets 2 more. How many eggs does he have?"
SMALL = ("--cutoff_len", "64", "--diffusion_steps", "8", "--logits_temp", "0")


class Terminal:
    """A program in a pseudo-terminal of its own."""

    def __init__(self, *words, **env):
        self.written = ""
        self._fd, inner = pty.openpty()
        self.resize(60, 20)
        # They would fix the size, and whatever runs the tests may have set them.
        unset = dict.fromkeys(("COLUMNS", "LINES"))
        own = os.ttyname(inner)
        self.process = start(*words, env={**unset, "TERM": "xterm-256color", **env}, stdin=own, stdout=own)
        self._inner = inner  # kept open: else reading fails until the program opens the terminal

    def resize(self, columns, lines):
        fcntl.ioctl(self._fd, termios.TIOCSWINSZ, struct.pack("HHHH", lines, columns, 0, 0))

    def send(self, text):
        """Type a text, and forget what was written before."""
        self.written = ""
        os.write(self._fd, text.encode())

    def wait_for(self, pattern, limit=ANSWER):
        """Read until a pattern is found in what was written since the last `send`, and return all of that."""
        end = time.monotonic() + limit
        while not re.search(pattern, self.written):
            assert select.select([self._fd], [], [], max(0, end - time.monotonic()))[0], self.written[-2000:]
            try:
                self.written += os.read(self._fd, 65536).decode(errors="replace")
            except OSError:  # the program is over
                raise AssertionError(self.written[-2000:]) from None
        return self.written

    def __enter__(self):
        return self

    def __exit__(self, kind, *_):
        """Wait until the program has ended by itself, with status 0; kill it after an error."""
        try:
            if kind is None:
                assert self.process.wait(ANSWER) == 0, self.written[-2000:]
        finally:
            self.process.kill()
            os.close(self._inner)
            os.close(self._fd)


@pytest.mark.slow
def test_an_answer_in_a_terminal(finetuned):
    with Terminal(
        "llamafactory-cli", "chat", "--model_name_or_path", finetuned, *SMALL, "--eos_penalty", 1000
    ) as terminal:
        terminal.wait_for("User: ", LIMIT)
        terminal.send(f"{QUESTION * 20}\n")
        terminal.wait_for(r"error: .*cutoff_len[\s\S]*User: ")
        terminal.send(f"{QUESTION}\n")
        written = terminal.wait_for(r"\x1b\[\?25h[\s\S]*User: ")  # the cursor is shown again
        assert re.search(r"step +\d+/8", written) and "\x1b[1;32m" in written  # the colour of new tokens
        terminal.send("\x04")


@pytest.mark.slow
def test_an_answer_in_a_terminal_is_cancelled(finetuned):
    # Minutes of steps, most of which decode nothing, so that the answer is not over before it is cancelled.
    keys = ("--cutoff_len", 250, "--max_new_tokens", 200, "--eos_penalty", 1000)
    keys += ("--denoising_strategy", "random", "--diffusion_steps", 100_000, "--block_length", 200)
    with Terminal("llamafactory-cli", "chat", "--model_name_or_path", finetuned, *keys) as terminal:
        terminal.wait_for("User: ", LIMIT)
        terminal.send(f"{QUESTION}\n")
        terminal.wait_for(r"step +\d+/100000")
        terminal.resize(40, 5)  # 200 masked positions need more lines
        terminal.wait_for(r"lines \d+-\d+ of")
        terminal.send("\x03")
        terminal.wait_for(r"cancelled[\s\S]*User: ")
        terminal.send("exit\n")


@pytest.mark.slow
def test_a_chat_in_a_pipe(finetuned):
    words = ("chat", "--model_name_or_path", finetuned, *SMALL)
    done = run(*words, input=f"{QUESTION}\nclear\n{QUESTION * 9}\n{QUESTION}\nexit\n")
    first, _, error, second, _ = done.stdout.split("\nUser: ")[1:]
    assert first == second and first.startswith("Assistant: ") and error.startswith("error: ")
    assert "\x1b" not in done.stdout and "Traceback" not in done.stderr
