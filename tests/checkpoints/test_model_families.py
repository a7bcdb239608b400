"""Published families load through transformers' Auto classes as plain models, and what does not fit is an error."""

import json
import pickle
import re
import shutil

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, LlamaForCausalLM, Qwen2ForCausalLM

from llamafactory_ddm import load
from llamafactory_ddm.checkpoints.convert import convert
from llamafactory_ddm.checkpoints.families import (
    WeightNames,
    detect_family,
    family_of_converted,
    find_diffusion_config,
)
from llamafactory_ddm.checkpoints.families.llada import WEIGHT_NAMES
from llamafactory_ddm.checkpoints.layouts import is_model_folder, unreadable_layout
from llamafactory_ddm.modeling.bidirectional import make_bidirectional
from llamafactory_ddm.modeling.diffusion_config import DiffusionConfig
from llamafactory_ddm.utils import registry
from support.published import (
    MASK_ID,
    all_weights,
    by_formula,
    dream_by_formula,
    llada_weights,
    write_dream,
    write_llada,
)

IDS = torch.tensor([5, 9, MASK_ID, 7, 30])
KINDS = {
    "llada": (write_llada, by_formula, LlamaForCausalLM),
    "dream": (write_dream, dream_by_formula, Qwen2ForCausalLM),
}


@pytest.fixture(params=KINDS)
def kind(request):
    return KINDS[request.param]


def auto_model(folder, **keys):
    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, attn_implementation="sdpa", **keys)


def test_the_auto_classes_load_a_plain_model(kind, tmp_path):
    write, formula, model_class = kind
    folder = write(tmp_path / "published")
    model, report = auto_model(folder, output_loading_info=True)
    assert type(model) is model_class and type(model.config) is model_class.config_class
    assert model.config.model_type == model_class.config_class.model_type
    assert not report["missing_keys"] and not report["unexpected_keys"]
    make_bidirectional(model)
    with torch.no_grad():
        logits = model(IDS[None]).logits[0]
    torch.testing.assert_close(logits, formula(all_weights(folder), IDS), rtol=1e-4, atol=1e-4)


def test_it_is_saved_as_a_plain_model(kind, tmp_path):
    folder, saved, converted = kind[0](tmp_path / "published"), tmp_path / "saved", tmp_path / "converted"
    auto_model(folder).save_pretrained(saved)
    AutoTokenizer.from_pretrained(folder).save_pretrained(saved)
    convert(folder, converted)
    first, second = all_weights(saved), all_weights(converted)
    assert first.keys() == second.keys() and all(torch.equal(first[key], second[key]) for key in first)
    first, second = (json.loads((path / "config.json").read_text()) for path in (saved, converted))
    assert {key for key in first.keys() | second.keys() if first.get(key) != second.get(key)} <= {
        "dtype",
        "torch_dtype",
    }
    tokenizer = json.loads((saved / "tokenizer_config.json").read_text())
    assert "auto_map" not in tokenizer and tokenizer["tokenizer_class"] != "DreamTokenizer"
    tokens = [AutoTokenizer.from_pretrained(path).get_vocab() for path in (folder, saved, converted)]
    assert tokens[0] == tokens[1] == tokens[2]


def test_what_is_known_of_it_is_what_convert_writes(kind, tmp_path):
    folder = kind[0](tmp_path / "published")
    convert(folder, tmp_path / "converted")
    assert find_diffusion_config(folder) == DiffusionConfig.load(tmp_path / "converted")
    assert find_diffusion_config(tmp_path / "converted") == DiffusionConfig.load(tmp_path / "converted")
    assert find_diffusion_config(tmp_path) is None


def test_the_dtype_is_that_of_the_files(tmp_path):
    """config.json of some copies does not say it, and half precision on a GPU depends on it."""
    weights = {key: value.to(torch.bfloat16) for key, value in llada_weights().items()}
    folder = write_llada(tmp_path / "published", weights)
    config = AutoConfig.from_pretrained(folder)
    assert torch.bfloat16 in (getattr(config, "dtype", None), getattr(config, "torch_dtype", None))
    assert AutoModelForCausalLM.from_pretrained(folder, dtype="auto").dtype == torch.bfloat16


def test_changes_to_the_config_reach_the_model(tmp_path):
    """LLaMA-Factory changes it between reading it and loading the model."""
    folder = write_llada(tmp_path / "published")
    config = AutoConfig.from_pretrained(folder, attn_implementation="eager")
    assert config.model_type == "llama"  # which LLaMA-Factory's own patches go by
    config.attention_dropout = 0.5
    model = AutoModelForCausalLM.from_pretrained(folder, config=config)
    assert model.config.attention_dropout == 0.5 and model.config._attn_implementation == "eager"
    assert config.attention_dropout == 0.5 and type(config) is not type(model.config)  # the caller's is as it was


def test_a_model_from_scratch_is_plain(kind, tmp_path):
    write, _, model_class = kind
    model = AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(write(tmp_path / "published")))
    assert type(model) is model_class and type(model.config) is model_class.config_class


def test_load_generates(kind, tmp_path):
    write, _, _ = kind
    generator = load(write(tmp_path / "published"))
    assert generator.config.shift is (write is write_dream)
    assert len(generator.generate("The", max_new_tokens=4)) == 1


def test_detection():
    assert detect_family({"model_type": "llada"}).title == "LLaDA"
    assert detect_family({"model_type": "Dream"}).title == "Dream"
    assert detect_family({"model_type": "llama"}) is None and detect_family({}) is None
    assert family_of_converted("llama", False).name == "llada" and family_of_converted("qwen2", True).name == "Dream"
    assert family_of_converted("llama", True) is None and family_of_converted("gpt2", False) is None


def test_the_key_mapping_is_the_renaming():
    mapping = WEIGHT_NAMES.key_mapping()
    for published in [*llada_weights(), "model.transformer.blocks.17.ff_out.weight"]:
        (renamed,) = {re.sub(old, new, published) for old, new in mapping.items()} - {published}
        assert renamed == WEIGHT_NAMES.to_standard(published)
        assert WEIGHT_NAMES.to_published(renamed) == published


def test_published_weights_beside_a_plain_config_are_an_error(tmp_path):
    """They are renamed only if config.json is the family's."""
    folder = write_llada(tmp_path / "published")
    assert is_model_folder(folder) and unreadable_layout(folder) is None
    convert(folder, tmp_path / "converted")
    shutil.copy(tmp_path / "converted" / "config.json", folder / "config.json")
    shutil.copy(tmp_path / "converted" / "diffusion_config.json", folder)
    assert not is_model_folder(folder) and unreadable_layout(folder) is WEIGHT_NAMES
    with pytest.raises(ValueError, match=r"LLaDA.*llamafactory-ddm convert"):
        load(folder)


def cut(path):
    path.write_bytes(path.read_bytes()[:-8])


def change(folder, **keys):
    raw = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**raw, **keys}))


def lose(folder, key):
    raw = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({name: value for name, value in raw.items() if name != key}))


@pytest.mark.parametrize(
    ("spoil", "pattern"),
    [
        (lambda f: (f / "model-00002-of-00002.safetensors").unlink(), r"model-00002-of-00002\.safetensors"),
        (lambda f: cut(f / "model-00001-of-00002.safetensors"), r"model-00001-of-00002\.safetensors"),
        (lambda f: change(f, n_layers=3), r"missing: model\.layers\.2\."),
        (lambda f: change(f, mlp_hidden_size=47), r"mlp\.\w+_proj\.weight"),
        (lambda f: change(f, mask_token_id=287), "mask_token_id .*287.*--mask-token"),
        (lambda f: lose(f, "mask_token_id"), "mask_token_id .*None.*--mask-token"),
        (lambda f: change(f, alibi=True), "alibi: True"),
        (lambda f: lose(f, "n_heads"), "n_heads"),
        (lambda f: (f / "tokenizer.json").unlink(), "LLaDA-mini .*tokenizer_config.json.*--base"),
    ],
)
def test_what_does_not_fit_is_an_error(tmp_path, spoil, pattern):
    folder = write_llada(tmp_path / "LLaDA-mini")
    spoil(folder)
    with pytest.raises(ValueError, match=pattern):
        load(folder)


def test_a_config_can_be_saved_and_pickled(kind, tmp_path):
    write, _, model_class = kind
    config = AutoConfig.from_pretrained(write(tmp_path / "published"))
    config.save_pretrained(tmp_path / "saved")
    saved = AutoConfig.from_pretrained(tmp_path / "saved")
    assert type(saved) is model_class.config_class and saved.vocab_size == config.vocab_size
    assert pickle.loads(pickle.dumps(config)).to_dict() == config.to_dict()


def test_a_generation_config_of_the_published_code_is_not_kept(tmp_path):
    folder = write_dream(tmp_path / "published")
    (folder / "generation_config.json").write_text('{"temperature": 0.0, "alg": "origin"}')
    auto_model(folder).save_pretrained(tmp_path / "saved")  # which refuses a temperature of 0


def test_further_weights_make_it_another_model(tmp_path):
    extra = {"model.transformer.blocks.0.q_norm.weight": torch.ones(8)}
    with pytest.raises(ValueError, match=r"q_norm\.weight"):
        load(write_llada(tmp_path / "published", {**llada_weights(), **extra}))


def test_names_that_would_be_renamed_twice_are_refused():
    with pytest.raises(ValueError, match=r"weight_names of X: 'net\.'"):
        WeightNames("X", (("net.", "model."), ("model.embed_tokens.", "other.")))


def test_a_model_of_transformers_needs_no_plugins(monkeypatch):
    """A plugin that cannot be imported does not stop an ordinary model."""
    monkeypatch.setattr(registry, "load_installed_plugins", lambda: pytest.fail("plugins were imported"))
    assert detect_family({"model_type": "gpt2"}) is None and detect_family({"model_type": "llada"}) is not None
    monkeypatch.undo()
    assert detect_family({"model_type": "unheard_of"}) is None
