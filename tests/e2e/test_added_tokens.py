"""Tokens that a template, LLaMA-Factory's keys or mask_token add are trained and saved, or refused."""

import json

import pytest
import torch
from llamafactory.train.tuner import export_model, run_exp
from transformers import AddedToken, AutoModelForCausalLM, AutoTokenizer, LlamaConfig, LlamaForCausalLM

from llamafactory_ddm import load
from llamafactory_ddm.modeling.diffusion_config import DiffusionConfig
from support.cli import ROOT

KNOWN = 740  # tokens of the built-in tokenizer
CHATML = ["<|im_end|>", "<|im_start|>"]
PAIRS = [{"q": "Tom saw a cat.", "a": "It was red."}, {"q": "Und?", "a": "Ein Hund <|mask|> da."}] * 3
TEXTS = [{"text": "Tom saw a small cat."}, {"text": "Und <|mask|> dann?"}] * 3


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    folder = tmp_path_factory.mktemp("data")
    info = {
        "pairs": {"file_name": "pairs.json", "columns": {"prompt": "q", "response": "a"}},
        "texts": {"file_name": "texts.json", "columns": {"prompt": "text"}},
    }
    for name, value in (("pairs", PAIRS), ("texts", TEXTS), ("dataset_info", info)):
        (folder / f"{name}.json").write_text(json.dumps(value))
    return folder


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    """Return a function that gives an untrained Llama of two layers whose rows are exactly its tokens."""

    def build(tied=False, extra=(), rows=None):
        folder = tmp_path_factory.mktemp("base")
        tokenizer = AutoTokenizer.from_pretrained(ROOT / "data" / "tiny_gpt2")
        tokenizer.add_tokens([AddedToken(token, special=True) for token in extra])
        torch.manual_seed(0)
        sizes = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2, "num_attention_heads": 2}
        config = LlamaConfig(
            vocab_size=rows or len(tokenizer), tie_word_embeddings=tied, max_position_embeddings=64, **sizes
        )
        LlamaForCausalLM(config).save_pretrained(folder)
        tokenizer.save_pretrained(folder)
        return folder

    return build


@pytest.fixture
def train(data, tmp_path):
    """Return a function that trains two steps and returns the folder."""

    def run(model, name="out", *, stage="ddm-sft", **keys):
        settings = {
            "model_name_or_path": model,
            "stage": stage,
            "do_train": True,
            "finetuning_type": "full",
            "dataset": "pairs" if stage == "ddm-sft" else "texts",
            "dataset_dir": data,
            "mask_token": "<|mask|>",
            "anneal_steps": 0,
            "cutoff_len": 48,
            "packing": False,
            "max_steps": 2,
            "per_device_train_batch_size": 2,
            "learning_rate": 1e-2,
            "output_dir": tmp_path / name,
            **dict.fromkeys(("overwrite_cache", "overwrite_output_dir", "disable_tqdm", "use_cpu"), True),
            "save_strategy": "no",
            "report_to": "none",
            **keys,
        }
        if settings["finetuning_type"] == "lora":
            settings = {"lora_target": "all", "lora_rank": 2, **settings}
        kinds = (bool, int, float)
        run_exp({k: v if isinstance(v, kinds) else str(v) for k, v in settings.items() if v is not None})
        return tmp_path / name

    return run


def export(model, adapter, folder):
    keys = {"model_name_or_path": model, "adapter_name_or_path": adapter, "export_dir": folder}
    fixed = {"finetuning_type": "lora", "template": "empty", "infer_dtype": "float32"}
    export_model({**{key: str(value) for key, value in keys.items()}, **fixed})
    return folder


def logits(model):
    with torch.no_grad():
        rows = len(model.get_input_embeddings().weight)
        return model.eval()(torch.arange(KNOWN - 8, min(KNOWN + 3, rows))[None]).logits


def rows(folder):
    model = AutoModelForCausalLM.from_pretrained(folder)
    return [len(end.weight) for end in (model.get_input_embeddings(), model.get_output_embeddings())]


@pytest.mark.slow
@pytest.mark.parametrize("stage", ["ddm", "ddm-sft"])
@pytest.mark.parametrize(
    ("tied", "template", "resize", "expected"),
    [(False, "chatml", True, 768), (True, "llama3", None, KNOWN + 3), (False, "chatml", None, KNOWN + 3)],
)
def test_a_template_that_adds_tokens_and_a_new_mask(base, train, stage, tied, template, resize, expected):
    out = train(base(tied), stage=stage, template=template, resize_vocab=resize)
    tokenizer, config = AutoTokenizer.from_pretrained(out), DiffusionConfig.load(out)
    assert (config.mask_token, config.mask_token_id) == ("<|mask|>", KNOWN + 2)
    assert tokenizer.convert_tokens_to_ids("<|mask|>") == tokenizer.mask_token_id == KNOWN + 2
    added = CHATML if template == "chatml" else ["<|eot_id|>", "<|eom_id|>"]
    assert {tokenizer.convert_tokens_to_ids(token) for token in added} == {KNOWN, KNOWN + 1}
    assert rows(out) == [expected, expected]
    assert load(out).generate(max_new_tokens=3)


def test_new_embeddings_are_the_mean_of_the_trained_ones(base, train):
    """With resize_vocab LLaMA-Factory adds random embeddings; [MASK] is not the mean of those."""
    model = base()
    out = train(model, template="chatml", resize_vocab=True, learning_rate=0.0)
    before = AutoModelForCausalLM.from_pretrained(model).get_input_embeddings().weight
    after = AutoModelForCausalLM.from_pretrained(out).get_input_embeddings().weight
    torch.testing.assert_close(after[KNOWN + 2], before.mean(dim=0))
    assert not torch.allclose(after[KNOWN], before.mean(dim=0), atol=1e-2)
    grown = train(model, "grown", template="chatml", learning_rate=0.0)
    after = AutoModelForCausalLM.from_pretrained(grown).get_input_embeddings().weight
    torch.testing.assert_close(after[KNOWN:], before.mean(dim=0).expand(3, -1))


@pytest.mark.parametrize("rows", [None, KNOWN + 9], ids=["resized", "spare rows"])
def test_only_the_tokens_of_its_keys_get_embeddings_upstream(base, train, monkeypatch, rows):
    """From 0.9.6 on; also in existing rows. The template's tokens start as the mean."""
    from llamafactory.model import patcher

    original = patcher.resize_embedding_layer

    def resize(model, tokenizer, new_tokens=None, **keys):
        original(model, tokenizer, **keys)
        model.get_input_embeddings().weight.data[tokenizer.convert_tokens_to_ids("<a>")] = 7.0

    monkeypatch.setattr(patcher, "resize_embedding_layer", resize)
    model = base(rows=rows)
    out = train(model, template="chatml", add_special_tokens="<a>", learning_rate=0.0)
    before, after = (AutoModelForCausalLM.from_pretrained(f).get_input_embeddings().weight for f in (model, out))
    ids = AutoTokenizer.from_pretrained(out).convert_tokens_to_ids(["<a>", *CHATML, "<|mask|>"])
    assert (after[ids[0]] == 7).all()
    torch.testing.assert_close(after[ids[1:]], before[:KNOWN].mean(dim=0).expand(3, -1))


def test_trained_embeddings_of_added_tokens_are_kept(base, train, monkeypatch):
    """From 0.9.6 on, LLaMA-Factory initialises every token that its keys name, even trained ones."""
    from llamafactory.model import loader

    patch_model, named = loader.patch_model, []

    def with_new_embeddings(model, tokenizer, model_args, *rest):
        patch_model(model, tokenizer, model_args, *rest)
        named.append((model_args.add_tokens or []) + (model_args.add_special_tokens or []))
        for token in named[-1]:
            model.get_input_embeddings().weight.data[tokenizer.convert_tokens_to_ids(token)] = 6.0 + len(named)

    monkeypatch.setattr(loader, "patch_model", with_new_embeddings)
    keys = {"add_tokens": "abc", "add_special_tokens": "<a>", "resize_vocab": True, "learning_rate": 0.0}
    first = train(base(), "first", **keys)
    further = train(first, "further", **{**keys, "add_special_tokens": "<a>,<b>"}, mask_token=None)
    assert named == [["abc", "<a>"], ["<b>"]]
    ids = AutoTokenizer.from_pretrained(further).convert_tokens_to_ids(["abc", "<a>"])
    assert (AutoModelForCausalLM.from_pretrained(further).get_input_embeddings().weight[ids] == 7).all()


@pytest.mark.slow
@pytest.mark.parametrize("stage", ["ddm", "ddm-sft"])
def test_a_diffusion_checkpoint_and_a_template_that_adds_tokens(base, train, stage):
    """[MASK] keeps its id, and the new tokens get the next ones."""
    first = train(base(), "first", stage="ddm")
    assert rows(first) == [KNOWN + 1] * 2
    out = train(first, stage=stage, template="chatml", mask_token=None)
    assert DiffusionConfig.load(out).mask_token_id == KNOWN and rows(out) == [KNOWN + 3] * 2
    keys = {"stage": "ddm-sft", "do_train": False, "do_predict": True, "mask_token": None, "eval_dataset": "pairs"}
    with pytest.raises(ValueError, match=r"template: chatml \('<\|im_end\|>', .*does not train"):
        train(first, "texts", template="chatml", dataset=None, **keys)
    if stage == "ddm-sft":
        train(out, "texts", template="chatml", dataset=None, diffusion_steps=2, max_new_tokens=4, **keys)
    with pytest.raises(ValueError, match=r"template: chatml .*does not train"):
        train(first, "eval", template="chatml", dataset=None, **{**keys, "do_predict": False, "do_eval": True})


@pytest.mark.slow
def test_a_spelled_out_mask_is_encoded_alike_from_a_base_and_from_a_checkpoint(base, train, monkeypatch):
    from llamafactory_ddm.integration.resolve import datasets

    seen, original = [], datasets._load_rows

    def keep(*args, **named):
        module = original(*args, **named)
        seen.append([row["input_ids"] for row in module["train_dataset"]])
        return module

    monkeypatch.setattr(datasets, "_load_rows", keep)
    train(train(base(), "first", stage="ddm"), "second", stage="ddm", mask_token=None)
    assert seen[0] == seen[1]


@pytest.mark.slow
def test_a_mask_token_that_is_the_templates_eos(base, train):
    with pytest.raises(ValueError, match=r"mask_token: '<\|im_end\|>' .*(pad|eos)"):
        train(base(), template="chatml", mask_token="<|im_end|>")


@pytest.mark.slow
@pytest.mark.parametrize(
    ("tied", "keys"),
    [
        (False, {"template": "chatml", "resize_vocab": True}),
        (True, {"add_special_tokens": "<a>,<b>"}),
        (False, {"add_special_tokens": "<a>,<b>"}),
        (True, {"template": "chatml", "additional_target": "embed_tokens"}),
        (False, {"add_tokens": "abc", "template": "chatml", "additional_target": "embed_tokens,lm_head"}),
    ],
)
def test_an_adapter_with_added_tokens(base, train, tmp_path, tied, keys):
    """Loading, exporting, training further and generating all use the trained model."""
    model = base(tied)
    out = train(model, finetuning_type="lora", **keys)
    loaded = logits(load(out).model)
    exported = export(model, out, tmp_path / "exported")
    torch.testing.assert_close(loaded, logits(load(exported).model), rtol=0, atol=1e-5)
    assert rows(exported)[0] == loaded.shape[-1] and DiffusionConfig.find(exported) is not None
    template = {"template": keys.get("template")}
    further = {"finetuning_type": "lora", "adapter_name_or_path": out, "mask_token": None, **template}
    same = train(model, "same", **further, learning_rate=0.0)
    torch.testing.assert_close(logits(load(same).model), loaded, rtol=0, atol=1e-5)
    resized = train(model, "resized", **further, learning_rate=0.0, resize_vocab=True)
    torch.testing.assert_close(logits(load(resized).model), loaded, rtol=0, atol=1e-5)
    predicts = {"do_train": False, "do_predict": True, "dataset": None, "eval_dataset": "pairs"}
    train(model, "texts", **further, **predicts, diffusion_steps=2, max_new_tokens=4)
    assert (tmp_path / "texts" / "generated_predictions.jsonl").is_file()


def test_embeddings_that_an_adapter_or_freeze_would_not_train_are_refused(base, train, monkeypatch):
    from llamafactory_ddm.integration.model import loader as loading

    model = base()
    with monkeypatch.context() as patched:  # before the model is loaded
        patched.setattr(loading, "load_model", None)
        tokens = r"template: chatml \('<\|im_end\|>', '<\|im_start\|>'\) and mask_token \('<\|mask\|>'\): "
        with pytest.raises(ValueError, match=tokens + r".*LoRA.*resize_vocab: true"):
            train(model, finetuning_type="lora", template="chatml")
        with pytest.raises(ValueError, match=tokens + r".*finetuning_type: freeze "):
            train(model, finetuning_type="freeze", freeze_trainable_layers=1, template="chatml", resize_vocab=True)
        with pytest.raises(ValueError, match=r"mask_token \('<\|mask\|>'\): .*quantization_bit"):
            train(model, finetuning_type="lora", quantization_bit=4)
    with pytest.raises(ValueError, match=r"add lm_head to additional_target"):
        train(model, finetuning_type="lora", template="chatml", additional_target="embed_tokens")
    freeze = {"finetuning_type": "freeze", "freeze_trainable_layers": 1}
    with pytest.raises(ValueError, match=r"add lm_head to freeze_extra_modules"):
        train(model, **freeze, template="chatml", freeze_extra_modules="embed_tokens")
    out = train(model, **freeze, template="chatml", freeze_extra_modules="embed_tokens,lm_head")
    assert rows(out) == [KNOWN + 3] * 2
    train(model, "mask", **freeze, freeze_extra_modules="embed_tokens")  # [MASK] is never generated


@pytest.mark.slow
def test_an_adapter_cannot_be_trained_further_with_tokens_that_it_does_not_hold(base, train):
    model = base(extra=["<|mask|>"])
    out = train(model, finetuning_type="lora")
    with pytest.raises(ValueError, match=r"template: chatml .*adapter_name_or_path .*llamafactory-cli export"):
        train(model, "further", finetuning_type="lora", adapter_name_or_path=out, template="chatml", mask_token=None)


@pytest.mark.slow
def test_a_tokenizer_with_more_tokens_than_the_model_has_embeddings(base, train):
    """Only tokens that the run needs get an embedding, so that an adapter stores no unused ones."""
    model = base(extra=["<|mask|>", "<|spare|>"], rows=KNOWN + 1)
    train(model, finetuning_type="lora")
    beyond = base(extra=["<|mask|>"], rows=KNOWN)
    assert rows(train(beyond, "full"))[0] == KNOWN + 1
    with pytest.raises(ValueError, match=r"the tokenizer \('<\|mask\|>'\): .*LoRA"):
        train(beyond, finetuning_type="lora")


@pytest.mark.slow
def test_embeddings_from_the_descriptions_of_tokens(base, train, tmp_path):
    (tmp_path / "tokens.yaml").write_text('"<svg>": "Tom saw a cat."\n"<end>": "It was red."\n')
    keys = {"new_special_tokens_config": tmp_path / "tokens.yaml", "init_special_tokens": "desc_init"}
    model = base()
    out = train(model, **keys, learning_rate=0.0)
    assert DiffusionConfig.load(out).mask_token_id == KNOWN + 2
    before, after = (AutoModelForCausalLM.from_pretrained(f).get_input_embeddings().weight for f in (model, out))
    ids = AutoTokenizer.from_pretrained(model).encode("It was red.", add_special_tokens=False)
    torch.testing.assert_close(after[KNOWN + 1], before[ids].mean(dim=0))


@pytest.mark.slow
def test_the_plain_adapter_of_pissa_convert(base, train, tmp_path):
    """It has tokenizer and diffusion config; the folders of PiSSA beside it are refused."""
    model = base(extra=["<|mask|>"])
    keys = {"finetuning_type": "lora", "pissa_init": True, "pissa_convert": True}
    out = train(model, **keys)
    plain = out / "pissa_converted"
    assert DiffusionConfig.load(plain) == DiffusionConfig.load(out)
    loaded = logits(load(plain).model)
    exported = export(model, plain, tmp_path / "exported")
    torch.testing.assert_close(logits(load(exported).model), loaded, rtol=0, atol=1e-5)
    tuned = {"finetuning_type": "lora", "mask_token": None, "learning_rate": 0.0}
    further = train(model, "further", adapter_name_or_path=plain, **tuned)
    torch.testing.assert_close(logits(load(further).model), loaded, rtol=0, atol=1e-5)
    for folder in (out, out / "pissa_backup", out / "pissa_init"):
        with pytest.raises(ValueError, match=f"use {plain}"):
            train(model, "further", adapter_name_or_path=folder, **tuned)
    with pytest.raises(ValueError, match=f"use {plain}"):
        load(out)


def test_an_adapter_without_weights(base, train, tmp_path):
    model = base(extra=["<|mask|>"])
    out = train(model, finetuning_type="lora")
    (out / "adapter_model.safetensors").unlink()
    words = r"adapter_config.json .*adapter_model.safetensors"
    with pytest.raises(ValueError, match=words):
        load(out)
    with pytest.raises(ValueError, match=words):
        train(model, "further", finetuning_type="lora", adapter_name_or_path=out)


@pytest.mark.slow
def test_fp16_on_a_cpu_computes_in_float32(base, train):
    """LLaMA-Factory ignores fp16 there, so attention masks are float32, too."""
    train(base(), stage="ddm", fp16=True, anneal_steps=4)


def test_lora_on_the_output_embedding(base, train, tmp_path):
    model = base(extra=["<|mask|>"])
    out = train(model, finetuning_type="lora", lora_target="lm_head,q_proj")
    exported = export(model, out, tmp_path / "exported")
    torch.testing.assert_close(logits(load(out).model), logits(load(exported).model), rtol=0, atol=1e-5)
