"""A headless Chromium, and LLaMA-Factory's web pages served by the command that a user starts."""

import shutil
import time
import urllib.request
from contextlib import contextmanager

import pytest

from .cli import start
from .limits import ANSWER, LIMIT
from .warm import free_port

CHROMIUM = shutil.which("chromium") or shutil.which("google-chrome")
FLAGS = [
    *("--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--disable-sync"),
    *("--disable-background-networking", "--disable-component-update"),
    "--host-resolver-rules=MAP * ~NOTFOUND, EXCLUDE 127.0.0.1",  # gradio's pages name fonts on the web
]
PATIENCE = 1000 * ANSWER  # milliseconds that a page is waited for


def browser_or_skip():
    """Yield a browser; skip the test, saying what to install, where there is none."""
    sync_api = pytest.importorskip("playwright.sync_api", reason="pip install playwright to test the web pages")
    if CHROMIUM is None:
        pytest.skip("neither chromium nor google-chrome is on this machine; apt-get install chromium")
    with sync_api.sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=CHROMIUM, args=FLAGS)
        yield browser
        browser.close()


@contextmanager
def web_pages(command, *words, folder):
    """The address of `llamafactory-cli webchat` or `webui`, started in a folder and ended with what it started."""
    port, log = free_port(), folder / f"{command}.log"
    served = {"GRADIO_SERVER_NAME": "127.0.0.1", "GRADIO_SERVER_PORT": str(port), "GRADIO_ANALYTICS_ENABLED": "False"}
    env = {**served, "BROWSER": "true"}
    process = start("llamafactory-cli", command, *words, cwd=folder, env=env, stdout=log, stderr=log)
    address = f"http://127.0.0.1:{port}"
    try:
        end = time.monotonic() + LIMIT
        while not _answers(address):
            assert process.poll() is None and time.monotonic() < end, log.read_text()[-10000:]
            time.sleep(0.2)
        yield address
    finally:
        process.kill()


def _answers(address):
    try:
        with urllib.request.urlopen(address, timeout=10) as page:
            return page.status == 200
    except OSError:
        return False
