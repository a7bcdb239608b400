"""Make docs/serving_webchat.png: a page of `llamafactory-cli webchat` while a text is denoised.

python docs/make_serving_picture.py saves/tiny_gpt2/full/ddm

Needs Chromium and playwright (pip install -e ".[dev]").
"""

from __future__ import annotations

import argparse
import os
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
import urllib.request
from pathlib import Path
from typing import Any

PROMPT = "Tom had a blue kite and Max had a white drum. They met at the forest."
FLAGS = ("--no-sandbox", "--disable-gpu", "--host-resolver-rules=MAP * ~NOTFOUND, EXCLUDE 127.0.0.1")
# True once most tokens are there, or the answer, which a model may end early.
MOSTLY = """() => {
    const counts = (document.querySelector('.ddm-step')?.innerText || '').match(/(\\d+) of (\\d+)/);
    if (counts) return counts[1] / counts[2] > 0.6;
    const answer = document.querySelector('.bot.message');
    return answer && answer.innerText.trim() != 'Loading content';
}"""


def main() -> None:
    """Read the command line, serve the model, and take the picture."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("checkpoint", type=Path)
    parser.add_argument("--output", type=Path, default=Path(__file__).parent / "serving_webchat.png")
    arguments = parser.parse_args()
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    served = {"GRADIO_SERVER_NAME": "127.0.0.1", "GRADIO_SERVER_PORT": str(port), "GRADIO_ANALYTICS_ENABLED": "False"}
    command = [Path(sys.executable).with_name("llamafactory-cli"), "webchat", "--template", "empty"]
    command += ["--finetuning_type", "full", "--model_name_or_path", arguments.checkpoint.resolve()]
    with tempfile.TemporaryDirectory() as folder:
        server = subprocess.Popen(
            command, cwd=folder, env={**os.environ, **served, "BROWSER": "true"}, start_new_session=True
        )
        try:
            take_picture(f"http://127.0.0.1:{port}", arguments.output, server)
        finally:
            os.killpg(server.pid, signal.SIGTERM)
            server.wait()
    print(f"{arguments.output}: {arguments.output.stat().st_size / 1000:.0f} kB")


def take_picture(address: str, output: Path, server: subprocess.Popen[Any]) -> None:
    """Send a message, and save the page when most of the answer is there."""
    from playwright.sync_api import sync_playwright

    wait_for(address, server)
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=shutil.which("chromium"), args=FLAGS)
        page = browser.new_page(viewport={"width": 1200, "height": 860})
        page.goto(address, wait_until="commit")
        for label, value in (("Maximum new tokens", 96), ("Temperature", 0.3), ("Diffusion steps", 96)):
            page.get_by_label(f"number input for {label}").fill(str(value))
            page.get_by_label(f"number input for {label}").press("Enter")
        page.get_by_label("Denoising strategy").fill("low_confidence")
        page.get_by_role("option", name="low_confidence").click()
        page.get_by_role("textbox", name="Block length").fill("")
        page.get_by_role("textbox", name="Seed").fill("0")
        page.get_by_placeholder("Input...").fill(PROMPT)
        page.get_by_role("button", name="Submit").click()
        page.evaluate("window.scrollTo(0, 0)")
        page.wait_for_function(MOSTLY, polling=20)
        page.screenshot(path=output)
        browser.close()


def wait_for(address: str, server: subprocess.Popen[Any]) -> None:
    """Wait until the page is served.

    Raises:
        SystemExit: if the server ends instead.
    """
    while server.poll() is None:
        try:
            with urllib.request.urlopen(address, timeout=10):
                return
        except OSError:
            time.sleep(0.5)
    raise SystemExit("llamafactory-cli webchat has ended; see its messages above")


if __name__ == "__main__":
    main()
