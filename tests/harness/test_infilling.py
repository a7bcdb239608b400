"""Tasks with a gap: the canvas of a context, and what is generated in it."""

import pytest

pytest.importorskip("lm_eval")
from lm_eval.api.instance import Instance

from llamafactory_ddm import LogitsConfig, SamplingSettings, load
from llamafactory_ddm.harness.infilling import split_at_gap, take_infill
from llamafactory_ddm.harness.model import DiffusionLM, read_generation_keys
from support.harness import random_model


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return random_model(tmp_path_factory.mktemp("model"))


def asked(*contexts, **options):
    options = {"do_sample": False, "infill": True, **options}
    return [
        Instance("generate_until", {"middle": " dog", "text": context}, (context, options), 0, ("task", row, 1))
        for row, context in enumerate(contexts)
    ]


def test_the_gap_of_a_context():
    assert split_at_gap("a <|infill|> b") == ("a ", None, " b")
    assert split_at_gap("<|infill:8|>b") == ("", 8, "b") and split_at_gap("a<|infill|>") == ("a", None, "")
    for wrong in ("a", "a<|infill|>b<|infill:3|>"):
        with pytest.raises(ValueError, match=r"gaps in place of one.*num_fewshot"):
            split_at_gap(wrong)
    for wrong in ("<|infill:0|>", "<|infill:-2|>", "<|infill|>< infill>"):
        with pytest.raises(ValueError, match="infill"):
            split_at_gap(wrong)


def test_the_key_of_a_task():
    assert take_infill({"infill": "{{a}}", "until": []}) == ("{{a}}", {"until": []})
    assert take_infill({}) == (False, {})
    assert read_generation_keys({"infill": True, "max_gen_toks": 7, "do_sample": False})[0] == 7
    with pytest.raises(ValueError, match="infill: 3"):
        read_generation_keys({"infill": 3})


@pytest.mark.parametrize("batch_size", [1, 4])
def test_gaps_are_filled_as_the_generator_fills_them(folder, batch_size):
    """The text before the gap and that after it are tokenised apart, as in DiffuLLaMA's evaluation."""
    model = DiffusionLM(str(folder), diffusion_steps=3, batch_size=batch_size)
    contexts = ("a cat<|infill:5|> and a dog", "<|infill:3|> dog")
    settings = SamplingSettings(diffusion_steps=3, logits=LogitsConfig(0.0))
    generator = load(folder)
    whole = generator.generate(infill=list(contexts), settings=settings)
    found = model.generate_until(asked(*contexts))
    assert [c.replace(f"<|infill:{n}|>", text) for c, n, text in zip(contexts, (5, 3), found, strict=True)] == whole
    assert model.get_model_info()["forward_passes"] == {"task": 6}


def test_what_follows_changes_the_gap(folder):
    one, other = DiffusionLM(str(folder), diffusion_steps=2).generate_until(
        asked("a<|infill:6|> dog", "a<|infill:6|> cat")
    )
    assert one != other


@pytest.mark.parametrize(
    ("context", "options", "keys", "length"),
    [
        ("a<|infill:5|>b", {"infill": "{{middle}}"}, {"max_new_tokens": 7}, 5),
        ("a<|infill|>b", {"infill": "{{middle}}"}, {}, 1),
        ("a<|infill|>b", {"infill": "{{middle}} cat"}, {}, 3),
        ("a<|infill|>b", {"infill": "{{middle}}"}, {"max_new_tokens": 7}, 7),
        ("a<|infill|>b", {"max_gen_toks": 4}, {}, 4),
    ],
)
def test_the_length_of_the_gap(folder, context, options, keys, length):
    """' dog' is one token, ' cat' the two tokens of its space and its word."""
    model = DiffusionLM(str(folder), **keys)
    (request,) = asked(context, **options)
    infill, _ = take_infill(request.args[1])
    canvas = model._canvas_with_gap(request, context, infill, read_generation_keys(request.args[1])[0])
    assert canvas.n_editable == length and canvas.editable[-1] is False and canvas.editable[:2] == (False, False)


def test_too_much_context_loses_its_beginning(folder, caplog):
    model = DiffusionLM(str(folder))
    (request,) = asked("x" * 60 + "<|infill:5|> dog")
    canvas = model._canvas_with_gap(request, request.args[0], True, 9)
    assert len(canvas) == 48 and canvas.n_editable == 5 and "document 0" in caplog.text
    (request,) = asked("x<|infill:5|>" + "y" * 60)
    with pytest.raises(ValueError, match="task: task, document 0"):
        model._canvas_with_gap(request, request.args[0], True, 9)


def test_errors_name_the_document(folder):
    model = DiffusionLM(str(folder))
    for context, options in (("a", {}), ("a<|infill|>", {"infill": "{{''}}"})):
        with pytest.raises(ValueError, match="task: task, document 0: the"):
            model.generate_until(asked(context, **options))
