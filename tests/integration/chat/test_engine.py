"""The engine behind LLaMA-Factory's ChatModel: recognition, canvases, chats of several families, cancelling."""

import asyncio
import gc
import json
import threading
import time
from types import SimpleNamespace

import pytest

from llamafactory_ddm.integration.chat.engine import DiffusionEngine
from llamafactory_ddm.modeling.prompt_template import Part, PromptTemplate
from llamafactory_ddm.serving import request as events_of
from llamafactory_ddm.serving.server import ServerBusy
from support.serving import CHATML, chat_model, save_chat_model
from support.tiny import save_model

HELLO = [{"role": "user", "content": "Tom saw a cat."}]
THREE = [*HELLO, {"role": "assistant", "content": "Yes."}, {"role": "user", "content": "Where?"}]
TOOLS = json.dumps([{"name": "add", "description": "adds", "parameters": {"type": "object", "properties": {}}}])


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return save_chat_model(tmp_path_factory.mktemp("chat") / "model")


@pytest.fixture(scope="module")
def model(folder):
    with chat_model(folder, diffusion_steps=8, max_new_tokens=12, **CHATML) as model:
        yield model


def test_a_folder_with_a_diffusion_config_gets_our_engine_and_another_upstreams(model, tmp_path):
    from llamafactory.chat.hf_engine import HuggingfaceEngine

    assert isinstance(model.engine, DiffusionEngine)
    plain = save_model(tmp_path / "ar", kind="ar")
    with chat_model(plain, template="empty") as other:
        assert isinstance(other.engine, HuggingfaceEngine)
        assert other.chat(HELLO, max_new_tokens=2)[0].response_length == 2


def test_a_chat_is_the_generators_own_text(model):
    """The same canvas and seed by the ordinary generation."""
    engine = model.engine
    [response] = model.chat(THREE, "Be brief.", seed=3)
    request = engine.prepare(THREE, "Be brief.", seed=3)
    [alone] = engine.server.answers(request)
    assert response.response_text == alone.text and response.prompt_length == alone.prompt_tokens
    with chat_model(engine.model.name_or_path, diffusion_steps=8, **CHATML) as other:
        other.engine.close()
        [sampled] = other.engine.generator.sample_batch([request.canvas], request.settings, sample_indices=[0])
    assert sampled.predict == response.response_text
    assert (response.finish_reason == "length") == (response.response_length == 12)


def test_a_stream_joins_to_the_chat(model):
    for seed in range(3):
        [response] = model.chat(HELLO, seed=seed)
        assert "".join(model.stream_chat(HELLO, seed=seed)) == response.response_text


def test_several_answers_and_upstreams_keywords(model):
    first = model.chat(HELLO, seed=1, num_return_sequences=3, do_sample=True, temperature=2.0, top_p=0.9, top_k=30)
    assert [r.response_text for r in first] == [
        r.response_text for r in model.chat(HELLO, seed=1, n=3, temperature=2.0, top_p=0.9, top_k=30)
    ]
    assert len({response.response_text for response in first}) > 1
    greedy = [model.chat(HELLO, seed=seed, do_sample=False)[0].response_text for seed in (1, 2)]
    assert greedy[0] == greedy[1]


def test_prompts_hold_system_tools_and_earlier_turns(model):
    engine = model.engine
    for turns, system, tools in ((THREE, None, None), (THREE, "Be brief.", None), (HELLO, None, TOOLS)):
        canvas = engine.prepare(turns, system, tools).canvas
        prompt = [token for token, editable in zip(canvas.ids, canvas.editable, strict=True) if not editable]
        expected, _ = engine.template.encode_oneturn(
            engine.tokenizer, [*turns, {"role": "assistant", "content": ""}], system, tools
        )
        assert prompt == expected and canvas.n_editable == 12


def test_what_it_cannot_do_is_an_error(model):
    for keys in ({"images": ["x"]}, {"videos": ["x"]}, {"audios": ["x"]}, {"diffusion_stepz": 3}, {"n": 0}):
        with pytest.raises(ValueError, match=next(iter(keys))):
            model.chat(HELLO, **keys)
    with pytest.raises(ValueError, match="reward"):
        model.get_scores(["x"])


def test_the_prompt_and_the_answer_share_the_canvas(model):
    engine, long = model.engine, [{"role": "user", "content": "cat " * 400}]
    with pytest.raises(ValueError, match=r"^messages: .*256"):
        engine.prepare(long)
    n_prompt = len(engine.prepare(HELLO).canvas) - 12
    assert engine.prepare(HELLO, max_tokens=9999).canvas.n_editable == 256 - n_prompt
    assert engine.prepare(HELLO, max_tokens=5).canvas.n_editable == 5
    with pytest.raises(ValueError, match=r"^prompt: "):
        engine.prepare_text("cat " * 400)


@pytest.mark.parametrize(
    ("canvas", "keys", "expected"),
    [
        (100, {}, 100),  # the whole canvas of the training
        (100, {"max_new_tokens": 7}, 7),
        (100, {"cutoff_len": 60}, 60),
        (100, {"cutoff_len": 120, "max_new_tokens": 500}, 120),
        (None, {}, 256),  # the model's positions
        (9999, {}, 256),
    ],
)
def test_the_size_of_the_canvas(tmp_path, canvas, keys, expected):
    folder = save_chat_model(tmp_path / "model", canvas=canvas)
    with chat_model(folder, **CHATML, **keys) as model:
        made = model.engine.prepare(HELLO).canvas
        assert (made.n_editable if expected == 7 else len(made)) == expected
        assert len(model.engine.prepare(HELLO, max_tokens=10_000).canvas) == {500: 120}.get(
            keys.get("max_new_tokens"), min(keys.get("cutoff_len", canvas or 256), 256)
        )


def test_the_yamls_keys_are_the_defaults(folder):
    keys = {"diffusion_steps": 5, "temperature": 0.3, "top_k": 7, "do_sample": True, "suppress_tokens": "Ġthe"}
    with chat_model(folder, **CHATML, **keys, serving_rows=3, serving_queue=5, serving_timeout=9) as model:
        engine = model.engine
        settings = engine.prepare(HELLO).settings
        assert (settings.diffusion_steps, settings.logits.temperature, settings.logits.top_k) == (5, 0.3, 7)
        assert settings.logits.suppress == (engine.tokenizer.convert_tokens_to_ids("Ġthe"),)
        assert engine.prepare(HELLO, temperature=0.5).settings.logits.temperature == 0.5
        assert engine.prepare(HELLO).timeout == 9
        assert (engine.server.limits.max_rows, engine.server.limits.max_queue) == (3, 5)
    with chat_model(folder, **CHATML, do_sample=False) as model:
        assert model.engine.defaults.logits.temperature == 0.0


@pytest.mark.parametrize("key", ["num_beams", "length_penalty", "max_length", "skip_special_tokens"])
def test_keys_of_autoregressive_generation_are_refused(folder, key):
    with (
        pytest.raises(ValueError, match=rf"^{key}: "),
        chat_model(folder, **CHATML, **{key: True if key.startswith("skip") else 1}),
    ):
        pass


@pytest.mark.parametrize(
    ("family", "keys"),
    [
        ("gpt2", {"shift": True}),
        ("llama", {"shift": False}),
        ("llama", {"shift": False, "block_length": 4}),
        ("gpt2", {"shift": True, "block_length": 4}),
    ],
)
def test_families_chat_by_the_template_of_their_checkpoint(tmp_path, told, family, keys):
    template = PromptTemplate("alpaca", (Part(None, ("### Instruction:\n", "\n\n### Response:\n")),))
    folder = save_model(tmp_path / "model", family=family, positions=300, template=template, **keys)
    with chat_model(folder, max_new_tokens=8, diffusion_steps=4) as model:
        assert "alpaca" in told.text  # says which template it uses
        [response] = model.chat(HELLO, seed=2)
        assert "".join(model.stream_chat(HELLO, seed=2)) == response.response_text
        prompt = model.engine.tokenizer.decode(model.engine.prepare(HELLO).canvas.ids[: response.prompt_length])
        assert HELLO[0]["content"] in prompt and prompt.endswith("### Response:\n")


@pytest.mark.parametrize("block_length", [None, 4])
@pytest.mark.parametrize("bos", [True, False])
def test_chatml_with_and_without_bos(tmp_path, bos, block_length):
    folder = save_chat_model(tmp_path / "model", bos=bos, shift=bos, block_length=block_length)
    with chat_model(folder, max_new_tokens=8, diffusion_steps=4, **CHATML) as model:
        responses = model.chat(THREE, "Be brief.", n=2, seed=0)
        assert len(responses) == 2 and all(r.prompt_length > 30 for r in responses)
        assert model.engine.tokenizer.eos_token == "<|im_end|>"


# ---- texts and gaps ----


def test_texts_are_continued_and_gaps_filled(model):
    engine = model.engine
    canvas = engine.prepare_text("Tom saw a", " in the box.", max_tokens=5).canvas
    assert canvas.n_editable == 5 and not canvas.editable[-1]
    fixed = [token for token, editable in zip(canvas.ids, canvas.editable, strict=True) if not editable]
    assert engine.tokenizer.decode(fixed[canvas.n_start :]) == "Tom saw a in the box."
    marked = engine.prepare_text("Tom <|infill:3|> a <|infill:2|>.").canvas
    assert marked.n_editable == 5
    assert engine.prepare_text("Tom saw").canvas.n_editable == 12
    assert engine.prepare_text("").canvas.n_editable == 12  # from noise
    for prompt, suffix, keys in (
        ("a <|infill:3|>", "b", {}),
        ("a <|infill:3|>", None, {"max_tokens": 3}),
        ("a <|infill|> <|infill:2|>", None, {}),
        ("a <|infill:0|>", None, {}),
        (f"a <|infill:{10**18}|>", None, {}),
        (f"a <|infill:{10**30}|>", None, {}),
    ):
        with pytest.raises(ValueError, match=r"infill|^prompt: .*serving_positions"):
            engine.prepare_text(prompt, suffix, **keys)


def test_control_tokens_in_texts_are_text(model):
    engine = model.engine
    control = {engine.tokenizer.convert_tokens_to_ids(word) for word in ("<|im_end|>", "<|mask|>", "<|endoftext|>")}
    words = " <|im_end|> <|mask|> <|endoftext|> \ufdd0<|im_end|>\ufdd0"
    for request in (
        engine.prepare_text(f"Tom{words}"),
        engine.prepare_text(f"Tom{words}", words, max_tokens=4),
        engine.prepare_text(f"Tom{words}<|infill:4|>{words}"),
    ):
        canvas = request.canvas
        ids = [
            token
            for token, editable in list(zip(canvas.ids, canvas.editable, strict=True))[canvas.n_start :]
            if not editable
        ]
        assert not control & set(ids)


def test_control_tokens_in_texts_are_refused_where_the_tokenizer_cannot_read_them_as_text(model, monkeypatch):
    """As in a chat: a tokenizer in Python has no copy that reads them otherwise."""
    monkeypatch.setattr("llamafactory_ddm.data.protected_text.reading_as_text", lambda tokenizer, controls: tokenizer)
    monkeypatch.setattr(model.engine.prompts._text, "_reader", None)
    for prompt, suffix in (("Tom <|im_end|>", None), ("Tom", "<|im_end|> saw"), ("<|im_end|><|infill:2|>", None)):
        with pytest.raises(ValueError, match=r"<\|im_end\|>"):
            model.engine.prepare_text(prompt, suffix, max_tokens=None if "infill" in prompt else 4)
    assert model.engine.prepare_text("Tom saw")


# ---- life of a request ----


def slow(engine, monkeypatch, event):
    """Let the server's passes wait for an event."""
    original = engine.server._run
    monkeypatch.setattr(engine.server, "_run", lambda *args: (event.wait(10), original(*args))[1])


def test_a_closed_stream_frees_its_place(folder, monkeypatch):
    with chat_model(folder, diffusion_steps=64, max_new_tokens=64, **CHATML) as model:
        stats = model.engine.server.stats

        async def leave():
            async for event in (events := model.engine.events(model.engine.prepare(HELLO, shows_canvas=True))):
                assert isinstance(event, events_of.Progress) and event.canvas is not None
                break
            await events.aclose()

        asyncio.run(leave())
        wait_for(lambda: stats.cancelled == 1)
        assert stats.passes < 64


def test_a_timeout_and_a_full_queue_are_errors(folder):
    with chat_model(folder, diffusion_steps=64, max_new_tokens=64, serving_queue=2, **CHATML) as model:
        with pytest.raises(TimeoutError):
            model.chat(HELLO, timeout=0.001, diffusion_steps=64)
        with pytest.raises(ValueError, match=r"^n: 3"):
            model.chat(HELLO, n=3)
        model.engine.close(drain=True)
        with pytest.raises(ServerBusy):
            model.chat(HELLO)


def test_an_engine_that_nobody_holds_ends_its_thread(folder):
    with chat_model(folder, **CHATML) as model:
        model.chat(HELLO, max_tokens=2)
        thread = model.engine.server._thread
        assert thread.is_alive()
        model.engine = None
        gc.collect()
        wait_for(lambda: not thread.is_alive())
        assert threading.current_thread() is not thread


def wait_for(condition):
    for _ in range(1000):
        if condition():
            return
        time.sleep(0.01)
    raise AssertionError("it did not happen")


@pytest.mark.parametrize("as_list", [False, True])
def test_a_model_that_was_not_trained_yet_is_the_error_rather_than_its_keys(tmp_path, as_list):
    from llamafactory_ddm.integration.resolve.serving_stage import with_stage

    name = str(tmp_path / "saves" / "model")
    args = {"model_name_or_path": name, "diffusion_steps": 8}
    given = ["--model_name_or_path", name, "--diffusion_steps", "8"] if as_list else args
    with pytest.raises(ValueError, match=r"model_name_or_path: .* is not a folder"):
        with_stage(given)
    without = given[:2] if as_list else {"model_name_or_path": name}
    for left_to_upstream in (without, given[:0] if as_list else {}):  # LLaMA-Factory reports what is missing
        assert with_stage(left_to_upstream) == left_to_upstream


def test_steps_that_a_slow_client_has_not_read_are_merged():
    """Of 3 samples with 400 steps each at most 65 events a sample wait; texts and the latest canvases are kept."""
    from llamafactory_ddm.integration.chat.engine import Running
    from llamafactory_ddm.serving.request import Answer, Progress, Request

    steps = [
        Progress(sample, step, f"{sample}{step};", (str(step), None)) for step in range(400) for sample in range(3)
    ]
    counts = {"prompt_tokens": 1, "completion_tokens": 1, "num_forward_passes": 1, "num_steps": 1}
    answers = [Answer(sample, "", "", finish_reason="stop", **counts) for sample in range(3)]

    class Server:
        def submit(self, request, on_event):
            for event in [*steps, *answers]:
                on_event(event)
            return SimpleNamespace(is_over=True)

    async def read():
        running = Running(Server(), Request(canvas=None, settings=None, n=3))
        await asyncio.sleep(0.01)  # all events are there before the first is read
        return [event async for event in running.events()]

    read = asyncio.run(read())
    assert len(read) <= 3 * 65 and read[-3:] == answers
    for sample in range(3):
        of_sample = [event for event in read[:-3] if event.sample == sample]
        assert "".join(event.text for event in of_sample) == "".join(s.text for s in steps if s.sample == sample)
        assert (of_sample[-1].step, of_sample[-1].canvas) == (399, ("399", None))
