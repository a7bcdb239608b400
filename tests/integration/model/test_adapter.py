"""What a diffusion model needs around LLaMA-Factory's merge of an adapter."""

from types import SimpleNamespace

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM

from llamafactory_ddm.integration.model.adapter import AdapterSetup


@pytest.mark.parametrize("is_tied", [True, False])
@pytest.mark.parametrize("unties", [False, True], ids=["as now", "as a draft of upstream"])
def test_embeddings_are_tied_after_a_merge_if_those_of_the_base_are(tmp_path, is_tied, unties):
    """A draft of LLaMA-Factory sets tie_word_embeddings to false where a merge leaves two different weights."""
    sizes = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 1, "num_attention_heads": 2}
    config = LlamaConfig(vocab_size=40, tie_word_embeddings=is_tied, **sizes)
    LlamaForCausalLM(config).save_pretrained(tmp_path / "base")
    adapter = LoraConfig(target_modules=["q_proj"], modules_to_save=["embed_tokens"], task_type="CAUSAL_LM")
    trained = get_peft_model(AutoModelForCausalLM.from_pretrained(tmp_path / "base"), adapter)
    with torch.no_grad():
        trained.get_input_embeddings().modules_to_save["default"].weight.add_(1)
    trained.save_pretrained(tmp_path / "adapter")

    model = AutoModelForCausalLM.from_pretrained(tmp_path / "base")
    model_args = SimpleNamespace(
        model_name_or_path=str(tmp_path / "base"), adapter_name_or_path=[str(tmp_path / "adapter")], resize_vocab=False
    )
    vocabulary = SimpleNamespace(untrained=lambda n_stored: {}, additions=SimpleNamespace(n_before=40))
    finetuning_args = SimpleNamespace(checkpoint_dir=None, additional_target=None, finetuning_type="lora")
    setup = AdapterSetup(
        vocabulary, 40, model_args, finetuning_args, new_adapter=False, do_train=False, autocast=False
    )
    setup.prepare_base(model)
    merged = PeftModel.from_pretrained(model, tmp_path / "adapter").merge_and_unload()
    if unties:
        merged.config.tie_word_embeddings = False
    setup.finish(merged)
    head, embedding = merged.get_output_embeddings().weight, merged.get_input_embeddings().weight
    assert (head is embedding) == merged.config.tie_word_embeddings == is_tied
    base = AutoModelForCausalLM.from_pretrained(tmp_path / "base")
    torch.testing.assert_close(embedding, base.get_input_embeddings().weight + 1)


@pytest.mark.parametrize(
    ("version", "method", "n_stored", "means"),
    [
        ("0.9.5", "noise_init", 40, []),
        ("0.9.5", "desc_init", 40, []),
        ("0.9.5", "noise_init", 44, [40, 41]),
        ("0.9.6", "noise_init", 44, []),
        ("0.9.6", "desc_init", 44, [40]),
        ("0.9.6", "desc_init_w_noise", 40, [40]),
    ],
)
def test_tokens_that_upstream_leaves_out_start_as_the_mean(monkeypatch, tmp_path, version, method, n_stored, means):
    """Until 0.9.5 it initialises rows that it adds; from 0.9.6 on named tokens, or those that are described."""
    from llamafactory.model import patcher

    resize = (lambda model, new_tokens: None) if version == "0.9.6" else lambda model: None
    monkeypatch.setattr(patcher, "resize_embedding_layer", resize)
    config = LlamaConfig(
        vocab_size=44, hidden_size=16, intermediate_size=24, num_hidden_layers=1, num_attention_heads=2
    )
    model = LlamaForCausalLM(config)
    with torch.no_grad():
        model.get_input_embeddings().weight[40:] = 7.0
    new = {"abc": 40, "<a>": 41, "<|mask|>": 42}
    vocabulary = SimpleNamespace(
        mask=SimpleNamespace(token="<|mask|>"),
        pad_tokens=(),
        untrained=lambda n_stored: new,
        additions=SimpleNamespace(n_before=40),
        describe=lambda tokens: "",
    )
    model_args = SimpleNamespace(
        model_name_or_path="base",
        adapter_name_or_path=None,
        resize_vocab=True,
        add_tokens=["abc"],
        add_special_tokens=["<a>"],
        init_special_tokens=method,
        _special_token_descriptions=None if method == "noise_init" else {"<a>": "a"},
    )
    finetuning_args = SimpleNamespace(checkpoint_dir=None, additional_target=None, finetuning_type="full")
    setup = AdapterSetup(
        vocabulary, n_stored, model_args, finetuning_args, new_adapter=False, do_train=True, autocast=False
    )
    setup.prepare_base(model)
    weight = model.get_input_embeddings().weight
    expected = torch.full((3, 16), 7.0)
    expected[[index - 40 for index in [*means, 42]]] = weight[:40].mean(dim=0)
    torch.testing.assert_close(weight[40:43], expected)
    # The weights of a checkpoint_dir replace what LLaMA-Factory wrote into the base model's.
    finetuning_args.checkpoint_dir = str(tmp_path)
    assert not setup._initialised_upstream(new, 44, 44)
