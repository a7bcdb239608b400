"""Which modules LoRA takes, and embeddings that stay tied, on GPT-2 and on Llama."""

import json
from types import SimpleNamespace

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from transformers import AutoModelForCausalLM, GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM

from llamafactory_ddm.checkpoints.adapters import base_of, check_adapter, merged_with_base
from llamafactory_ddm.modeling.diffusion_config import DiffusionConfig
from llamafactory_ddm.modeling.lora import linear_modules, resolve_lora_targets, stored_embeddings, tie_again

GPT2_TARGETS = {"c_attn", "c_proj", "c_fc"}
LLAMA_TARGETS = {"q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"}
IDS = torch.arange(12)[None]


def gpt2():
    torch.manual_seed(0)
    return GPT2LMHeadModel(GPT2Config(vocab_size=40, n_positions=16, n_embd=16, n_layer=2, n_head=2))


def llama(tied=False):
    torch.manual_seed(0)
    sizes = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2, "num_attention_heads": 2}
    return LlamaForCausalLM(LlamaConfig(vocab_size=40, tie_word_embeddings=tied, **sizes))


def args(lora_target=("all",), additional_target=None):
    return SimpleNamespace(lora_target=list(lora_target), additional_target=additional_target)


def logits(model):
    with torch.no_grad():
        return model.eval()(IDS).logits


@pytest.mark.parametrize(
    ("build", "targets", "modules"), [(gpt2, GPT2_TARGETS, 8), (llama, LLAMA_TARGETS, 14)], ids=["gpt2", "llama"]
)
def test_all_means_every_linear_layer_but_the_head(build, targets, modules):
    asked = args()
    resolve_lora_targets(build(), asked)
    assert set(asked.lora_target) == targets
    assert len(linear_modules(build())) == modules
    adapted = get_peft_model(build(), LoraConfig(target_modules=asked.lora_target, task_type="CAUSAL_LM"))
    assert sum("lora_A" in name for name, _ in adapted.named_parameters()) == modules


def test_names_are_kept_and_checked():
    asked = args(["q_proj", "v_proj"], ["embed_tokens"])
    resolve_lora_targets(llama(), asked)
    assert asked.lora_target == ["q_proj", "v_proj"]
    words = r"lora_target: c_attn .*q_proj \(2 modules\).*up_proj"
    with pytest.raises(ValueError, match=words):
        resolve_lora_targets(llama(), args(["q_proj", "c_attn"]))
    words = "additional_target: wte .*nothing.*embed_tokens"
    with pytest.raises(ValueError, match=words):
        resolve_lora_targets(llama(), args(["q_proj"], ["wte"]))


@pytest.mark.parametrize(
    ("tied", "names", "freeze", "expected"),
    [
        (False, ["embed_tokens"], False, (True, False)),
        (True, ["embed_tokens"], False, (True, True)),
        (False, ["lm_head"], False, (False, True)),
        (False, ["embed_tokens", "lm_head"], True, (True, True)),
        (True, ["embed_tokens"], True, (True, True)),
        (False, ["norm"], True, (False, False)),
        (False, [], False, (False, False)),
    ],
)
def test_which_embeddings_are_trained_and_stored(tied, names, freeze, expected):
    assert stored_embeddings(llama(tied), names, freeze=freeze) == expected


def test_lora_on_the_output_embedding_and_on_embeddings():
    """LoRA can adapt them; where the two are tied, merging would change the other one."""
    resolve_lora_targets(llama(), args(["lm_head", "q_proj"]))
    resolve_lora_targets(llama(), args(["embed_tokens"]))
    resolve_lora_targets(gpt2(), args(["wpe"]))
    with pytest.raises(ValueError, match=r"lora_target: lm_head .*embed_tokens"):
        resolve_lora_targets(llama(True), args(["lm_head", "q_proj"]))
    with pytest.raises(ValueError, match=r"lora_target: wte .*additional_target"):
        resolve_lora_targets(gpt2(), args(["wte"]))


@pytest.mark.parametrize("tied", [True, False])
def test_an_adapter_that_holds_more_rows_than_its_base(tied, tmp_path):
    llama(tied).save_pretrained(tmp_path / "base")
    base = AutoModelForCausalLM.from_pretrained(tmp_path / "base")
    base.resize_token_embeddings(64)
    names = ["embed_tokens"] if tied else ["embed_tokens", "lm_head"]
    trained = get_peft_model(base, LoraConfig(target_modules=["q_proj"], modules_to_save=names, task_type="CAUSAL_LM"))
    tie_again(trained)
    with torch.no_grad():
        for parameter in trained.parameters():
            if parameter.requires_grad:
                parameter += 0.1 * torch.randn_like(parameter)
    trained.save_pretrained(tmp_path / "adapter")
    described = DiffusionConfig("x", 3, True, "masked", 0.0, "linear", 1.0)
    merged = merged_with_base(tmp_path / "adapter", described, base=str(tmp_path / "base"), dtype=torch.float32)
    torch.testing.assert_close(logits(merged), logits(trained), rtol=0, atol=1e-5)
    assert merged.get_input_embeddings().weight.shape[0] == merged.config.vocab_size == 64


@pytest.mark.parametrize(
    ("build", "embedding", "targets"),
    [
        (gpt2, "wte", ["c_attn"]),
        (llama, "embed_tokens", ["q_proj"]),
        (lambda: llama(True), "embed_tokens", ["q_proj"]),
    ],
    ids=["gpt2", "llama", "tied llama"],
)
def test_a_trained_embedding_goes_through_training_saving_and_merging(build, embedding, targets, tmp_path):
    build().save_pretrained(tmp_path / "base")
    base = AutoModelForCausalLM.from_pretrained(tmp_path / "base")
    tied = base.config.tie_word_embeddings
    config = LoraConfig(target_modules=targets, modules_to_save=[embedding], task_type="CAUSAL_LM")
    trained = get_peft_model(base, config)
    tie_again(trained)
    optimizer = torch.optim.SGD([p for p in trained.parameters() if p.requires_grad], lr=0.5)
    before = logits(trained)
    for _ in range(2):
        optimizer.zero_grad()
        trained(IDS, labels=IDS).loss.backward()
        optimizer.step()
    after = logits(trained)
    assert not torch.allclose(before, after, atol=1e-3)
    trained.save_pretrained(tmp_path / "adapter")
    described = DiffusionConfig("x", 3, True, "masked", 0.0, "linear", 1.0)
    merged = merged_with_base(tmp_path / "adapter", described, base=str(tmp_path / "base"), dtype=torch.float32)
    torch.testing.assert_close(logits(merged), after, rtol=0, atol=1e-5)
    assert (merged.get_output_embeddings().weight is merged.get_input_embeddings().weight) == tied
    merged.save_pretrained(tmp_path / "merged")
    plain = AutoModelForCausalLM.from_pretrained(tmp_path / "merged")
    torch.testing.assert_close(logits(plain), after, rtol=0, atol=1e-5)
    further = PeftModel.from_pretrained(
        AutoModelForCausalLM.from_pretrained(tmp_path / "base"), tmp_path / "adapter", is_trainable=True
    )
    tie_again(further)
    torch.testing.assert_close(logits(further), after, rtol=0, atol=1e-5)


def test_an_adapter_whose_base_is_gone(tmp_path):
    get_peft_model(gpt2(), LoraConfig(target_modules=["c_attn"], task_type="CAUSAL_LM")).save_pretrained(tmp_path)
    described = DiffusionConfig("x", 3, True, "masked", 0.0, "linear", 1.0)
    with pytest.raises(ValueError, match=r" nowhere, .*base_model_name_or_path"):
        merged_with_base(tmp_path, described, base="nowhere", dtype=torch.float32)


def test_an_adapter_and_a_base_of_another_process(tmp_path):
    """The adapter's diffusion_config.json must agree with the base's."""
    gpt2().save_pretrained(tmp_path / "base")
    adapter = LoraConfig(target_modules=["c_attn"], task_type="CAUSAL_LM")
    get_peft_model(AutoModelForCausalLM.from_pretrained(tmp_path / "base"), adapter).save_pretrained(tmp_path / "a")
    ours = DiffusionConfig("x", 3, True, "masked", 0.0, "linear", 1.0)
    for key, theirs in (
        ("shift: True", DiffusionConfig("x", 3, False, "masked", 0.0, "linear", 1.0)),
        ("mask_token_id: 3", DiffusionConfig("x", 4, True, "masked", 0.0, "linear", 1.0)),
        ("noise_schedule: linear", DiffusionConfig("x", 3, True, "masked", 0.0, "cosine", 1.0)),
    ):
        theirs.save(tmp_path / "base")
        with pytest.raises(ValueError, match=f"/a .*{key}, .*/base "):
            merged_with_base(tmp_path / "a", ours, base=str(tmp_path / "base"), dtype=torch.float32)
    DiffusionConfig("x", 3, True, "masked", 0.0, "linear", 0.5).save(tmp_path / "base")
    merged_with_base(tmp_path / "a", ours, base=str(tmp_path / "base"), dtype=torch.float32)


@pytest.mark.parametrize(
    ("name", "init", "words"),
    [
        ("a", True, None),
        ("a", "pissa", None),
        ("a", "pissa_niter_16", r"pissa_iter.*pissa_convert: true"),
        ("pissa_backup", True, "pissa_convert: true"),
        ("pissa_init", True, "pissa_convert: true"),
        ("pissa_converted", True, None),
    ],
)
def test_adapters_that_do_not_load_as_they_were_trained(tmp_path, name, init, words):
    (tmp_path / name).mkdir()
    settings = {"base_model_name_or_path": "x", "init_lora_weights": init}
    (tmp_path / name / "adapter_config.json").write_text(json.dumps(settings))
    if words is None:
        check_adapter(tmp_path / name)
        return
    with pytest.raises(ValueError, match=words):
        check_adapter(tmp_path / name)


@pytest.mark.parametrize("text", ["{", "[]", "{}", '{"base_model_name_or_path": null}'])
def test_an_adapter_config_without_a_base(tmp_path, text):
    (tmp_path / "adapter_config.json").write_text(text)
    with pytest.raises(ValueError, match="base_model_name_or_path"):
        base_of(tmp_path)
