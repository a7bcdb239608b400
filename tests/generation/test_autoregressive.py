"""Sampling from an autoregressive model with its KV cache."""

from collections import Counter

import pytest
import torch
from transformers import BertConfig, BertLMHeadModel, OpenAIGPTConfig, OpenAIGPTLMHeadModel

from llamafactory_ddm.diffusion.noise import Stream
from llamafactory_ddm.diffusion.rng import keyed_uniform
from llamafactory_ddm.generation.autoregressive import AutoregressiveModel, load_autoregressive
from llamafactory_ddm.sampling.logits import LogitsConfig, penalise_repetition
from llamafactory_ddm.sampling.tokens import draw_tokens
from support.tiny import save_pair, tiny_tokenizer


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    return save_pair(tmp_path_factory.mktemp("models"))


@pytest.fixture(scope="module")
def model(folders):
    return load_autoregressive(str(folders[0]))


def texts(model, config=None, n=12, seed=0, indices=(0, 1, 2, 3)):
    return model.sample(n, config or LogitsConfig(), seed=seed, sample_indices=indices)


@torch.no_grad()
def plain(model, config, n, seed, index):
    """One text, the whole sequence through the model for each token."""
    ids = []
    for step in range(n):
        logits = model.model(input_ids=torch.tensor([[model.start_id, *ids]]), use_cache=False).logits[:, -1]
        if config.repetition_penalty != 1.0:
            logits = penalise_repetition(logits, torch.tensor([ids], dtype=torch.int64), config.repetition_penalty)
        logits[:, 0] -= config.eos_penalty
        tries = 8 if config.top_p < 1 else 1
        number, at = torch.tensor([index]), torch.tensor([step])
        u = keyed_uniform(seed, Stream.SAMPLE_TOKEN, number, 2 * tries, steps=at).double()
        token = int(draw_tokens(logits, config, u[:, 0::2] + u[:, 1::2] / 2**24).ids)
        if token == 0:
            break
        ids.append(token)
    return ids


@pytest.mark.parametrize(
    "config",
    [
        LogitsConfig(),
        LogitsConfig(temperature=0.5, top_p=0.8),
        LogitsConfig(top_k=3),
        LogitsConfig(repetition_penalty=1.5),
        LogitsConfig(eos_penalty=-4.0),
        LogitsConfig(suppress=(5, 6, 7)),
    ],
)
def test_the_cache_changes_nothing(model, config):
    found = texts(model, config)
    for index, text in enumerate(found):
        ids = plain(model, config, 12, 0, index)
        assert text.n_tokens == len(ids)
        assert text.text == model.tokenizer.decode(ids)
        assert text.num_forward_passes == len(ids) + (len(ids) < 12)


def test_greedy_texts_are_those_of_transformers(model):
    (text,) = texts(model, LogitsConfig(temperature=0.0), indices=(0,))
    start = torch.tensor([[0]])
    ids = model.model.generate(start, attention_mask=torch.ones_like(start), do_sample=False, max_new_tokens=12)
    assert text.text == model.tokenizer.decode(ids[0, 1:], skip_special_tokens=True)


def test_texts_depend_on_seed_and_index_alone(model):
    whole = texts(model)
    assert [texts(model, indices=(index,))[0] for index in range(4)] == whole
    assert texts(model, indices=(3, 1)) == [whole[3], whole[1]]
    assert texts(model, seed=1) != whole
    assert len({text.text for text in whole}) > 1


def test_the_first_token_has_the_models_distribution(model):
    found = model.sample(1, LogitsConfig(), seed=0, sample_indices=range(4000))
    with torch.no_grad():
        p = model.model(input_ids=torch.tensor([[0]])).logits[0, -1].softmax(0)
    expected = Counter()
    for token, probability in enumerate(p.tolist()):
        expected["" if token == 0 else model.tokenizer.decode([token])] += probability
    seen = Counter(text.text for text in found)
    assert len(seen) > 3 and set(seen) <= set(expected)
    for text, probability in expected.items():
        error = (probability * (1 - probability) / 4000) ** 0.5
        assert seen[text] / 4000 == pytest.approx(probability, abs=4.5 * error + 1e-3), text


def test_a_model_without_a_cache_is_refused():
    """Its tokens would not depend on those before the last."""
    sizes = {"vocab_size": 300, "n_positions": 16, "n_embd": 32, "n_layer": 1, "n_head": 2}
    model = AutoregressiveModel(OpenAIGPTLMHeadModel(OpenAIGPTConfig(**sizes)), tiny_tokenizer())
    with pytest.raises(ValueError, match="OpenAIGPTLMHeadModel has no KV cache"):
        texts(model)


def test_what_cannot_be_loaded(folders, tmp_path):
    with pytest.raises(ValueError, match="bidirectional"):
        load_autoregressive(str(folders[1]))
    with pytest.raises(ValueError, match="is not a folder"):
        load_autoregressive("./absent")
    with pytest.raises(ValueError, match="cannot be loaded"):
        load_autoregressive(str(tmp_path))
    bert = BertConfig(vocab_size=300, hidden_size=32, num_hidden_layers=1, num_attention_heads=2, intermediate_size=32)
    BertLMHeadModel(bert).save_pretrained(tmp_path / "bert")
    load_autoregressive(str(folders[0])).model.save_pretrained(tmp_path / "bare")
    with pytest.raises(ValueError, match=r"bare (holds no tokenizer|cannot be loaded)"):
        load_autoregressive(str(tmp_path / "bare"))
    tiny_tokenizer().save_pretrained(tmp_path / "bert")
    with pytest.raises(ValueError, match="bidirectional"):
        load_autoregressive(str(tmp_path / "bert"))
    with pytest.raises(ValueError, match="NaN"):
        broken = load_autoregressive(str(folders[0]))
        broken.model.transformer.ln_f.weight.data.fill_(torch.nan)
        texts(broken)
