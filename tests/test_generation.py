"""Texts from a model in memory and from a folder, as a notebook gets them."""

import dataclasses

import pytest
import torch
from transformers import GPT2Config, GPT2LMHeadModel

import llamafactory_ddm
from llamafactory_ddm import LogitsConfig, SamplingSettings, load
from llamafactory_ddm.generation import TextGenerator
from llamafactory_ddm.modeling.bidirectional import make_bidirectional
from llamafactory_ddm.modeling.diffusion_config import DiffusionConfig
from support.tiny import tiny_tokenizer


def make_model(tokenizer):
    torch.manual_seed(0)
    return GPT2LMHeadModel(
        GPT2Config(
            vocab_size=len(tokenizer) + 1, n_positions=48, n_embd=32, n_layer=2, n_head=2, initializer_range=0.4
        )
    ).eval()


def config_for(tokenizer, shift=True):
    return DiffusionConfig(
        mask_token="<|mask|>",
        mask_token_id=len(tokenizer),
        shift=shift,
        noise_process="masked",
        uniform_ratio=0.0,
        noise_schedule="linear",
        attention_ratio=1.0,
    )


@pytest.fixture(params=[True, False], ids=["shift", "no-shift"])
def generator(request):
    tokenizer = tiny_tokenizer()
    model = make_model(tokenizer)
    make_bidirectional(model)
    return TextGenerator(model, tokenizer, config_for(tokenizer, request.param))


GREEDY = SamplingSettings(logits=LogitsConfig(0.0), diffusion_steps=20)
PROMPTS = ["dog", "cat dog cat dog", "a", "dog dog dog dog dog dog dog"]


@pytest.mark.parametrize("strategy", ["low_confidence", "topk", "confidence_threshold", "entropy_bound", "margin"])
@pytest.mark.parametrize("block_length", [None, 3])
def test_a_batch_of_prompts_gives_what_each_gives_alone(generator, strategy, block_length):
    settings = dataclasses.replace(GREEDY, denoising_strategy=strategy, block_length=block_length)
    canvases = [generator.from_prompt(prompt, 7) for prompt in PROMPTS]
    canvases.append(generator.from_marked("cat<|infill:3|>dog<|infill:2|>"))
    canvases.append(generator.from_marked("<|infill:4|> dog"))
    together = generator.sample_batch(canvases, settings, ordinals=range(len(canvases)))
    for number, canvas in enumerate(canvases):
        alone = generator.sample_batch([canvas], settings, ordinals=[number])[0]
        assert alone == together[number]
        assert alone.text


def test_a_prompt_and_what_stands_between_gaps_never_change(generator):
    settings = dataclasses.replace(GREEDY, logits=LogitsConfig(2.0))
    texts = [generator.from_marked("dog<|infill:3|> dog cat<|infill:2|>.")] * 5
    for result in generator.sample_batch(texts, settings, ordinals=range(5)):
        assert result.text.startswith("dog") and result.text.endswith(".") and " dog cat" in result.text
        assert result.predict.count("\n") >= 1 and result.n_tokens == 5


def test_the_seed_and_the_number_decide_not_the_batch(generator):
    settings = dataclasses.replace(GREEDY, logits=LogitsConfig(1.0, 0.9))
    five = generator.generate(num_samples=5, max_new_tokens=9, settings=settings)
    assert generator.generate(num_samples=5, max_new_tokens=9, batch_size=2, settings=settings) == five
    assert len(set(five)) > 1
    other = dataclasses.replace(settings, seed=1)
    assert generator.generate(num_samples=5, max_new_tokens=9, settings=other) != five


def test_prompts_and_gaps_in_one_call(generator):
    one = generator.generate("dog", max_new_tokens=5, settings=GREEDY)
    assert generator.generate(["dog", "cat"], max_new_tokens=5, settings=GREEDY)[0] == one[0]
    filled = generator.generate(infill="dog<|infill:2|> dog", settings=GREEDY)
    assert len(filled) == 1 and filled[0].startswith("dog") and filled[0].endswith(" dog")


def test_a_text_ends_at_the_first_end_token(generator, monkeypatch):
    end = generator.tokenizer.eos_token_id
    ids = [*generator.encode("dog cat"), end, *generator.encode("cat")]
    canvas = generator.from_prompt("dog", len(ids))
    given = list(canvas.ids[: len(canvas) - len(ids)])
    result = generator._generated(canvas, [*given, *ids], [-1] * len(given) + [0] * len(ids), 3, 1, False)
    assert (result.predict, result.text, result.forwards) == ("dog cat", "dogdog cat", 3)


def test_a_trace_replays_to_the_text(generator):
    canvas = generator.from_marked("dog<|infill:4|> cat")
    seen = []
    result = generator.sample_batch(
        [canvas], GREEDY, ordinals=[0], traced=True, callback=lambda step, pieces: seen.append(pieces()[0])
    )[0]
    trace = result.trace
    assert "".join(piece for piece in trace.frame(trace.steps)) == result.text
    assert trace.frame(0).count(None) == 4
    assert [trace.frame(step + 1) for step in range(trace.steps)] == seen


@pytest.mark.parametrize(
    ("call", "words"),
    [
        (lambda g: g.generate(""), "text 0: the prompt is empty"),
        (
            lambda g: g.generate(["dog", "dog " * 60], max_new_tokens=5),
            "text 1: .* more than the model's 48 positions",
        ),
        (lambda g: g.generate("dog", max_new_tokens=60), "more than the model's 48 positions"),
        (lambda g: g.generate(infill="dog"), "nothing to fill in"),
        (lambda g: g.generate("dog", infill="dog"), "either prompt or infill"),
        (lambda g: g.generate("dog", max_new_tokens=0), "must be at least 1"),
        (lambda g: g.from_prompt([3, len(g.tokenizer)], 2), r"holds the mask token '<\|mask\|>'"),
        (lambda g: g.generate("dog", settings=SamplingSettings("topp"), max_new_tokens=5), "did you mean 'topk'"),
        (
            lambda g: g.generate(
                "dog", settings=SamplingSettings(block_length=1, diffusion_steps=3), max_new_tokens=9
            ),
            "3 steps cannot finish 9 blocks",
        ),
        (
            lambda g: g.generate(settings=SamplingSettings(logits=LogitsConfig(guidance_scale=2.0)), max_new_tokens=9),
            "needs a prompt",
        ),
    ],
)
def test_mistakes(generator, call, words):
    with pytest.raises(ValueError, match=words):
        call(generator)


def test_nan_logits_name_the_step(generator):
    with torch.no_grad():
        generator.model.transformer.ln_f.weight[0] = float("nan")
    with pytest.raises(ValueError, match="in step 0 the denoiser returned logits that hold NaN"):
        generator.generate("dog", max_new_tokens=4, settings=GREEDY)


def save(folder, config=True):
    tokenizer = tiny_tokenizer()
    model = make_model(tokenizer)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    if config:
        config_for(tokenizer).save(folder)


def test_three_lines_are_enough(tmp_path):
    save(tmp_path)
    model = load(tmp_path)
    assert isinstance(model.generate("dog", max_new_tokens=4)[0], str)
    assert model.generate("dog", max_new_tokens=4) == load(str(tmp_path)).generate("dog", max_new_tokens=4)


def test_folders_that_are_no_model(tmp_path):
    with pytest.raises(ValueError, match="is not a folder"):
        load(tmp_path / "nowhere")
    save(tmp_path / "plain", config=False)
    with pytest.raises(ValueError, match=r"holds no diffusion_config.json"):
        load(tmp_path / "plain")
    save(tmp_path / "cut")
    weights = tmp_path / "cut" / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-100])
    with pytest.raises(ValueError, match=r"model\.safetensors"):
        load(tmp_path / "cut")


def test_public_names_come_lazily():
    assert set(llamafactory_ddm.__all__) <= {*dir(llamafactory_ddm), *llamafactory_ddm._HOMES}
    with pytest.raises(AttributeError, match="has no attribute 'lod'"):
        llamafactory_ddm.lod  # noqa: B018
