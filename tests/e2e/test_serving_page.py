"""The commands of README and docs/serving.md that serve a model, or ask it."""

import json
import re
import shlex
import signal
import subprocess
import sys
import time
import urllib.error
import urllib.request
from contextlib import contextmanager

import pytest

from e2e.test_readme import DOCS, SERVING
from support.cli import run, start
from support.limits import LIMIT
from support.warm import free_port

ADDRESS = "127.0.0.1:8000"
(API,) = {line for line in SERVING if " api " in line}
CURL = sorted({line for line in SERVING if line.startswith("curl ")})


@contextmanager
def serving(line, *words, log):
    """Run a command that serves a model, and end it at the end; returns the address of its API."""
    port = free_port()
    process = start(*shlex.split(line), *words, env={"API_PORT": str(port)}, stdout=log, stderr=log)
    try:
        end = time.monotonic() + LIMIT
        while True:
            try:
                urllib.request.urlopen(f"http://127.0.0.1:{port}/v1/models").close()
                break
            except urllib.error.URLError:
                assert process.poll() is None and time.monotonic() < end, log.read_text()[-5000:]
                time.sleep(0.2)
        yield f"127.0.0.1:{port}"
        process.send_signal(signal.SIGTERM)
        assert process.wait(60) == 0
    finally:
        process.kill()


@pytest.mark.slow
def test_the_api_answers_as_the_page_says(finetuned, tmp_path):
    assert len(CURL) == 4
    with serving(API, f"model_name_or_path={finetuned}", "cutoff_len=64", log=tmp_path / "log") as address:
        for line in CURL:
            words = shlex.split(line.replace(ADDRESS, address))
            done = subprocess.run([*words, "-sS"], capture_output=True, text=True, timeout=LIMIT, check=True)
            if "-N" in words:
                *chunks, last = re.findall(r"^data: (.*)$", done.stdout, re.M)
                assert last == "[DONE]" and json.loads(chunks[-1])["choices"][0]["finish_reason"]
            else:
                answer = json.loads(done.stdout)
                assert answer["diffusion"]["forward_passes"] > 0, answer
                assert ("infilled_text" in answer["choices"][0]) == ("/v1/completions" in line)
        (block,) = re.findall(r"```python\n(.*?)```", DOCS["serving"], re.S)
        run("-c", block.replace(ADDRESS, address), program=sys.executable)
        metrics = urllib.request.urlopen(f"http://{address}/metrics").read().decode()
    for name in re.findall(r"`(llamafactory_ddm_\w+|_\w+_(?:total|seconds|waiting|limit))`", DOCS["serving"]):
        name = name if name.startswith("llama") else f"llamafactory_ddm{name}"
        assert re.search(rf"^{name}(_bucket|_count)?[ {{]", metrics, re.M), name


@pytest.mark.slow
def test_the_chat_answers_as_the_page_says(finetuned):
    for line in sorted({line for line in SERVING if " chat " in line}):
        words = [*shlex.split(line)[1:], f"model_name_or_path={finetuned}", "cutoff_len=64"]
        assert "Assistant: " in run(*words, input="Sam has 3 eggs.\nexit\n").stdout
