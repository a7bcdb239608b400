"""Texts from a model in memory and from a folder, as a notebook gets them."""

import dataclasses
import tracemalloc
from functools import partial

import pytest
import torch
from tokenizers import Tokenizer, decoders, models, normalizers
from transformers import GPT2Config, GPT2LMHeadModel, PreTrainedTokenizerFast

import llamafactory_ddm
from llamafactory_ddm import LogitsConfig, SamplingSettings, load
from llamafactory_ddm.generation import canvas_size
from llamafactory_ddm.generation.generator import TextGenerator
from llamafactory_ddm.generation.writer import FilledCanvas
from llamafactory_ddm.modeling.bidirectional import make_bidirectional
from llamafactory_ddm.modeling.diffusion_config import DiffusionConfig, VariableLength
from llamafactory_ddm.modeling.prompt_template import Part, PromptTemplate
from llamafactory_ddm.sampling import prediction
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
def test_a_batch_of_prompts_equals_each_prompt_alone(generator, strategy, block_length):
    settings = dataclasses.replace(GREEDY, denoising_strategy=strategy, block_length=block_length)
    canvases = [generator.from_prompt(prompt, 7) for prompt in PROMPTS]
    canvases.append(generator.from_marked("cat<|infill:3|>dog<|infill:2|>"))
    canvases.append(generator.from_marked("<|infill:4|> dog"))
    together = generator.sample_batch(canvases, settings, sample_indices=range(len(canvases)))
    for number, canvas in enumerate(canvases):
        alone = generator.sample_batch([canvas], settings, sample_indices=[number])[0]
        assert alone == together[number]
        assert alone.text


def test_fixed_tokens_never_change(generator):
    settings = dataclasses.replace(GREEDY, logits=LogitsConfig(2.0))
    texts = [generator.from_marked("dog<|infill:3|> dog cat<|infill:2|>.")] * 5
    for result in generator.sample_batch(texts, settings, sample_indices=range(5)):
        assert result.text.startswith("dog") and result.text.endswith(".") and " dog cat" in result.text
        assert result.predict.count("\n") >= 1 and result.n_tokens == 5


def test_texts_depend_on_seed_and_sample_index_not_on_the_batch(generator):
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


def test_a_text_ends_at_the_first_eos(generator, monkeypatch):
    end = generator.tokenizer.eos_token_id
    ids = [*generator.codec.encode("dog cat"), end, *generator.codec.encode("cat")]
    canvas = generator.from_prompt("dog", len(ids))
    given = list(canvas.ids[: len(canvas) - len(ids)])
    result = generator.generated(FilledCanvas(canvas, [*given, *ids], [-1] * len(given) + [0] * len(ids), 3, 0))
    assert (result.predict, result.text, result.num_forward_passes) == ("dog cat", "dogdog cat", 3)


def test_an_eos_inside_a_gap_does_not_end_the_text(generator):
    end = generator.tokenizer.eos_token_id
    canvas = generator.from_marked("dog<|infill:2|> cat")
    ids = [end if editable else token for token, editable in zip(canvas.ids, canvas.editable, strict=True)]
    result = generator.generated(FilledCanvas(canvas, ids, [-1] * len(ids), 1, 0))
    assert (result.predict, result.text, result.n_tokens) == ("", "dog cat", 2)


def test_tokens_after_eos_are_not_counted(generator):
    end = generator.tokenizer.eos_token_id
    ids = [*generator.codec.encode("dog"), end, end, end]
    canvas = generator.from_prompt("cat", len(ids))
    given = list(canvas.ids[: len(canvas) - len(ids)])
    result = generator.generated(FilledCanvas(canvas, [*given, *ids], [0] * len(canvas), 1, 0))
    assert result.n_tokens == len(ids) - 3


@pytest.mark.parametrize("text", ["café 日本 dog", "dog\u2028cat\n  dog", "🏽👍", "é"])
def test_pieces_join_to_the_text_in_any_script(generator, text):
    ids = generator.codec.encode(text)
    assert "".join(generator.codec.pieces(ids)) == text
    gap = [*ids[:2], generator.config.mask_token_id, *ids[2:]]
    assert generator.codec.pieces(gap)[2] is None


def metaspace_generator():
    """A model with a tokenizer that marks the space before a word and drops it at the beginning, as Llama 2's does."""
    words = ["<s>", "</s>", "<unk>", "\n", "▁", "▁the", "▁dog", "▁cat", *"▁abcdefghijklmnopqrstuvwxyz"[1:]]
    vocab = {word: i for i, word in enumerate(words)}
    merges = [("▁", "t"), ("▁t", "h"), ("▁th", "e"), ("▁", "d"), ("▁d", "o"), ("▁do", "g")]
    merges += [("▁", "c"), ("▁c", "a"), ("▁ca", "t")]
    for pair in merges:
        vocab.setdefault("".join(pair), len(vocab))
    inner = Tokenizer(models.BPE(vocab=vocab, merges=merges, unk_token="<unk>"))
    inner.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    inner.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.Fuse(), decoders.Strip(" ", 1, 0)])
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=inner, bos_token="<s>", eos_token="</s>", unk_token="<unk>")
    model = make_model(tokenizer)
    make_bidirectional(model)
    return TextGenerator(model, tokenizer, config_for(tokenizer))


def test_spaces_are_kept_by_tokenizers_that_mark_them():
    generator = metaspace_generator()
    ids = generator.codec.encode("the dog cat dog")
    assert "".join(generator.codec.pieces(ids)) == "the dog cat dog"
    canvas = generator.from_marked("the d<|infill:1|>g cat<|infill:2|>")
    given = [token for token, editable in zip(canvas.ids[1:], canvas.editable[1:], strict=True) if not editable]
    assert generator.tokenizer.decode(given) == "the dg cat"
    blank = iter([*generator.codec.encode_after("o"), *generator.codec.encode_after(" dog the")])
    ids = [next(blank) if editable else i for i, editable in zip(canvas.ids, canvas.editable, strict=True)]
    events = tuple((0, position, ids[position]) for position, editable in enumerate(canvas.editable) if editable)
    result = generator.generated(FilledCanvas(canvas, ids, [0] * len(ids), 1, 0, events=events))
    assert (result.text, result.predict) == ("the dog cat dog the", "o\n dog the")
    assert "".join(result.trace.frame(1)) == result.text


def test_embeddings_without_a_token_are_never_generated():
    tokenizer = tiny_tokenizer()
    torch.manual_seed(0)
    config = GPT2Config(vocab_size=len(tokenizer) + 300, n_positions=32, n_embd=16, n_layer=1, n_head=1)
    model = GPT2LMHeadModel(config).eval()
    make_bidirectional(model)
    generator = TextGenerator(model, tokenizer, config_for(tokenizer))
    written = []
    generator.generated = lambda one, *rest: written.extend(one.ids)
    settings = SamplingSettings(logits=LogitsConfig(5.0), diffusion_steps=30)
    generator.sample_batch([generator.from_noise(32)] * 4, settings, sample_indices=range(4))
    assert len(written) == 128 and max(written) < len(tokenizer)


def test_sampling_leaves_autograd_as_it_was(generator):
    """A head that is no plain Linear takes the other way through the denoiser, guided or not."""

    class Head(torch.nn.Linear):
        pass

    generator.model.lm_head.__class__ = Head
    for scale in (1.0, 2.0):
        settings = SamplingSettings(logits=LogitsConfig(guidance_scale=scale), diffusion_steps=4)
        generator.generate("dog cat", max_new_tokens=4, settings=settings)
        assert not torch.is_inference_mode_enabled() and torch.is_grad_enabled()
        layer = torch.nn.Linear(2, 2)
        layer(torch.ones(1, 2)).sum().backward()
        assert layer.weight.grad is not None


def test_the_start_token_is_not_penalised_as_a_repetition(generator):
    """GPT-2's start token is also EOS, which a penalty would suppress."""
    seen = []
    plain = prediction.penalise_repetition

    def watched(logits, ids, penalty):
        seen.append(ids)
        return plain(logits, ids, penalty)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(prediction, "penalise_repetition", watched)
        settings = SamplingSettings(logits=LogitsConfig(0.0, repetition_penalty=9.0), diffusion_steps=1)
        generator.generate("dog", max_new_tokens=3, settings=settings)
    real = set(seen[0].flatten().tolist()) - {torch.iinfo(torch.int64).max}
    assert real == set(generator.codec.encode("dog"))


def test_a_trace_replays_to_the_text(generator):
    canvas = generator.from_marked("dog<|infill:4|> cat")
    seen = []
    result = generator.sample_batch(
        [canvas], GREEDY, sample_indices=[0], traced=True, callback=lambda step, pieces: seen.append(pieces()[0])
    )[0]
    trace = result.trace
    assert "".join(piece for piece in trace.frame(trace.steps)) == result.text
    assert trace.frame(0).count(None) == 4
    # Half a letter looks different until its other half is there.
    assert trace.frame(trace.steps) == seen[-1]
    for step, pieces in enumerate(seen):
        assert [p is None for p in trace.frame(step + 1)] == [p is None for p in pieces]
    longer = [canvas, generator.from_noise(20)]
    together = generator.sample_batch(longer, GREEDY, sample_indices=[0, 1], traced=True)[0]
    assert together == result


REVISING = {
    "threshold": {"edit_threshold": 0.02, "edit_steps": 3},
    "ratio": {"edit_ratio": 0.5, "edit_steps": 2},
    "remdm": {"denoising_strategy": "remdm", "remask_cap": 0.5},
    "both": {"denoising_strategy": "remdm", "remask_cap": 0.5, "edit_threshold": 0.02, "edit_steps": 1},
}


@pytest.mark.parametrize("block_length", [None, 4])
@pytest.mark.parametrize("kind", REVISING)
def test_a_trace_shows_edits_and_remasking(generator, kind, block_length):
    """A text in a batch has the same trace as alone."""
    keys = {**REVISING[kind], "block_length": block_length, "early_stop": "none"}
    settings = SamplingSettings(logits=LogitsConfig(8.0), diffusion_steps=16, **keys)
    canvases = [generator.from_marked("dog<|infill:8|> cat"), generator.from_noise(14)]
    seen = []
    together = generator.sample_batch(
        canvases, settings, sample_indices=[0, 1], traced=True, callback=lambda step, pieces: seen.append(pieces())
    )
    for number, result in enumerate(together):
        trace = result.trace
        assert "".join(trace.frame(trace.steps)) == "".join(seen[-1][number])
        blanks = [[piece is None for piece in trace.frame(step + 1)] for step in range(trace.steps)]
        assert blanks == [[piece is None for piece in pieces[number]] for pieces in seen[: trace.steps]]
        written = [position for _, position, piece in trace.events if piece is not None]
        masked = len(trace.events) - len(written)
        assert result.edits == len(written) - masked - canvases[number].n_editable
        assert (result.edits > 0) == ("edit_steps" in keys) and (masked > 0) == ("remask_cap" in keys)
        alone = generator.sample_batch([canvases[number]], settings, sample_indices=[number], traced=True)[0]
        assert alone == result
    untraced = generator.sample_batch(canvases, settings, sample_indices=[0, 1])
    assert [one.text for one in untraced] == [one.text for one in together] and untraced[0].trace is None


def mixed(generator, ratio):
    config = dataclasses.replace(generator.config, noise_process="mixed", uniform_ratio=ratio)
    return TextGenerator(generator.model, generator.tokenizer, config)


def test_a_model_of_mixed_noise_edits_by_its_own_ratio(generator):
    settings = SamplingSettings(logits=LogitsConfig(8.0), diffusion_steps=20, early_stop="none")

    def edits(model, **keys):
        canvases = [model.from_noise(40)]
        result = model.sample_batch(canvases, dataclasses.replace(settings, **keys), sample_indices=[0])[0]
        return result.edits, result.text

    plain, tenth, most = generator, mixed(generator, 0.1), mixed(generator, 0.9)
    assert edits(plain)[0] == 0 < edits(tenth)[0] <= 4 < edits(most)[0]
    assert edits(tenth) == edits(plain, edit_ratio=0.1) and edits(most) == edits(plain, edit_ratio=0.5)
    assert edits(tenth, edit_ratio=0.0) == edits(plain)
    assert edits(tenth, edit_threshold=0.02) == edits(plain, edit_threshold=0.02)
    further = dataclasses.replace(settings, edit_steps=1)
    tenth.check([tenth.from_noise(9)], further)
    with pytest.raises(ValueError, match="edit_steps: 1"):
        plain.check([plain.from_noise(9)], further)


def test_texts_come_one_batch_after_another(generator):
    """The same texts as in one list, without storing them."""
    settings = dataclasses.replace(GREEDY, logits=LogitsConfig(0.9))
    keys = {"max_new_tokens": 5, "batch_size": 2, "settings": settings}
    whole = generator.generate(PROMPTS[:3], num_samples=3, **keys)
    assert [one.predict for one in generator.stream(PROMPTS[:3], num_samples=3, **keys)] == whole
    tracemalloc.start()
    endless = generator.stream(num_samples=10**9, **keys)
    assert [next(endless).predict for _ in range(3)] == generator.generate(num_samples=3, **keys)
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert peak < 2_000_000
    with pytest.raises(ValueError, match="num_samples: 5000000000"):
        generator.stream(num_samples=5 * 10**9, **keys)


def test_edits_follow_the_uniform_ratio_of_any_noise_process(generator):
    """A user's own noise process may also use random tokens."""
    config = dataclasses.replace(generator.config, noise_process="own", uniform_ratio=0.3)
    own = TextGenerator(generator.model, generator.tokenizer, config)
    assert own.writer.edits(GREEDY).ratio == 0.3
    assert generator.writer.edits(GREEDY).ratio == 0.0


def test_a_model_that_never_saw_mask_cannot_start_from_it(generator):
    uniform = mixed(generator, 1.0)
    for settings in (GREEDY, dataclasses.replace(GREEDY, edit_ratio=0.3)):
        with pytest.raises(ValueError, match="uniform_ratio: 1 "):
            uniform.generate("dog", max_new_tokens=4, settings=settings)


@pytest.mark.parametrize(
    ("call", "words"),
    [
        (lambda g: g.generate(""), "text 0: the prompt is empty"),
        (
            lambda g: g.generate(["dog", "dog " * 60], max_new_tokens=5),
            r"text 1: .*\b48 positions",
        ),
        (lambda g: g.generate("dog", max_new_tokens=60), r"\b48 positions"),
        (lambda g: g.generate(infill="dog"), r"text 0: .*<\|infill"),
        (
            lambda g: g.generate(["cat", "a <|infill:2|> dog"], max_new_tokens=5),
            r"text 1: .*<\|infill:2\|>",
        ),
        (
            lambda g: g.generate(
                "dog",
                max_new_tokens=5,
                settings=SamplingSettings(logits=LogitsConfig(suppress=tuple(range(len(g.tokenizer))))),
            ),
            r"suppress_tokens: \d+",
        ),
        (lambda g: g.generate("dog", infill="dog"), "prompt and infill"),
        (lambda g: g.generate("dog", max_new_tokens=0), "max_new_tokens"),
        (lambda g: g.from_prompt([3, len(g.tokenizer)], 2), r"mask token '<\|mask\|>'"),
        (
            lambda g: g.generate("dog", settings=SamplingSettings("topp"), max_new_tokens=5),
            "denoising_strategy .*'topk'",
        ),
        (
            lambda g: g.generate(
                "dog", settings=SamplingSettings(block_length=1, diffusion_steps=3), max_new_tokens=9
            ),
            "diffusion_steps: 3 .*9 blocks",
        ),
        (
            lambda g: g.generate(settings=SamplingSettings(logits=LogitsConfig(guidance_scale=2.0)), max_new_tokens=9),
            "guidance_scale",
        ),
    ],
)
def test_mistakes(generator, call, words):
    with pytest.raises(ValueError, match=words):
        call(generator)


def test_nan_logits_name_the_step(generator):
    with torch.no_grad():
        generator.model.transformer.ln_f.weight[0] = float("nan")
    with pytest.raises(ValueError, match=r"step 0 .*NaN"):
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


def test_folders_without_a_diffusion_model(tmp_path):
    with pytest.raises(ValueError, match="is not a folder; "):
        load(tmp_path / "nowhere")
    with pytest.raises(ValueError, match="HF_HUB_OFFLINE"):
        load("owner/nothing-of-this-name")
    save(tmp_path / "plain", config=False)
    with pytest.raises(ValueError, match=r"diffusion_config\.json"):
        load(tmp_path / "plain")
    save(tmp_path / "cut")
    weights = tmp_path / "cut" / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-100])
    with pytest.raises(ValueError, match=r"model\.safetensors"):
        load(tmp_path / "cut")


def test_public_names_come_lazily():
    assert set(llamafactory_ddm.__all__) <= {*dir(llamafactory_ddm), *llamafactory_ddm._HOMES}
    with pytest.raises(AttributeError, match="'lod'"):
        llamafactory_ddm.lod  # noqa: B018


def test_predicting_lengths_needs_an_eos_token():
    tokenizer = tiny_tokenizer()
    config, model = config_for(tokenizer, shift=False), make_model(tokenizer)
    make_bidirectional(model)
    tokenizer.eos_token = None
    generator = TextGenerator(model, tokenizer, config)
    for way in ("predict", "grow"):
        with pytest.raises(ValueError, match=rf"early_stop: {way} .*tokenizer"):
            generator.generate("dog", max_new_tokens=4, settings=SamplingSettings(early_stop=way))


def test_single_settings_as_keyword_arguments(generator):
    settings = dataclasses.replace(GREEDY, block_length=3, logits=LogitsConfig(0.0, suppress=(5,)))
    expected = generator.generate("dog", max_new_tokens=6, settings=settings)
    keywords = {"temperature": 0, "top_p": 1.0, "diffusion_steps": 20, "block_length": 3, "suppress_tokens": [5]}
    assert generator.generate("dog", max_new_tokens=6, **keywords) == expected
    assert generator.generate("dog", max_new_tokens=6, settings=settings, logits_temp=0) == expected
    assert generator.settings() == SamplingSettings()
    assert generator.settings(suppress_tokens="cat, dog").logits.suppress == (258, 260)
    with pytest.raises(TypeError, match=r"'temprature'.*'temperature'"):
        generator.generate("dog", temprature=0)
    with pytest.raises(ValueError, match="suppress_tokens: 'cow'"):
        generator.generate("dog", suppress_tokens="cow")


def test_repr_names_model_noise_and_eos(generator):
    description = repr(generator)
    assert "GPT2LMHeadModel of 0.0 million parameters, float32 on cpu" in description
    assert "masked noise, mask <|mask|>" in description and "EOS <|endoftext|>" in description


def test_start_token_and_eos_are_those_of_the_checkpoint():
    tokenizer = tiny_tokenizer()
    model = make_model(tokenizer)
    make_bidirectional(model)
    config = dataclasses.replace(
        config_for(tokenizer), start_token="a", start_token_id=5, end_tokens=("b", "c"), end_token_ids=(6, 7)
    )
    generator = TextGenerator(model, tokenizer, config)
    assert generator.from_prompt("dog", 3).ids[0] == 5
    assert generator.eos_ids == (6, 7)
    assert generator.before_eos([1, 0, 7, 1]) == [1, 0]
    assert generator.codec.decode([261, 6], follows=False) == tokenizer.decode([261])


def test_prompts_get_the_template_unless_raw(generator):
    parts = (Part("<|endoftext|>"), Part(None, ("cat", "dog")), Part(None, ("cat",)))
    config = dataclasses.replace(generator.config, template=PromptTemplate("x", parts))
    own = TextGenerator(generator.model, generator.tokenizer, config)
    codec = own.codec
    given = own.from_templated("ca", 3).ids[:-3]
    assert list(given) == [0, *codec.encode("catcadog"), *codec.encode("cat")]
    plain = generator.from_prompt("ca", 3)
    assert own.with_template(None).from_templated("ca", 3) == generator.from_templated("ca", 3) == plain
    assert own.generate("ca", max_new_tokens=5, settings=GREEDY, raw=True) == generator.generate(
        "ca", max_new_tokens=5, settings=GREEDY
    )


def test_the_defaults_are_one_set_in_yaml_shell_and_python(generator):
    from llamafactory_ddm.cli.generate import _parser, build_settings
    from llamafactory_ddm.integration.hparams.diffusion import DiffusionArguments

    yaml = DiffusionArguments().sampling_settings(None, frozenset(), seed=0, tokenizer=generator.tokenizer)
    assert yaml == build_settings(_parser().parse_args(["x"])) == generator.settings() == SamplingSettings()


CACHED = {
    "plain": {},
    "edits": {"edit_threshold": 0.02, "edit_steps": 2},
    "remdm": {"denoising_strategy": "remdm", "remask_cap": 0.5},
    "threshold": {"denoising_strategy": "confidence_threshold", "confidence_threshold": 0.05},
}


@pytest.mark.parametrize("kind", CACHED)
def test_a_cache_that_is_computed_again_in_every_pass_changes_no_text(generator, kind):
    settings = SamplingSettings(logits=LogitsConfig(0.9), diffusion_steps=20, block_length=3, **CACHED[kind])
    canvases = [generator.from_prompt(prompt, 7) for prompt in PROMPTS]
    canvases += [generator.from_marked("cat<|infill:3|>dog<|infill:2|> cat"), generator.from_noise(9)]

    def texts(canvases=canvases, indices=range(6), **keys):
        return generator.sample_batch(canvases, dataclasses.replace(settings, **keys), sample_indices=indices)

    plain = texts()
    assert texts(kv_cache="none") == plain
    for cache in ("prefix", "dual"):
        exact = texts(kv_cache=cache, cache_refresh=1)
        assert exact == plain and [one.computed for one in exact] == [one.computed for one in plain]
        reused = texts(kv_cache=cache)
        assert sum(one.computed for one in reused) < sum(one.computed for one in plain)
        assert [texts([canvas], [i], kv_cache=cache)[0] for i, canvas in enumerate(canvases)] == reused


@pytest.mark.parametrize("early_stop", ["predict", "grow"])
def test_a_cache_with_a_canvas_of_predicted_length(generator, early_stop):
    ends = VariableLength("eos_eos", (), (), 40, None)
    config = dataclasses.replace(generator.config, variable_length=ends)
    generator.tokenizer.add_tokens(["<|mask|>"])
    made = TextGenerator(generator.model, generator.tokenizer, config)
    keys = {
        "early_stop": early_stop,
        "length_coverage": 0.3,
        "block_length": 4,
        "max_new_tokens": 20,
        "temperature": 0,
    }
    keys |= {"grow_length": 8} if early_stop == "grow" else {}
    plain = list(made.stream(PROMPTS, **keys))
    exact = list(made.stream(PROMPTS, kv_cache="dual", cache_refresh=1, **keys))
    reused = list(made.stream(PROMPTS, kv_cache="dual", **keys))
    assert exact == plain and [one.computed for one in exact] == [one.computed for one in plain]
    assert sum(one.computed for one in reused) < sum(one.computed for one in plain)


def test_a_cache_with_guidance(generator):
    keys = {"max_new_tokens": 8, "block_length": 4, "guidance_scale": 2.0}
    plain = generator.generate(PROMPTS, **keys)
    assert generator.generate(PROMPTS, kv_cache="dual", cache_refresh=1, **keys) == plain
    assert len(generator.generate(PROMPTS, kv_cache="dual", **keys)) == len(PROMPTS)


def test_mistakes_with_caches(generator, monkeypatch):
    for keys, words in (
        ({"kv_cache": "duel"}, "kv_cache .*'duel'.*'dual'"),
        ({"cache_refresh": 4}, "cache_refresh: 4 .*kv_cache: prefix and dual"),
        ({"cache_refresh": 4, "kv_cache": "none"}, "cache_refresh: 4 .*kv_cache: prefix and dual"),
        ({"cache_refresh": 0, "kv_cache": "dual"}, "cache_refresh .*at least 1"),
    ):
        with pytest.raises(ValueError, match=words):
            generator.generate("dog", max_new_tokens=4, **keys)
    monkeypatch.setattr(generator.model.config, "_attn_implementation", "flash_attention_2")
    canvases, settings = [generator.from_noise(9)], SamplingSettings(kv_cache="dual")
    for call in (generator.check, partial(generator.sample_batch, sample_indices=[0])):
        with pytest.raises(ValueError, match=r"kv_cache: dual .*flash_attn: sdpa"):
            call(canvases, settings)


def test_the_cache_is_tried_once(generator, monkeypatch):
    made, tries = TextGenerator(generator.model, generator.tokenizer, generator.config), []
    monkeypatch.setattr(canvas_size, "why_uncacheable", lambda model: tries.append(model) or "")
    made.generate(PROMPTS, max_new_tokens=4, batch_size=1, kv_cache="prefix")
    assert tries == [generator.model]
    monkeypatch.setattr(canvas_size, "why_uncacheable", lambda model: "it has no keys")
    other = TextGenerator(generator.model, generator.tokenizer, generator.config)
    for _ in range(2):
        with pytest.raises(ValueError, match=r"kv_cache: dual .*it has no keys"):
            other.generate(PROMPTS, max_new_tokens=4, kv_cache="dual")
