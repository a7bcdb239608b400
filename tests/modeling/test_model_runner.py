"""The logits of hidden states, for any number of rows."""

import pytest
import torch
from transformers import Gemma2Config, Gemma2ForCausalLM, PhiConfig, PhiForCausalLM

from llamafactory_ddm.modeling.model_runner import ModelPass, ModelRunner
from support.tiny import tiny_model

SMALL = {
    "vocab_size": 50,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
}


def phi():
    model = PhiForCausalLM(PhiConfig(**SMALL))
    torch.nn.init.normal_(model.lm_head.bias)
    return model


MODELS = {
    "tied": tiny_model,
    "bias": phi,
    "soft capping": lambda: Gemma2ForCausalLM(
        Gemma2Config(**SMALL, num_key_value_heads=1, head_dim=16, final_logit_softcapping=0.01)
    ),
}


@pytest.mark.filterwarnings("error")  # torch warns of an output argument of the wrong size
@pytest.mark.parametrize("name", MODELS)
def test_logits_are_those_of_the_output_embedding(name):
    torch.manual_seed(0)
    model = MODELS[name]().eval()
    runner, head = ModelRunner(model), model.get_output_embeddings()
    cap = getattr(model.config, "final_logit_softcapping", None)
    hidden = torch.randn(70, head.in_features)
    with torch.inference_mode():
        expected = head(hidden)
        expected = expected if cap is None else cap * torch.tanh(expected / cap)
    # A later call gets the memory of an earlier one, which may be of another size.
    for n in (4, 5, 70, *range(20), 33):
        for outputs in (30, None, 50, 1000):
            with runner.project(hidden[:n], outputs) as logits:
                torch.testing.assert_close(logits, expected[:n, :outputs], rtol=1e-5, atol=1e-6)
    chunks = [chunk.clone() for chunk in runner.logits(hidden, 30, rows_at_once=11)]
    torch.testing.assert_close(torch.cat(chunks), expected[:, :30], rtol=1e-5, atol=1e-6)
    runner.close()


def test_a_cpu_never_multiplies_a_slow_number_of_rows(monkeypatch):
    model, sizes, mm = tiny_model().eval(), [], torch.mm

    def product(rows, *args, **keys):
        sizes.append(len(rows))
        return mm(rows, *args, **keys)

    monkeypatch.setattr(torch, "mm", product)
    runner = ModelRunner(model)
    for n in range(20):
        with runner.project(torch.zeros(n, model.config.n_embd), None) as logits:
            assert len(logits) == n
    assert sizes == [*range(5), *[16] * 11, *range(16, 20)]
    runner.close()


@pytest.mark.parametrize("kind", ["hook", "forward"])
def test_what_others_change_in_the_output_embedding_applies(kind):
    """LLaMA-Factory's upcast_lmhead_output is a hook; accelerate loads an offloaded weight in a forward of its own."""
    model = tiny_model().eval()
    runner, head, hidden = ModelRunner(model), model.lm_head, torch.randn(7, model.config.n_embd)
    with torch.inference_mode():
        expected = head(hidden) * 2
    if kind == "hook":
        head.register_forward_hook(lambda module, args, output: output * 2)
    else:
        forward = head.forward
        head.forward = lambda hidden: forward(hidden) * 2
    with runner.project(hidden, None) as logits:
        torch.testing.assert_close(logits, expected)
    runner.close()


def test_logits_that_are_still_read_are_not_overwritten():
    model = tiny_model().eval()
    runner = ModelRunner(model)
    hidden = torch.randn(3, 20, model.config.n_embd, generator=torch.Generator().manual_seed(0))
    for n in (1, 7, 20):
        streams = [runner.logits(part[:n], 30, rows_at_once=4) for part in hidden]
        for low, parts in zip(range(0, n, 4), zip(*streams, strict=True), strict=True):
            for part, own in zip(parts, hidden, strict=True):
                expected = model.lm_head(own[low : min(low + 4, n)])[:, :30]
                torch.testing.assert_close(part, expected, rtol=1e-5, atol=1e-6)
    runner.close()


def test_logits_under_autocast_are_those_of_the_model():
    """An evaluation by generation within training in bf16 runs so."""
    model = tiny_model().eval()
    runner = ModelRunner(model)
    z = torch.randint(3, 30, (2, 12), generator=torch.Generator().manual_seed(0))
    one = ModelPass(z, None, None, torch.arange(24))
    with torch.autocast("cpu", torch.bfloat16):
        hidden, logits = runner.run(one)
        assert logits is None  # `project` gives the same
        with runner.project(hidden, None) as projected, torch.no_grad():
            assert projected.dtype == torch.bfloat16
            assert torch.equal(projected, model(z).logits.flatten(0, 1))
    runner.close()
