"""The logits of hidden states, for any number of rows."""

import pytest
import torch
from transformers import Gemma2Config, Gemma2ForCausalLM, PhiConfig, PhiForCausalLM

from llamafactory_ddm.modeling.model_runner import ModelRunner
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
    # Later calls reuse buffers of earlier ones, whose sizes differ.
    for n in (70, *range(20), 33):
        for outputs in (None, 30, 50, 1000):
            with runner.project(hidden[:n], outputs) as logits:
                torch.testing.assert_close(logits, expected[:n, :outputs], rtol=1e-5, atol=1e-6)
    chunks = [chunk.clone() for chunk in runner.logits(hidden, 30, rows_at_once=11)]
    torch.testing.assert_close(torch.cat(chunks), expected[:, :30], rtol=1e-5, atol=1e-6)
    runner.close()


def test_padded_rows_get_the_logits_that_they_get_in_a_full_batch():
    model = tiny_model().eval()
    runner = ModelRunner(model)
    hidden = torch.randn(16, model.config.n_embd, generator=torch.Generator().manual_seed(0))
    with runner.project(hidden, None) as logits:
        whole = logits.clone()
    for n in range(5, 16):
        with runner.project(hidden[:n], None) as logits:
            assert torch.equal(logits, whole[:n])
    runner.close()
