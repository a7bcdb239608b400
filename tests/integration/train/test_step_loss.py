"""The step's loss in chunks of logits against that of all logits, and where chunks are not possible."""

import pytest
import torch
from peft import LoraConfig, get_peft_model
from transformers import CONFIG_MAPPING, AutoModelForCausalLM

from llamafactory_ddm.modeling.bidirectional import make_bidirectional
from llamafactory_ddm.modeling.row_selecting_head import RowSelectingHead
from support.tiny import VOCABULARY, Rows, tiny_model

SIZES = {
    "vocab_size": VOCABULARY,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "max_position_embeddings": 32,
}


def make_model(family, **settings):
    torch.manual_seed(3)
    if family == "gptj":
        names = {"vocab_size": VOCABULARY, "n_positions": 32, "n_embd": 32, "n_layer": 2, "n_head": 2}
        config = CONFIG_MAPPING[family](**names, rotary_dim=8, resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=0.0)
    else:
        config = CONFIG_MAPPING[family](**{**SIZES, **settings}, pad_token_id=0, bos_token_id=1, eos_token_id=2)
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32, attn_implementation="eager")
    make_bidirectional(model)
    return model


def first_step(make_trainer, model, logits_chunk, folder, **settings):
    """Return the first step's loss and its other metrics, its gradients, and whether it went in chunks."""
    trainer = make_trainer(
        model=model, train=Rows(16), max_steps=1, logits_chunk=logits_chunk, folder=folder, **settings
    )
    gradients = {}
    trainer.create_optimizer_and_scheduler(num_training_steps=1)
    trainer.optimizer.register_step_pre_hook(
        lambda *_: gradients.update(
            {name: p.grad.clone() for name, p in trainer.model.named_parameters() if p.grad is not None}
        )
    )
    trainer.train()
    return trainer.state.log_history[0], gradients, trainer._step_loss._in_chunks


def check_equal(make_trainer, make, *, in_chunks=True, rtol=1e-4, atol=1e-6, **settings):
    """Check that a step in chunks of three logits equals one with all logits."""
    log, expected, dense_in_chunks = first_step(make_trainer, make(), 0, "dense", **settings)
    assert not dense_in_chunks
    for rows in (3, None):
        other_log, gradients, is_in_chunks = first_step(make_trainer, make(), rows, f"chunks-{rows}", **settings)
        assert is_in_chunks == in_chunks
        for name in {"loss", "nll", "kl", "grad_norm", "masked_fraction"} & log.keys():
            assert other_log[name] == pytest.approx(log[name], rel=10 * rtol)
        assert gradients.keys() == expected.keys()
        for name, value in expected.items():
            torch.testing.assert_close(gradients[name], value, rtol=rtol, atol=atol, msg=name)


@pytest.mark.parametrize(
    ("family", "tied"), [("llama", False), ("llama", True), ("qwen3", True), ("gemma", True), ("gpt_neox", False)]
)
def test_families(make_trainer, family, tied):
    check_equal(make_trainer, lambda: make_model(family, tie_word_embeddings=tied))


@pytest.mark.parametrize("objective", [{}, {"uniform_ratio": 0.2}, {"block_length": 4}, {"norm": "sequence"}])
def test_objectives(make_trainer, objective):
    check_equal(make_trainer, tiny_model, objective=objective)


def test_a_bias(make_trainer):
    check_equal(make_trainer, lambda: make_model("gptj"))


@pytest.mark.parametrize("family", ["gemma2", "cohere", "granite"])
def test_a_model_that_changes_its_logits_needs_all(make_trainer, family):
    settings = {"granite": {"logits_scaling": 2.0}}.get(family, {})
    check_equal(make_trainer, lambda: make_model(family, **settings), in_chunks=False)


def test_soft_capping_that_is_off(make_trainer):
    check_equal(make_trainer, lambda: make_model("gemma2", final_logit_softcapping=None))


def test_a_hook_that_changes_the_logits_needs_all(make_trainer):
    def make():
        model = tiny_model()
        model.lm_head.register_forward_hook(lambda module, args, output: 2 * output)
        return model

    check_equal(make_trainer, make, in_chunks=False)


def lora_model(settings, *more, base=tiny_model):
    """Return a model with adapters whose B is not 0; `more` are those of further adapters, all of them active."""
    model = get_peft_model(base(), LoraConfig(r=2, **{"target_modules": ["c_attn"], **settings}))
    for number, others in enumerate(more):
        model.add_adapter(f"more_{number}", LoraConfig(**{"target_modules": ["c_attn"], **others}))
    if more:
        model.base_model.set_adapter(list(model.peft_config))
    torch.manual_seed(0)
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.2)
    return model


ON_HEAD = {"target_modules": ["c_attn", "lm_head"]}


@pytest.mark.parametrize(
    ("settings", "in_chunks"),
    [
        ({}, True),
        ({"modules_to_save": ["lm_head"]}, True),
        (ON_HEAD, True),
        ({**ON_HEAD, "lora_dropout": 0.3}, True),
        ({**ON_HEAD, "use_rslora": True, "lora_alpha": 5}, True),
        ({**ON_HEAD, "use_dora": True}, False),
    ],
)
@pytest.mark.filterwarnings("ignore")
def test_lora(make_trainer, settings, in_chunks):
    check_equal(make_trainer, lambda: lora_model(settings), in_chunks=in_chunks)


@pytest.mark.parametrize(
    "settings", [{"objective": {"uniform_ratio": 0.2}}, {"bf16": True, "rtol": 2e-2, "atol": 1e-2}]
)
@pytest.mark.filterwarnings("ignore")
def test_lora_on_the_output_embedding_with(make_trainer, settings):
    check_equal(make_trainer, lambda: lora_model(ON_HEAD), **settings)


@pytest.mark.filterwarnings("ignore")
def test_several_adapters_on_the_output_embedding(make_trainer):
    more = ({**ON_HEAD, "r": 3, "use_rslora": True}, {}, {"target_modules": ["lm_head"], "r": 1})
    check_equal(make_trainer, lambda: lora_model(ON_HEAD, *more))


@pytest.mark.parametrize("objective", [{}, {"uniform_ratio": 0.2}])
def test_autocast(make_trainer, objective):
    check_equal(make_trainer, tiny_model, objective=objective, bf16=True, rtol=2e-2, atol=1e-2)


def test_accumulation_and_gradient_checkpointing(make_trainer):
    check_equal(
        make_trainer,
        lambda: make_model("llama", tie_word_embeddings=True),
        per_device_train_batch_size=4,
        gradient_accumulation_steps=2,
        gradient_checkpointing=True,
        gradient_checkpointing_kwargs={"use_reentrant": False},
    )


@pytest.mark.parametrize("make", [tiny_model, lambda: lora_model(ON_HEAD)])
@pytest.mark.filterwarnings("ignore")
def test_the_most_logits_at_once(make_trainer, monkeypatch, make):
    """A step holds the logits of as many tokens as the key says, and the evaluation is not in chunks."""
    trainer = make_trainer(model=make(), evaluation=Rows(4), logits_chunk=5)
    inner, counts = type(trainer.objective).loss, []

    def counted(self, logits, *rest):
        counts.append(len(logits))
        return inner(self, logits, *rest)

    monkeypatch.setattr(type(trainer.objective), "loss", counted)
    before = trainer.evaluate()["eval_loss"]
    trainer.train()
    assert max(counts) == 5 and len(counts) > 10
    assert make_trainer(model=make(), evaluation=Rows(4), logits_chunk=0).evaluate()["eval_loss"] == before


class Quantized(torch.nn.Linear):
    """As those of bitsandbytes, a subclass."""


def test_only_a_plain_linear_layer_is_computed_in_chunks():
    model = tiny_model()
    head = RowSelectingHead(model)
    assert head.layer() == (model.lm_head, "")
    model.lm_head.forward = model.lm_head.forward  # as accelerate's hooks of a device map do
    assert head.layer()[0] is None
    model.set_output_embeddings(Quantized(32, VOCABULARY, bias=False))
    layer, reason = RowSelectingHead(model).layer()
    assert layer is None and "Quantized" in reason


@pytest.mark.filterwarnings("ignore")
def test_lora_on_the_output_embedding_that_needs_all_logits():
    def reason(change, base=tiny_model, **settings):
        model = lora_model({**ON_HEAD, **settings}, base=base)
        change(model.get_output_embeddings())
        layer, reason = RowSelectingHead(model).layer()
        assert layer is None
        return reason

    def quantized():
        model = tiny_model()
        model.set_output_embeddings(Quantized(32, VOCABULARY, bias=False))
        return model

    assert "DoRA" in reason(lambda head: None, use_dora=True)
    assert "Quantized" in reason(lambda head: None, base=quantized)
    assert "hooks" in reason(lambda head: head.base_layer.register_forward_hook(lambda *_: None))
    assert "hooks" in reason(lambda head: head.lora_B["default"].register_forward_pre_hook(lambda *_: None))
    assert "hooks" in reason(lambda head: vars(head.base_layer).update(forward=head.base_layer.forward))
    assert "replaced" in reason(lambda head: vars(head).update(forward=head.forward))


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("settings", [ON_HEAD, {"modules_to_save": ["lm_head"]}])
def test_adapters_that_are_off_or_merged(make_trainer, settings):
    """The first step's loss is that of all logits."""

    def off(model):
        model.base_model.disable_adapter_layers()

    def merged(model):
        model.merge_adapter()

    def merged_and_off(model):
        model.merge_adapter()
        model.base_model.disable_adapter_layers()

    for number, change in enumerate((off, merged, merged_and_off)):

        def make(change=change):
            model = lora_model(settings)
            with torch.no_grad():
                for name, parameter in model.named_parameters():
                    if "modules_to_save" in name:
                        parameter.mul_(2.0)
            change(model)
            model.get_input_embeddings().weight.requires_grad_()  # a step needs something that it trains
            return model

        logs = [first_step(make_trainer, make(), rows, f"{number}-{rows}", learning_rate=0.0) for rows in (0, 3)]
        assert [in_chunks for *_, in_chunks in logs] == [False, True]
        assert logs[1][0]["loss"] == pytest.approx(logs[0][0]["loss"], rel=1e-5)
