"""`sample_steps` in memory: what is generated, when, where it is written, and that training does not notice."""

import json
from pathlib import Path

import pytest
import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from llamafactory_ddm.data.collators import ResponseCollator
from llamafactory_ddm.generation.generator import TextGenerator
from llamafactory_ddm.integration.train import samples
from llamafactory_ddm.integration.train.samples import FILE, TrainingSamples, build_sample_requests
from llamafactory_ddm.modeling.diffusion_config import DiffusionConfig
from llamafactory_ddm.modeling.prompt_template import Part, PromptTemplate
from llamafactory_ddm.sampling import SamplingSettings
from support.tiny import MASK_ID, Rows, tiny_model

SETTINGS = SamplingSettings(diffusion_steps=3, seed=5)


def words():
    """A tokenizer of the words w1 to w38; 0 is EOS, 39 is [MASK]."""
    vocabulary = {"<eos>": 0, **{f"w{n}": n for n in range(1, MASK_ID)}, "<|mask|>": MASK_ID}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="<eos>"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<eos>", pad_token="<eos>")


def generator_of(model, template=None):
    config = DiffusionConfig(
        mask_token="<|mask|>",
        mask_token_id=MASK_ID,
        shift=True,
        noise_process="masked",
        uniform_ratio=0.0,
        noise_schedule="linear",
        attention_ratio=0.0,
        template=template,
    )
    training = model.training
    generator = TextGenerator(model, words(), config)
    model.train(training)
    return generator


@pytest.fixture
def requests_of():
    """Return a function that builds requests with some keys."""

    def build(rows=(), template=None, **keys):
        arguments = {"prompts": None, "count": None, "n_tokens": None, "cutoff_len": 16, **keys}
        return build_sample_requests(generator_of(tiny_model(), template), rows, **arguments)

    return build


def sampling(make_trainer, steps=1, count=2, model=None, **keys):
    """A trainer that generates."""
    trainer = make_trainer(model=model, **keys)
    generator = generator_of(trainer.model)
    requests = build_sample_requests(generator, (), prompts=None, count=count, n_tokens=6, cutoff_len=16)
    trainer.add_callback(TrainingSamples(trainer, generator, requests, SETTINGS, steps))
    return trainer


def lines(trainer):
    with open(f"{trainer.args.output_dir}/{FILE}", encoding="utf-8") as file:
        return [json.loads(line) for line in file]


def dropping():
    model = tiny_model()
    for module in model.modules():
        if isinstance(module, torch.nn.Dropout):
            module.p = 0.2
    model.train()
    return model


def test_noise_is_the_default_and_fills_a_training_row(requests_of):
    requests = requests_of()
    assert len(requests) == 4
    assert {(len(each.canvas), each.canvas.n_editable, each.prompt) for each in requests} == {(16, 15, None)}
    few = requests_of(count=2, n_tokens=6)
    assert [each.canvas.n_editable for each in few] == [6, 6]
    with pytest.raises(ValueError, match="sample_length: 40"):
        requests_of(n_tokens=40)


def test_prompts_are_continued_or_put_into_the_template(requests_of):
    first, second = requests_of(prompts=["w1 w2", "w3"])
    assert first.canvas.ids[:3] == (0, 1, 2) and first.canvas.n_editable == 13
    assert (first.prompt, second.prompt) == ("w1 w2", "w3")
    template = PromptTemplate("mine", (Part(None, ("w7 ", " w8")),))
    (only,) = requests_of(prompts=["w1"], template=template)
    assert only.canvas.ids[:3] == (7, 1, 8) and only.canvas.n_editable == 13
    assert requests_of(prompts=["w1"], n_tokens=5)[0].canvas.n_editable == 5
    with pytest.raises(ValueError, match=r"sample_prompts: text 1: .*cutoff_len: 3.*sample_length"):
        requests_of(prompts=["w1", "w1 w2 w3"], cutoff_len=3)
    with pytest.raises(ValueError, match=r"sample_prompts: text 0: .*mask"):
        requests_of(prompts=["w1 <|mask|>"])


def test_the_prompts_of_the_data_are_those_of_its_last_answers(requests_of):
    no = -100
    rows = [
        {"input_ids": [1, 2, 3, 4], "labels": [1, 2, 3, 4]},  # no prompt
        {"input_ids": [1, 2, 3, 0, 9], "labels": [no, no, 3, 0, no]},  # the template writes after the answer
        {"input_ids": [1, 2, 3, 4, 5], "labels": [no, 2, no, no, 5]},  # two turns
        {"input_ids": [5, 6, 7, 8], "labels": [no, 6, no, 8], "position_ids": [0, 1, 0, 1]},  # two texts
    ]
    requests = requests_of([[], rows])
    assert [(each.prompt, each.label) for each in requests] == [("w1 w2", "w3"), ("w1 w2 w3 w4", "w5"), ("w5", "w6")]
    assert [len(each.canvas) for each in requests] == [16, 16, 16]
    assert [each.canvas.n_editable for each in requests_of([rows[1:2], rows], n_tokens=3)] == [3]
    assert len(requests_of([rows], count=1)) == 1
    with pytest.raises(ValueError, match=r"sample_steps: .*sample_prompts"):
        requests_of([rows[:1]])


def test_the_prompt_is_that_which_training_shows(requests_of):
    """Exactly the tokens that the collator does not noise stand before the first position to generate."""
    row = {"input_ids": [4, 5, 6, 7, 0], "labels": [-100, -100, -100, 7, 0]}
    maskable = ResponseCollator(pad_id=0, shift=True)([row])["maskable"][0]
    (request,) = requests_of([[row]])
    n = request.canvas.editable.index(True)
    assert request.canvas.ids[:n] == (4, 5, 6) and not maskable[:n].any() and maskable[n:].all()


def test_texts_are_those_of_the_weights_at_their_step(make_trainer):
    """The file holds them by step and index; a generator of the weights alone gives the same."""
    trainer = sampling(make_trainer, steps=2, max_steps=4, anneal_steps=8, save_strategy="steps", save_steps=2)
    trainer.train()
    found = lines(trainer)
    assert [(line["step"], line["index"]) for line in found] == [(2, 0), (2, 1), (4, 0), (4, 1)]
    assert [line["attention_ratio"] for line in found] == [0.25, 0.25, 0.5, 0.5]
    assert found[0]["settings"]["diffusion_steps"] == 3 and found[0]["settings"]["seed"] == 5
    from transformers import GPT2LMHeadModel

    from llamafactory_ddm.modeling.bidirectional import make_bidirectional

    for step in (2, 4):
        model = GPT2LMHeadModel.from_pretrained(f"{trainer.args.output_dir}/checkpoint-{step}")
        make_bidirectional(model)
        texts = generator_of(model).generate(num_samples=2, max_new_tokens=6, settings=SETTINGS)
        assert texts == [line["text"] for line in found if line["step"] == step]
    assert found[0]["text"] != found[2]["text"]


@pytest.mark.parametrize("checkpointing", [True, False])
def test_training_is_the_same_bit_for_bit(make_trainer, checkpointing):
    """With dropout, annealed attention and accumulation; every module is in the mode that it was in."""
    keys = {"max_steps": 4, "anneal_steps": 6, "per_device_train_batch_size": 2, "gradient_accumulation_steps": 2}
    keys["gradient_checkpointing"] = checkpointing
    never = make_trainer(model=dropping(), folder="never", **keys)
    often = sampling(make_trainer, model=dropping(), folder="often", **keys)
    often.model.transformer.h[0].eval()
    modes = [module.training for module in often.model.modules()]
    with often.beside_training():
        assert not any(module.training for module in often.model.modules())
    assert [module.training for module in often.model.modules()] == modes
    for trainer in (never, often):
        torch.manual_seed(3)  # of dropout
        trainer.train()
    for key in ("loss", "nll", "grad_norm", "attention_ratio", "masked_fraction"):
        one, two = ([log[key] for log in each.state.log_history if key in log] for each in (never, often))
        assert one == two, key
    for one, two in zip(never.model.parameters(), often.model.parameters(), strict=True):
        assert torch.equal(one, two)
    assert len(lines(often)) == 8
    assert often.model.is_gradient_checkpointing == never.model.is_gradient_checkpointing


def test_a_text_does_not_depend_on_the_batch(make_trainer):
    texts = []
    for size in (1, 4):
        trainer = sampling(make_trainer, count=3, max_steps=1, per_device_eval_batch_size=size, folder=str(size))
        trainer.train()
        texts.append([line["text"] for line in lines(trainer)])
    assert texts[0] == texts[1] and len(set(texts[0])) == 3


def test_a_resumed_run_replaces_the_lines_of_its_steps(make_trainer):
    keys = {"max_steps": 4, "save_strategy": "steps", "save_steps": 2}
    whole = sampling(make_trainer, **keys)
    whole.train()
    expected = lines(whole)
    assert [line["step"] for line in expected] == [1, 1, 2, 2, 3, 3, 4, 4]
    again = sampling(make_trainer, model=tiny_model(seed=99), **keys)
    again.train(resume_from_checkpoint=f"{whole.args.output_dir}/checkpoint-2")
    assert lines(again) == expected
    # Lines of later steps than the one that it starts at belong to another run, also if it takes fewer steps.
    shorter = sampling(make_trainer, **{**keys, "max_steps": 3})
    shorter.train(resume_from_checkpoint=f"{whole.args.output_dir}/checkpoint-2")
    assert lines(shorter) == expected[:6]
    new = sampling(make_trainer, steps=2, **{**keys, "max_steps": 2})
    new.train()
    assert [line["step"] for line in lines(new)] == [2, 2]


def test_weights_that_are_not_finite_give_a_warning_and_no_text(make_trainer, caplog):
    trainer = sampling(make_trainer, steps=3)
    with torch.no_grad():
        trainer.model.transformer.ln_f.weight.fill_(float("nan"))
    callback = trainer.callback_handler.callbacks[-1]
    with trainer.beside_training():
        callback.take()
    assert "No samples at step 0" in caplog.text and "NaN" in caplog.text


def test_texts_that_cannot_be_made_or_written_do_not_lose_a_run(make_trainer, caplog, monkeypatch):
    trainer = sampling(make_trainer, max_steps=2)
    callback = trainer.callback_handler.callbacks[-1]
    modes = [module.training for module in trainer.model.modules()]

    def too_little_memory(*args, **kwargs):
        raise torch.OutOfMemoryError("out of memory\nand more")

    with monkeypatch.context() as patch:
        patch.setattr(callback.generator, "sample_batch", too_little_memory)
        trainer.train()
    assert "No samples at step 2: OutOfMemoryError: out of memory" in caplog.text and "and more" not in caplog.text
    assert trainer.state.global_step == 2 and not (Path(trainer.args.output_dir) / FILE).exists()
    assert [module.training for module in trainer.model.modules()] == modes

    def full(*args):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(samples, "replacing", full)
    trainer = sampling(make_trainer, max_steps=2, folder="full")
    trainer.train()
    assert trainer.state.global_step == 2
    assert "The samples at step 2 are not in samples.jsonl: " in caplog.text and "No space left" in caplog.text
    assert "Samples at step 2:\n  0: " in caplog.text


@pytest.mark.parametrize("content", ["no JSON", '{"task": "x"}', "[3]"])
def test_a_file_of_another_program_is_not_overwritten(make_trainer, content):
    trainer = sampling(make_trainer)
    path = Path(trainer.args.output_dir) / FILE
    path.parent.mkdir(exist_ok=True)
    path.write_text(content)
    with pytest.raises(ValueError, match=r"sample_steps: .*samples\.jsonl .*output_dir"):
        trainer.train()
    assert path.read_text() == content and trainer.steps_taken == 0


def test_the_log_and_tensorboard_show_them(make_trainer, caplog, monkeypatch, tmp_path):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    monkeypatch.setenv("TENSORBOARD_LOGGING_DIR", str(tmp_path / "board"))
    trainer = sampling(make_trainer, steps=2, train=Rows(32), report_to="tensorboard")
    trainer.train()
    texts = [line["text"] for line in lines(trainer)]
    (block,) = [record.getMessage() for record in caplog.records if "Samples at step" in record.getMessage()]
    assert block == f"Samples at step 2:\n  0: {texts[0]}\n  1: {texts[1]}"
    events = EventAccumulator(str(tmp_path / "board"))
    events.Reload()
    (event,) = events.Tensors("samples/text_summary")
    assert event.step == 2 and event.tensor_proto.string_val[0].decode() == f"0. {texts[0]}\n1. {texts[1]}"


def test_a_warning_if_no_step_has_texts(make_trainer, caplog):
    sampling(make_trainer, steps=3, max_steps=3).train()
    assert "sample_steps" not in caplog.text
    trainer = sampling(make_trainer, steps=4, max_steps=3)
    trainer.train()
    assert "sample_steps: 4 is more than the 3 steps of this run" in caplog.text
