"""Texts of block models: against forward passes over whole prefixes, and through every way to ask for one."""

import dataclasses

import pytest
import torch

from llamafactory_ddm import LogitsConfig, SamplingSettings, load
from llamafactory_ddm.cli import generate as generate_command
from llamafactory_ddm.data.canvas import canvas_of
from llamafactory_ddm.generation import quality_run, terminal
from llamafactory_ddm.generation.block_models import in_whole_blocks
from llamafactory_ddm.generation.quality_keys import read_keys
from llamafactory_ddm.sampling import STRATEGIES
from support.screen import Screen
from support.tiny import save_model

B = 4
GREEDY = SamplingSettings(logits=LogitsConfig(0.0), diffusion_steps=2)
SAMPLED = SamplingSettings(logits=LogitsConfig(1.3, 0.9), diffusion_steps=3)
PROMPTS = ["dog", "cat dog cat dog", "a", "dog dog dog dog dog"]


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    root = tmp_path_factory.mktemp("block")
    return {
        (family, shift): save_model(
            root / f"{family}-{shift}", family=family, shift=shift, block_length=B, seed=5, positions=96
        )
        for family in ("gpt2", "llama")
        for shift in (True, False)
    }


@pytest.fixture(params=[("gpt2", True), ("gpt2", False), ("llama", True), ("llama", False)], ids=str)
def model(request, folders):
    return load(folders[request.param])


def logits_of_prefix(model, ids, sources):
    """Logits at columns, one forward pass over all of `ids`, whose tokens see the blocks up to their own."""
    block = torch.arange(len(ids)) // B
    mask = torch.zeros(len(ids), len(ids)).masked_fill(block[None, :] > block[:, None], torch.finfo(torch.float32).min)
    with torch.no_grad():
        logits = model.model(input_ids=torch.tensor([ids]), attention_mask=mask[None, None], use_cache=False).logits[0]
    logits[:, model.config.mask_token_id :] = -torch.inf  # [MASK] is never drawn
    return logits[sources].log_softmax(dim=1)


def by_plain_forwards(model, prompt_ids, n_tokens, steps):
    """Greedy low_confidence: of each block the most probable tokens first, an equal number in each step."""
    shift, mask_id, eos = model.config.shift, model.config.mask_token_id, model.eos_ids
    ids, end, passes = list(prompt_ids), len(prompt_ids) + n_tokens, 0
    while len(ids) < end:
        if shift and len(ids) % B == 0:
            ids.append(int(logits_of_prefix(model, ids, [len(ids) - 1])[0].argmax()))
            passes += 1
        else:
            start = len(ids)
            masked = list(range(start, (start // B + 1) * B))
            ids += [mask_id] * len(masked)
            n_steps = steps if len(masked) > 1 else 1
            shares = [len(masked) // n_steps + (step < len(masked) % n_steps) for step in range(n_steps)]
            for share in filter(None, shares):
                best, token = logits_of_prefix(model, ids, [at - shift for at in masked]).max(dim=1)
                passes += 1
                for index in best.argsort(descending=True, stable=True)[:share].tolist():
                    ids[masked[index]] = int(token[index])
                masked = [at for at in masked if ids[at] == mask_id]
                if any(ids[at] in eos and all(m > at for m in masked) for at in range(start, len(ids))):
                    break
        new = ids[len(prompt_ids) : end]
        first = next((at for at, token in enumerate(new) if token in eos), None)
        if first is not None:
            return new[:first], passes
    return ids[len(prompt_ids) : end], passes


@pytest.mark.parametrize("steps", [1, 2, 3])
def test_greedy_texts_are_those_of_plain_forward_passes(model, steps):
    settings = dataclasses.replace(GREEDY, diffusion_steps=steps)
    results = list(model.stream(PROMPTS, max_new_tokens=11, settings=settings))
    for prompt, result in zip(PROMPTS, results, strict=True):
        canvas = model.from_prompt(prompt, 11)
        fixed = [token for token, editable in zip(canvas.ids, canvas.editable, strict=True) if not editable]
        ids, passes = by_plain_forwards(model, fixed, 11, steps)
        assert result.predict == model.codec.decode(ids, follows=True)
        assert (result.n_tokens, result.num_forward_passes) == (len(ids), passes)
    assert any(result.n_tokens == 11 for result in results)


def test_the_last_blocks_positions_are_decoded_before_the_text_is_cut():
    canvas = canvas_of([[5, 6, 7], 3])
    whole = in_whole_blocks(canvas, B, None, shift=False)
    assert whole.ids == (5, 6, 7, 0, 0, 0, 0, 0) and whole.editable == (False,) * 3 + (True,) * 5
    assert len(in_whole_blocks(canvas, B, 7, shift=False)) == 7  # the model's positions
    assert len(in_whole_blocks(canvas, 5, None, shift=True)) == 6  # a block's first token needs none of the others
    assert len(in_whole_blocks(canvas, 5, None, shift=False)) == 10


@pytest.mark.parametrize("strategy", sorted(STRATEGIES))
def test_a_batch_equals_each_text_alone_and_a_limit_only_cuts(model, strategy):
    settings = dataclasses.replace(SAMPLED, denoising_strategy=strategy)

    def write(n_tokens, rows=range(4), **keys):
        canvases = [model.from_prompt(PROMPTS[row], n_tokens) for row in rows]
        return model.writer.write(canvases, dataclasses.replace(settings, **keys), sample_indices=rows, traced=True)

    together = write(13)
    plain = write(13, kv_cache="none")
    assert plain == together and sum(one.computed for one in plain) > sum(one.computed for one in together)
    for row in range(4):
        assert write(13, [row]) == [together[row]]
    for n_tokens in (1, 2, 6):
        for short, long in zip(write(n_tokens), together, strict=True):
            length = len(short.canvas)
            assert model.before_eos(short.ids[1:]) == model.before_eos(long.ids[1:length])
            assert all(position < length for _, position, _ in short.events)


def test_a_text_costs_no_more_where_the_limit_is_far(model):
    """Nothing is computed behind the current block, and nothing after the texts have ended."""
    end = model.tokenizer.eos_token_id
    suppressed = [i for i in range(len(model.tokenizer)) if i not in (end, *model.codec.encode("dog cat"))]
    settings = dataclasses.replace(SAMPLED, logits=LogitsConfig(3.0, suppress=tuple(suppressed)))
    near, far = (list(model.stream("dog", max_new_tokens=n, num_samples=6, settings=settings)) for n in (20, 60))
    ended = [index for index, text in enumerate(far) if text.n_tokens < 15]
    assert len(ended) > 1
    for index in ended:
        assert near[index] == far[index] and near[index].computed == far[index].computed


def test_edits_stay_within_the_block(model):
    settings = dataclasses.replace(SAMPLED, edit_threshold=0.01, edit_steps=2)
    canvas = model.from_prompt("dog cat", 14)
    result = model.sample_batch([canvas], settings, sample_indices=[0], traced=True)[0]
    assert result.edits > 0
    block_of = [place // B for place in range(len(canvas))]
    last_of_block = {}
    for step, position, _ in result.trace.events:
        block = block_of[position + canvas.n_start]
        assert all(step > other for number, other in last_of_block.items() if number < block)
        assert all(number <= block for number in last_of_block)
        last_of_block[block] = step


@pytest.mark.parametrize("strategy", ["low_confidence", "random"])
def test_steps_of_a_callback_stay_within_max_steps(model, strategy):
    settings = dataclasses.replace(SAMPLED, denoising_strategy=strategy, diffusion_steps=9)
    (canvas,), seen = model.canvases("dog", None, 9), []
    model.generate(
        "dog", max_new_tokens=9, settings=settings, callback=lambda *each: seen.append((each[0], each[1]()))
    )
    assert seen[-1][0] < model.max_steps([canvas], settings)
    assert all(len(pieces) == len(canvas) - canvas.n_start for _, (pieces,) in seen)


@pytest.mark.parametrize(
    ("keywords", "words"),
    [
        ({"block_length": 8}, ["block_length: 8", "train_block_length: 4"]),
        ({"early_stop": "predict"}, ["early_stop: predict", "early_stop: eos"]),
        ({"kv_cache": "dual"}, ["kv_cache: dual", "kv_cache: prefix"]),
        ({"kv_cache": "prefix", "cache_refresh": 2}, ["cache_refresh: 2"]),
        ({"early_stop": "grow"}, ["early_stop: grow"]),
        ({"guidance_scale": 2.0}, ["guidance_scale"]),
        ({"infill": "dog<|infill:3|> cat"}, ["infilling", "attention: block"]),
    ],
)
def test_what_block_models_do_not_take(model, keywords, words):
    options = {"prompt": None if "infill" in keywords else "dog", **keywords}
    with pytest.raises(ValueError) as error:
        model.generate(options.pop("prompt"), **options)
    assert all(word in str(error.value) for word in words) and "\n" not in str(error.value)


def test_a_gap_at_the_end_is_filled(model):
    assert f"blocks of {B} tokens" in repr(model)
    assert model.generate(infill="dog<|infill:3|>", settings=GREEDY)[0].startswith("dog")
    assert model.generate("dog", block_length=B, settings=GREEDY) == model.generate("dog", settings=GREEDY)


def test_the_shell_command_shows_a_text_once(folders, monkeypatch):
    monkeypatch.setattr(terminal.time, "sleep", lambda seconds: None)
    monkeypatch.setenv("TERM", "xterm")
    folder, options = str(folders["gpt2", True]), ["--max-new-tokens", "9", "--temperature", "0", "--steps", "2"]
    screen = Screen()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("sys.stdout", screen)
        assert generate_command.main([folder, "--prompt", "dog", "--show", *options]) == 0
        assert generate_command.main([folder, "--prompt", "dog", "--show", "--kv-cache", "dual", *options]) == 1
    text = load(folder).generate("dog", max_new_tokens=9, temperature=0, diffusion_steps=2)[0]
    shown, expected = ([c for c in text if c.isascii() and c.isalnum()] for text in (*screen.lines(), "dog" + text))
    assert shown == expected


def test_their_quality_is_compared(folders, tmp_path):
    judge = save_model(tmp_path / "ar", kind="ar", positions=96)
    keys = {
        "models": {"block": str(folders["llama", True]), "ar": {"model_name_or_path": str(judge), "kind": "ar"}},
        "judge_model": str(judge),
        "n_texts": 3,
        "length": 12,
        "diffusion_steps": [1, 3],
        "save_dir": str(tmp_path / "out"),
    }
    outcomes, _ = quality_run.compare(*read_keys(keys))
    assert [(outcome.model, outcome.steps) for outcome in outcomes] == [("block", 1), ("block", 3), ("ar", None)]
    # Twelve tokens after the start token: one block of three and two of four, each with its first token before it.
    assert outcomes[0].forwards <= 3 + 3 and outcomes[0].forwards < outcomes[1].forwards
