"""Texts that the server denoises together, against each alone; and what ends a request early."""

import gc
import random
import subprocess
import sys
import threading
import time
from queue import SimpleQueue

import pytest
import torch

from llamafactory_ddm import LogitsConfig, SamplingSettings, load
from llamafactory_ddm.modeling import joint_pass
from llamafactory_ddm.modeling.model_runner import ModelRunner
from llamafactory_ddm.sampling import STRATEGIES
from llamafactory_ddm.serving import Answer, Failure, Limits, Progress, Request, Server, ServerBusy
from llamafactory_ddm.serving.request import Cancelled
from support.tiny import save_model

PROMPTS = ["dog", "cat dog cat dog", "a", "dog dog dog dog dog", "ein Bär, 犬"]
WAIT = 60  # seconds, for a slow machine


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    root = tmp_path_factory.mktemp("serving")
    return {
        (family, block): save_model(
            root / f"{family}-{block}", family=family, shift=family == "gpt2", block_length=block, seed=5, positions=96
        )
        for family in ("gpt2", "llama")
        for block in (None, 4)
    }


@pytest.fixture(scope="module", params=[("gpt2", None), ("llama", None), ("gpt2", 4), ("llama", 4)], ids=str)
def model(request, folders):
    return load(folders[request.param])


@pytest.fixture
def gpt2(folders):
    return load(folders["gpt2", None])


class Receiver:
    """Takes the events of a request."""

    def __init__(self):
        self.events, self.over = [], threading.Event()
        self._n_open = None

    def of(self, request):
        self._n_open = request.n
        return self

    def __call__(self, event):
        self.events.append(event)
        self._n_open -= isinstance(event, Answer)
        if isinstance(event, Failure) or self._n_open == 0:
            self.over.set()

    def wait(self):
        assert self.over.wait(WAIT)
        return self

    @property
    def answers(self):
        return [event for event in self.events if isinstance(event, Answer)]

    @property
    def error(self):
        [failure] = [event for event in self.events if isinstance(event, Failure)]
        return failure.error

    def pieces(self, sample=0):
        return "".join(e.text for e in self.events if isinstance(e, Progress) and e.sample == sample)


def submitted(server, request):
    receiver = Receiver().of(request)
    receiver.ticket = server.submit(request, receiver)
    return receiver


def any_settings(number, model):
    """Settings that differ from request to request in all that a block model and others take."""
    pick = random.Random(number)
    keys = {"denoising_strategy": pick.choice(sorted(STRATEGIES)), "diffusion_steps": pick.choice([3, 8, 20])}
    if model.config.train_block_length is None:
        keys["block_length"] = pick.choice([None, 5, 8])
        keys["diffusion_steps"] = max(keys["diffusion_steps"], 8)
        keys["kv_cache"] = pick.choice(["none", "prefix", "dual"])
        keys["cache_refresh"] = pick.choice([None, 3]) if keys["kv_cache"] != "none" else None
        keys["early_stop"] = pick.choice(["eos", "none"])
        guidance = pick.choice([1.0, 1.0, 1.7])
    else:
        keys["kv_cache"], guidance = pick.choice(["none", "prefix"]), 1.0
    if keys["denoising_strategy"] != "random":
        keys |= pick.choice([{}, {"edit_ratio": 0.3, "edit_steps": 2}, {"edit_threshold": 0.4}])
    penalty = pick.choice([1.0, 1.3])
    logits = LogitsConfig(
        pick.choice([0.0, 1.0]), pick.choice([0.9, 1.0]), guidance_scale=guidance, repetition_penalty=penalty
    )
    return SamplingSettings(seed=number * 2**58, logits=logits, **keys)


def alone(model, request):
    indices = range(request.n)
    return [model.sample_batch([request.canvas], request.settings, sample_indices=[index])[0] for index in indices]


def test_texts_are_the_same_alone_and_in_company(model):
    """Requests of other settings, lengths and caches, which come at other times; n samples of some."""
    canvases = [model.from_prompt(PROMPTS[n % len(PROMPTS)], 7 + n) for n in range(24)]
    requests = [
        Request(canvas, any_settings(number, model), n=1 + number % 3 // 2, shows_canvas=number % 2 == 0)
        for number, canvas in enumerate(canvases)
    ]
    expected = [alone(model, request) for request in requests]
    server, pick = Server(model, Limits(max_rows=9)), random.Random(0)
    receivers = []
    for request in requests:
        receivers.append(submitted(server, request))
        if pick.random() < 0.3:
            time.sleep(pick.random() / 30)
    server.close()
    for request, receiver, texts in zip(requests, receivers, expected, strict=True):
        assert [type(event).__name__ for event in receiver.events if isinstance(event, Failure)] == []
        answers = sorted(receiver.answers, key=lambda answer: answer.sample)
        for answer, text in zip(answers, texts, strict=True):
            assert (answer.text, answer.whole) == (text.predict, text.text)
            assert (answer.completion_tokens, answer.num_forward_passes) == (text.n_tokens, text.num_forward_passes)
            assert receiver.pieces(answer.sample) == answer.text
            assert answer.prompt_tokens == len(request.canvas) - request.canvas.n_editable
            shown = [e.canvas for e in receiver.events if isinstance(e, Progress) and e.canvas is not None]
            assert bool(shown) == request.shows_canvas
    assert server.stats.answered == len(requests) and server.stats.failed == server.stats.cancelled == 0
    assert server.stats.passes < sum(text.num_forward_passes for texts in expected for text in texts) / 2


def test_one_step_of_a_joint_batch_is_one_forward_pass(gpt2):
    request = Request(gpt2.from_prompt("dog", 12), SamplingSettings(diffusion_steps=6, early_stop="none"))
    server = Server(gpt2)
    with server._changed:  # so that all are there before the first step
        receivers = [submitted(server, request) for _ in range(8)]
    server.close()
    assert (server.stats.passes, server.stats.rows) == (6, 48)
    assert len({receiver.answers[0].text for receiver in receivers}) == 1


def test_early_stop_in_company(tmp_path):
    """Canvases that grow or are cut take forward passes of their own, and end with those of others."""
    model = load(save_model(tmp_path / "model", seed=3, positions=96))
    model.config = model.sizer.config = model.config.__class__(**{**vars(model.config), "train_on_padding": True})
    requests = [
        Request(
            model.from_prompt(PROMPTS[n % 5], 20 + n),
            SamplingSettings(
                early_stop=("grow", "predict", "eos")[n % 3],
                seed=n,
                diffusion_steps=24,
                grow_length=6 if n % 3 == 0 else None,
            ),
        )
        for n in range(9)
    ]
    expected = []
    for request in requests:
        [sized] = model.sized([request.canvas], request.settings)
        [text] = model.sample_batch([sized.canvas], request.settings, sample_indices=[0])
        expected.append((text.predict, text.num_forward_passes + sized.nfe))
    server = Server(model)
    receivers = [submitted(server, request) for request in requests]
    server.close()
    assert [(r.answers[0].text, r.answers[0].num_forward_passes) for r in receivers] == expected
    assert all(receiver.pieces() == receiver.answers[0].text for receiver in receivers)


def test_a_stop_string_ends_a_text_before_it(model):
    canvas, settings = (
        model.from_prompt("dog", 40),
        SamplingSettings(seed=3, early_stop="none", block_length=model.config.train_block_length or 4),
    )
    [text] = alone(model, Request(canvas, settings))
    middle = len(text.predict) // 2
    word = text.predict[middle : middle + 2]
    server = Server(model)
    request = Request(canvas, settings, stop=("never seen", word))
    receiver = submitted(server, request).wait()
    server.close()
    [answer] = receiver.answers
    assert answer.text == text.predict[: text.predict.find(word)] == receiver.pieces()
    assert answer.finish_reason == "stop" and answer.whole == "dog" + answer.text
    assert answer.num_forward_passes < text.num_forward_passes
    assert answer.completion_tokens <= text.n_tokens


def test_finish_reasons(gpt2):
    server = Server(gpt2)
    end, [token] = gpt2.tokenizer.eos_token_id, gpt2.codec.encode("dog")

    def answers(*kept):
        suppress = tuple(sorted({*range(len(gpt2.tokenizer))} - {*kept}))
        settings = SamplingSettings(logits=LogitsConfig(5.0, suppress=suppress))
        return server.answers(Request(gpt2.from_prompt("dog", 12), settings, n=8))

    assert {(answer.finish_reason, answer.completion_tokens) for answer in answers(token)} == {("length", 12)}
    some = answers(token, end)
    server.close()
    assert all(answer.finish_reason == ("stop" if answer.completion_tokens < 12 else "length") for answer in some)
    assert "stop" in {answer.finish_reason for answer in some}


def test_infilling(gpt2):
    server = Server(gpt2)
    for text, n_gaps in (("dog <|infill:5|> cat", 1), ("<|infill:3|> dog <|infill:4|>.", 2)):
        request = Request(gpt2.from_marked(text), SamplingSettings(seed=2, block_length=2))
        [expected] = alone(gpt2, request)
        receiver = submitted(server, request).wait()
        [answer] = receiver.answers
        assert (answer.text, answer.whole) == (expected.predict, expected.text) and receiver.pieces() == answer.text
        n_pieces = sum(bool(event.text) for event in receiver.events if isinstance(event, Progress))
        assert n_pieces > 1 if n_gaps == 1 else n_pieces == 1
    server.close()


def slow(model, seconds=0.02):
    """Make each forward pass of a model take a while."""
    model.model.register_forward_pre_hook(lambda *_: time.sleep(seconds))
    return model


def long_request(model, **rest):
    return Request(
        model.from_prompt("dog", 60), SamplingSettings(early_stop="none", block_length=1, diffusion_steps=60), **rest
    )


def test_a_cancelled_request_frees_its_place_at_the_next_step(gpt2):
    server = Server(slow(gpt2), Limits(max_rows=1))
    one, two = (
        submitted(server, long_request(gpt2)),
        submitted(server, Request(gpt2.from_prompt("cat", 2), SamplingSettings())),
    )
    waiting = submitted(server, long_request(gpt2))
    while server.stats.passes < 3:
        time.sleep(0.005)
    waiting.ticket.cancel()
    before = server.stats.passes
    one.ticket.cancel()
    two.wait()
    server.close()
    assert isinstance(one.error, Cancelled) and isinstance(waiting.error, Cancelled)
    assert server.stats.passes <= before + 1 + 2
    assert (server.stats.cancelled, server.stats.answered) == (2, 1)


def test_a_request_that_waits_frees_its_place_in_the_queue(gpt2):
    """It is cancelled, or takes too long, while the batch is full of others."""
    server = Server(slow(gpt2), Limits(max_rows=1, max_queue=2))
    first = submitted(server, long_request(gpt2))
    while not server.n_running:
        time.sleep(0.005)
    cancelled, late = submitted(server, long_request(gpt2)), submitted(server, long_request(gpt2, timeout=0.05))
    cancelled.ticket.cancel()
    assert isinstance(cancelled.wait().error, Cancelled) and isinstance(late.wait().error, TimeoutError)
    assert server.n_waiting == 0 and not first.answers
    submitted(server, long_request(gpt2))
    server.close(drain=False)
    assert isinstance(first.error, Cancelled)


def test_a_request_that_takes_too_long(gpt2):
    server = Server(slow(gpt2))
    receiver = submitted(server, long_request(gpt2, timeout=0.1)).wait()
    server.close()
    assert isinstance(receiver.error, TimeoutError) and "0.1 seconds" in str(receiver.error)
    assert server.stats.failed == 1 and server.stats.passes < 60


def test_a_full_queue_refuses(gpt2):
    server = Server(slow(gpt2), Limits(max_rows=1, max_queue=2))
    first = submitted(server, long_request(gpt2))
    while not server.n_running:
        time.sleep(0.005)
    others = [submitted(server, long_request(gpt2)) for _ in range(2)]
    with pytest.raises(ServerBusy, match="2 texts wait"):
        submitted(server, long_request(gpt2))
    server.close(drain=False)
    assert all(isinstance(receiver.error, Cancelled) for receiver in (first, *others))
    with pytest.raises(ServerBusy, match="closing"):
        submitted(server, long_request(gpt2))


def test_closing_finishes_what_waits(gpt2):
    server = Server(gpt2, Limits(max_rows=2))
    receivers = [submitted(server, Request(gpt2.from_prompt("dog", 5), SamplingSettings())) for _ in range(7)]
    server.close()
    assert all(len(receiver.answers) == 1 for receiver in receivers)
    assert not gpt2.model.get_output_embeddings()._forward_pre_hooks


def test_bounds_on_rows_and_positions(gpt2, monkeypatch):
    """Requests start in their order; one that does not fit yet holds back those behind it."""
    seen, limits = [], Limits(max_rows=5, max_positions=70)
    run = joint_pass.run_joint

    def counting(runner, passes):
        seen.append((sum(one.n_rows for one in passes), sum(one.ids.numel() for one in passes)))
        return run(runner, passes)

    monkeypatch.setattr("llamafactory_ddm.serving.server.run_joint", counting)
    server = Server(gpt2, limits)
    order, lengths = SimpleQueue(), [10, 10, 60, 10, 10, 10, 10, 10, 10, 60, 5]
    with server._changed:
        for number, length in enumerate(lengths):
            request = Request(
                gpt2.from_prompt("dog", length - 4), SamplingSettings(diffusion_steps=3, early_stop="none")
            )

            def on_event(event, number=number):
                if isinstance(event, Answer):
                    order.put(number)

            server.submit(request, on_event)
    server.close()
    assert sorted(order.get() for _ in lengths) == list(range(len(lengths)))
    assert max(rows for rows, _ in seen) == 5 and max(columns for _, columns in seen) <= 70
    with pytest.raises(ValueError, match="at most 70"):
        server.check(Request(gpt2.from_prompt("dog", 80), SamplingSettings()))


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"n": 0}, "n: 0"),
        ({"stop": ("a", "")}, "stop: ''"),
        ({"settings": SamplingSettings(logits=LogitsConfig(guidance_scale=2.0))}, "guidance_scale"),
    ],
)
def test_a_wrong_request_is_refused_before_it_waits(gpt2, change, words):
    server = Server(gpt2)
    with pytest.raises(ValueError, match=words):
        server.submit(Request(**{"canvas": gpt2.from_noise(8), "settings": SamplingSettings(), **change}), print)
    assert server.answers(Request(gpt2.from_prompt("dog", 3), SamplingSettings()))
    server.close()


def test_several_gaps_have_no_stop_strings(gpt2):
    server = Server(gpt2)
    with pytest.raises(ValueError, match=r"stop: .*several gaps"):
        server.check(Request(gpt2.from_marked("<|infill:2|> dog <|infill:2|>"), SamplingSettings(), stop=("a",)))
    server.close()


class OutOfMemory(RuntimeError):
    """What a device raises."""


def test_a_batch_that_does_not_fit_is_divided(gpt2, monkeypatch):
    """Passes of more than three rows fail, as when memory is short: the texts are those of smaller batches."""
    requests = [
        Request(gpt2.from_prompt("dog", 10), SamplingSettings(seed=n, kv_cache="dual", block_length=5))
        for n in range(8)
    ]
    expected = [alone(gpt2, request)[0].predict for request in requests]
    forward = ModelRunner.forward

    def small(runner, one, cache):
        if one.n_rows > 3:
            raise OutOfMemory("out of memory")
        return forward(runner, one, cache)

    monkeypatch.setattr(ModelRunner, "forward", small)
    server = Server(gpt2)
    with server._changed:
        receivers = [submitted(server, request) for request in requests]
    server.close()
    assert [receiver.answers[0].text for receiver in receivers] == expected


@pytest.mark.parametrize("kind", ["none", "dual", "block"])
def test_a_text_that_fails_leaves_the_others_alone(folders, monkeypatch, kind):
    """One text's pass raises, another's logits are NaN: both fail, and the others are what they are alone."""
    gpt2 = load(folders["gpt2", 4 if kind == "block" else None])
    keys = {"kv_cache": "dual", "block_length": 6} if kind == "dual" else {}
    patience = 0 if kind == "block" else 4  # the first pass of a block model has the start of the prompt, and no other
    canvases = [gpt2.from_prompt(PROMPTS[n % 5], 12) for n in range(6)]
    settings = [SamplingSettings(seed=n, **keys) for n in range(6)]
    expected = [alone(gpt2, Request(canvas, one))[0].predict for canvas, one in zip(canvases, settings, strict=True)]
    raising, bad = (gpt2.from_prompt(text, 11) for text in ("raise", "nanan"))
    forward, counts = ModelRunner.forward, {"steps": 0}

    def faulty(runner, one, cache):
        starts = [row.tolist() for row in one.ids[:, :6]]
        hidden, logits = forward(runner, one, cache)
        if any(row == list(raising.ids[:6]) for row in starts):
            counts["steps"] += 1
            if counts["steps"] > patience:
                raise OutOfMemory("out of memory")
        for number, row in enumerate(starts):
            if row == list(bad.ids[:6]):
                hidden = hidden.clone()
                hidden[one.head_index // one.n_columns == number] = torch.nan
        return hidden, logits

    monkeypatch.setattr(ModelRunner, "forward", faulty)
    server = Server(gpt2)
    with server._changed:
        faults = [submitted(server, Request(canvas, SamplingSettings())) for canvas in (raising, bad)]
        receivers = [submitted(server, Request(c, s)) for c, s in zip(canvases, settings, strict=True)]
    server.close()
    assert isinstance(faults[0].error, OutOfMemory)
    assert isinstance(faults[1].error, ValueError) and "NaN" in str(faults[1].error)
    assert [receiver.answers[0].text for receiver in receivers] == expected
    assert (server.stats.failed, server.stats.answered) == (2, 6)


@pytest.mark.parametrize("cache", ["prefix", "dual"])
def test_no_text_goes_on_without_what_a_failed_pass_should_have_cached(gpt2, monkeypatch, cache):
    """All passes of a step fail, and later ones do not, as when memory is short for a moment."""
    keys = {"kv_cache": cache, "block_length": 12, "diffusion_steps": 12, "early_stop": "none"}
    requests = [Request(gpt2.from_prompt(PROMPTS[n], 12), SamplingSettings(seed=n, **keys)) for n in range(3)]
    expected = [alone(gpt2, request)[0].predict for request in requests]
    forward, calls = ModelRunner.forward, []

    def failing(runner, one, past):
        calls.append(one.n_rows)
        if len(calls) <= 5:  # three texts together, one, two, and each of these
            raise OutOfMemory("out of memory")
        return forward(runner, one, past)

    monkeypatch.setattr(ModelRunner, "forward", failing)
    server = Server(gpt2)
    with server._changed:
        receivers = [submitted(server, request) for request in requests]
    server.close()
    assert calls[:5] == [3, 1, 2, 1, 1]
    for receiver, text in zip(receivers, expected, strict=True):
        assert [answer.text for answer in receiver.answers] == [text] or isinstance(receiver.error, OutOfMemory)


def test_a_bug_in_a_step_fails_the_batch_and_the_server_lives(gpt2, monkeypatch):
    server, together = Server(gpt2), joint_pass.together
    request = Request(gpt2.from_prompt("dog", 5), SamplingSettings())

    def faulty(model, passes):
        monkeypatch.setattr("llamafactory_ddm.serving.server.together", together)
        raise KeyError("a bug")

    monkeypatch.setattr("llamafactory_ddm.serving.server.together", faulty)
    with server._changed:
        receivers = [submitted(server, request) for _ in range(3)]
    assert all(isinstance(receiver.wait().error, KeyError) for receiver in receivers)
    assert server.answers(request) and server.stats.failed == 3
    server.close()


def test_tokens_to_suppress_may_be_a_list(gpt2):
    server, canvas = Server(gpt2), gpt2.from_prompt("dog", 5)
    one, two = (SamplingSettings(logits=LogitsConfig(suppress=ids)) for ids in ([5, 6], (5, 6)))
    assert server.answers(Request(canvas, one)) == server.answers(Request(canvas, two))
    server.close()


def test_a_receiver_that_raises_cancels_its_request(gpt2):
    server = Server(slow(gpt2))

    def on_event(event):
        raise RuntimeError("its event loop is closed")

    request = Request(
        gpt2.from_prompt("dog", 60), SamplingSettings(early_stop="none", block_length=1), shows_canvas=True
    )
    ticket = server.submit(request, on_event)
    assert server.answers(Request(gpt2.from_prompt("cat", 3), SamplingSettings()))
    server.close()
    assert ticket.is_over and server.stats.cancelled == 1 and server.stats.passes < 40


@pytest.mark.slow
def test_a_process_ends_while_texts_are_denoised(folders):
    code = f"""
import time
from llamafactory_ddm import SamplingSettings, load
from llamafactory_ddm.serving import Request, Server
model = load({str(folders["gpt2", None])!r})
settings = SamplingSettings(denoising_strategy="random", diffusion_steps=100_000, early_stop="none")
server = Server(model)
for _ in range(6):
    server.submit(Request(model.from_prompt("dog", 60), settings), print)
while server.n_running < 6:
    time.sleep(0.01)
time.sleep(0.3)
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


@pytest.mark.slow
@pytest.mark.parametrize("model", [("gpt2", None), ("llama", 4)], ids=str, indirect=True)
def test_many_clients_at_random_times(model):
    """200 requests of 16 clients, a third cancelled: the others are what they are alone, and nothing is kept."""
    requests = [
        Request(model.from_prompt(PROMPTS[n % 5], 4 + n % 30), any_settings(n % 20, model), n=1 + (n % 7 == 0))
        for n in range(200)
    ]
    expected = {}
    for number, request in enumerate(requests):
        key = (request.canvas, number % 20, request.n)
        if key not in expected:
            expected[key] = [text.predict for text in alone(model, request)]
    server, wrong, n_answered = Server(model, Limits(max_rows=12, max_queue=400)), [], [0] * 16

    def tensors():
        gc.collect()
        return sum(isinstance(one, torch.Tensor) for one in gc.get_objects())

    def client(number):
        pick = random.Random(number)
        for index in range(number, len(requests), 16):
            time.sleep(pick.random() / 50)
            receiver = submitted(server, requests[index])
            if pick.random() < 0.33:
                time.sleep(pick.random() / 50)
                receiver.ticket.cancel()
                receiver.wait()
                continue
            answers = sorted(receiver.wait().answers, key=lambda answer: answer.sample)
            key = (requests[index].canvas, index % 20, requests[index].n)
            n_answered[number] += 1
            if [answer.text for answer in answers] != expected[key]:
                wrong.append(index)

    before = tensors()
    clients = [threading.Thread(target=client, args=(number,)) for number in range(16)]
    for thread in clients:
        thread.start()
    for thread in clients:
        thread.join(20 * WAIT)
    assert not any(thread.is_alive() for thread in clients)
    server.close()
    assert (server.n_running, server.n_waiting, wrong) == (0, 0, [])
    assert server.stats.answered >= sum(n_answered) > 100 and server.stats.failed == 0
    assert server.stats.answered + server.stats.cancelled == 200
    assert tensors() <= before + 5
