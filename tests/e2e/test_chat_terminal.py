"""`llamafactory-cli chat` with a diffusion model, as a user runs it: in a terminal and in a pipe."""

import fcntl
import os
import pty
import re
import select
import struct
import subprocess
import termios
import time

import pytest

from support.cli import ROOT, SCRIPTS, run
from support.limits import LIMIT
from support.warm import QUIET

QUESTION = "Sam has 3 eggs. He gets 2 more. How many eggs does he have?"
SMALL = ("--cutoff_len", "64", "--diffusion_steps", "8", "--logits_temp", "0")


class Terminal:
    """A program in a pseudo-terminal of its own."""

    def __init__(self, *words, **env):
        self.written = ""
        self._fd, inner = pty.openpty()
        self.resize(60, 20)
        self.process = subprocess.Popen(
            [SCRIPTS / words[0], *map(str, words[1:])],
            cwd=ROOT,
            stdin=inner,
            stdout=inner,
            stderr=subprocess.DEVNULL,
            env={**os.environ, **QUIET, "TERM": "xterm-256color", **env},
            start_new_session=True,
            preexec_fn=lambda: fcntl.ioctl(0, termios.TIOCSCTTY, 0),
        )
        os.close(inner)

    def resize(self, columns, lines):
        fcntl.ioctl(self._fd, termios.TIOCSWINSZ, struct.pack("HHHH", lines, columns, 0, 0))

    def send(self, text):
        """Type a text, and forget what was written before."""
        self.written = ""
        os.write(self._fd, text.encode())

    def wait_for(self, pattern):
        """Read until a pattern is found in what was written since the last `send`, and return all of that."""
        end = time.monotonic() + LIMIT
        while not re.search(pattern, self.written):
            assert select.select([self._fd], [], [], max(0, end - time.monotonic()))[0], self.written
            try:
                self.written += os.read(self._fd, 65536).decode(errors="replace")
            except OSError:  # the program is over
                raise AssertionError(self.written) from None
        return self.written

    def close(self):
        """Wait until the program has ended by itself, and return its status; kill it after an error."""
        try:
            return self.process.wait(60)
        finally:
            self.process.kill()
            os.close(self._fd)


@pytest.mark.slow
def test_a_chat_in_a_terminal(finetuned):
    keys = ("--cutoff_len", 250, "--max_new_tokens", 200, "--eos_penalty", 1000)
    # Seconds of steps, most of which decode nothing, so that the answer is not over before it is cancelled.
    keys += ("--denoising_strategy", "random", "--diffusion_steps", 6000, "--block_length", 200)
    terminal = Terminal("llamafactory-cli", "chat", "--model_name_or_path", finetuned, *keys)
    try:
        terminal.wait_for("User: ")
        terminal.send(f"{QUESTION}\n")
        terminal.wait_for(r"step +\d+/6000")
        terminal.resize(30, 5)  # 200 masked positions need seven lines
        terminal.wait_for(r"lines \d+-\d+ of")
        terminal.wait_for(r"\x1b\[1;32m")
        terminal.send("\x03")
        terminal.wait_for(r"cancelled[\s\S]*User: ")
        terminal.send(f"{QUESTION * 20}\n")
        terminal.wait_for(r"error: .*cutoff_len[\s\S]*User: ")
        terminal.send(f"{QUESTION}\n")
        assert "\x1b[?25h" in terminal.wait_for(r"\x1b\[\?25h[\s\S]*User: ")
        terminal.send("\x04")
    finally:
        status = terminal.close()
    assert status == 0


@pytest.mark.slow
def test_a_chat_in_a_pipe(finetuned):
    words = ("chat", "--model_name_or_path", finetuned, *SMALL)
    done = run(*words, input=f"{QUESTION}\nclear\n{QUESTION * 9}\n{QUESTION}\nexit\n")
    first, _, error, second, _ = done.stdout.split("\nUser: ")[1:]
    assert first == second and first.startswith("Assistant: ") and error.startswith("error: ")
    assert "\x1b" not in done.stdout and "Traceback" not in done.stderr
