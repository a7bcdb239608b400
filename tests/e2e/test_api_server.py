"""`llamafactory-cli api` as a process: its address, requests of a trained model, SIGTERM, clients that are killed."""

import json
import os
import random
import signal
import socket
import tempfile
import threading
import time
from contextlib import contextmanager
from pathlib import Path

import httpx
import openai
import pytest

from support.cli import start
from support.limits import LIMIT
from support.serving import CHATML, save_chat_model
from support.warm import free_port

HELLO = [{"role": "user", "content": "Tom has 3 eggs. He gets 2 more. How many eggs does he have?"}]


@contextmanager
def api(folder, *words, **environment):
    """Start the API of a folder; gives its address, the process, and the file that it writes to."""
    port = free_port()
    unset = {name: None for name in os.environ if name.startswith("API_")}
    env = {**unset, "API_PORT": str(port), **environment}
    with tempfile.NamedTemporaryFile() as file:
        log = Path(file.name)
        words = ("api", "--model_name_or_path", folder, *words)
        process = start("llamafactory-cli", *words, env=env, stdout=log, stderr=log)
        try:
            address = f"http://127.0.0.1:{port}"
            wait_for(lambda: process.poll() is not None or is_up(address), log)
            yield address, process, log
        finally:
            process.kill()


def is_up(address):
    """Return whether the server listens, without httpx: its requests read certificates first, which costs CPU time."""
    host, port = address.removeprefix("http://").split(":")
    with socket.socket() as connection:
        return connection.connect_ex((host, int(port))) == 0


def wait_for(condition, log=None):
    end = time.monotonic() + LIMIT
    while not condition():
        assert time.monotonic() < end, log and log.read_text()[-3000:]
        time.sleep(0.02)


def ask(address, **keys):
    with openai.OpenAI(base_url=f"{address}/v1", api_key="x", max_retries=0) as client:
        reply = client.chat.completions.create(model="m", **{"messages": HELLO, **keys})
        return list(reply) if keys.get("stream") else reply


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return save_chat_model(tmp_path_factory.mktemp("api") / "model")


@pytest.mark.slow
def test_a_finetuned_model_is_served_by_its_folder_alone(finetuned):
    """Without stage and template, which the checkpoint knows; only this computer reaches it."""
    with api(finetuned) as (address, process, log):
        reply = ask(address, seed=1)
        assert reply.usage.prompt_tokens > 5 and reply.diffusion["forward_passes"] > 0
        assert reply.choices[0].message.content == ask(address, seed=1).choices[0].message.content
        others = [info[4][0] for info in socket.getaddrinfo(socket.gethostname(), None, socket.AF_INET)]
        for other in set(others) - {"127.0.0.1"}:
            with pytest.raises(httpx.HTTPError):
                httpx.get(address.replace("127.0.0.1", other))
        process.send_signal(signal.SIGTERM)
        assert process.wait(LIMIT) == 0
        text = log.read_text()
    assert "127.0.0.1" in text and "API_KEY" in text and "template: not set; using diffullama" in text


@pytest.mark.slow
def test_sigterm_finishes_what_runs(folder):
    keys = {"denoising_strategy": "low_confidence", "early_stop": "none"}
    with api(folder, "--template", CHATML["template"]) as (address, process, _):
        found = {}

        def stream():
            shown = {**keys, "stream_canvas": True}
            found["stream"] = ask(address, stream=True, max_tokens=180, seed=1, extra_body=shown)

        def answer():
            found["answer"] = ask(address, max_tokens=180, seed=1, extra_body=keys)

        threads = [threading.Thread(target=each) for each in (stream, answer)]
        for thread in threads:
            thread.start()
        wait_for(lambda: found or "rows_running 2.0" in httpx.get(f"{address}/metrics").text)
        assert not found
        process.send_signal(signal.SIGTERM)
        time.sleep(0.3)
        with pytest.raises(httpx.HTTPError):
            httpx.get(f"{address}/v1/models")
        assert process.poll() is None  # the requests run
        for thread in threads:
            thread.join()
        assert process.wait(LIMIT) == 0
        text = "".join(chunk.choices[0].delta.content or "" for chunk in found["stream"])
        assert text == found["answer"].choices[0].message.content
        assert found["stream"][-1].choices[0].finish_reason


@pytest.mark.slow
def test_a_key_opens_it_to_others_and_a_mistake_is_one_line(folder):
    with api(folder, *CHATML_WORDS, API_KEY="secret", API_HOST="127.0.0.1") as (address, process, _):
        assert httpx.get(f"{address}/metrics").status_code == 401
        process.send_signal(signal.SIGINT)
        process.wait(LIMIT)
    with api(folder, "--template", "chatmll") as (_, process, log):
        assert process.wait(LIMIT) == 1
        text = log.read_text()
    assert "error: template: chatmll" in text and "Traceback" not in text


CHATML_WORDS = ("--template", CHATML["template"])


@pytest.mark.slow
def test_clients_that_come_and_go_do_no_harm(folder):
    """Requests of many clients at random times, some of which leave: the others get what they get alone."""
    with api(folder, *CHATML_WORDS, "--serving_rows", "8") as (address, process, _):
        host, port = address.removeprefix("http://").split(":")
        alone = {seed: ask(address, seed=seed, max_tokens=6 + seed % 7) for seed in range(8)}
        wrong, drawn = [], random.Random(3)
        plans = [[(drawn.randrange(8), drawn.random(), drawn.random() * 0.05) for _ in range(12)] for _ in range(8)]

        def client(plan):
            for seed, kind, pause in plan:
                time.sleep(pause)
                keys = {"messages": HELLO, "seed": seed, "max_tokens": 6 + seed % 7}
                if kind < 0.3:  # the client is killed
                    content = json.dumps({**keys, "stream": kind < 0.15}).encode()
                    with socket.create_connection((host, int(port))) as connection:
                        head = (
                            f"POST /v1/chat/completions HTTP/1.1\r\nHost: x\r\nContent-Length: {len(content)}\r\n\r\n"
                        )
                        connection.sendall(head.encode() + content[: len(content) if kind < 0.25 else 20])
                        time.sleep(pause)
                    continue
                if kind < 0.6:
                    chunks = ask(address, stream=True, **keys)
                    text = "".join(chunk.choices[0].delta.content or "" for chunk in chunks)
                else:
                    text = ask(address, **keys).choices[0].message.content
                if text != alone[seed].choices[0].message.content:
                    wrong.append((seed, text))

        threads = [threading.Thread(target=client, args=(plan,)) for plan in plans]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert not wrong
        wait_for(lambda: "rows_running 0.0" in httpx.get(f"{address}/metrics").text)
        process.send_signal(signal.SIGTERM)
        assert process.wait(LIMIT) == 0
