"""What the engine loads, as `do_predict` does: adapters, also upon another, 4 bits, published layouts, checkpoints."""

import importlib.util
import json

import pytest

from llamafactory_ddm import load
from support.published import write_dream, write_llada
from support.published_sdar import write_sdar
from support.serving import chat_model

HELLO = [{"role": "user", "content": "Tom has 3 eggs. He gets 2 more. How many eggs does he have?"}]
LORA = {"finetuning_type": "lora"}


def answers(folder, **keys):
    """Return greedy answers, and the text of the prompt."""
    with chat_model(folder, diffusion_steps=6, max_new_tokens=10, temperature=0.0, **keys) as model:
        [response] = model.chat(HELLO, seed=0)
        canvas = model.engine.prepare(HELLO).canvas
        return response.response_text, model.engine.tokenizer.decode(canvas.ids[: response.prompt_length])


def test_a_finetuned_model_answers_as_load_does(finetuned):
    keys = {"diffusion_steps": 12, "temperature": 0.0, "denoising_strategy": "low_confidence", "block_length": 5}
    with chat_model(finetuned, max_new_tokens=10, **keys) as model:
        config = model.engine.generator.config
        assert (config.canvas, config.template.name) == (64, "diffullama")
        [response] = model.chat(HELLO, seed=0)
        prompt = model.engine.prepare(HELLO).canvas
        assert len(model.engine.prepare(HELLO, max_tokens=999).canvas) == 64
    generator = load(finetuned)
    assert generator.from_templated(HELLO[0]["content"], 10).ids == prompt.ids
    assert generator.generate(HELLO[0]["content"], max_new_tokens=10, seed=0, **keys) == [response.response_text]


def test_an_adapted_model_continues_text(checkpoint):
    _, prompt = answers(checkpoint)
    assert prompt == f"<|endoftext|>{HELLO[0]['content']}"
    with chat_model(checkpoint, stage="ddm", generate_from="prefix") as model:
        assert model.engine.generator.config.canvas == 32 and model.chat(HELLO)[0].prompt_length > 3


def test_adapters_and_a_chain_of_them(checkpoint, adapter, finetune, tmp_path):
    base = answers(checkpoint, template="diffullama", sep_token="Ċ")
    one = answers(checkpoint, adapter_name_or_path=str(adapter), **LORA)
    assert one[1] == base[1]  # the adapter's own template
    further = finetune(
        tmp_path / "further",
        recipe="tiny_gpt2_lora_ddm_sft.yaml",
        adapter_name_or_path=adapter,
        create_new_adapter=True,
        learning_rate=0.1,
        max_steps=5,
    )
    two = answers(checkpoint, adapter_name_or_path=f"{adapter},{further}", **LORA)
    assert len({one[0], two[0]}) == 2
    argv = ["--model_name_or_path", str(checkpoint), "--adapter_name_or_path", f"{adapter},{further}"]
    from llamafactory.chat import ChatModel

    model = ChatModel([*argv, "--max_new_tokens", "10", "--diffusion_steps", "6", "--temperature", "0"])
    assert model.chat(HELLO, seed=0)[0].response_text == two[0]
    model.engine.close()


@pytest.mark.slow
@pytest.mark.skipif(importlib.util.find_spec("bitsandbytes") is None, reason="needs bitsandbytes")
def test_a_model_in_four_bits(checkpoint, adapter):
    assert answers(checkpoint, adapter_name_or_path=str(adapter), quantization_bit=4, **LORA)[1]


@pytest.mark.parametrize("write", [write_llada, write_dream, write_sdar])
def test_published_models_are_recognised_and_their_code_is_not_run(tmp_path, write):
    folder = write(tmp_path / "model")
    assert json.loads((folder / "config.json").read_text())["auto_map"]  # which names code that is not there
    with chat_model(folder, template="default", max_new_tokens=8, trust_remote_code=True) as model:
        assert not model.engine.generator.config.template
        [response] = model.chat(HELLO, seed=0)
        assert "".join(model.stream_chat(HELLO, seed=0)) == response.response_text
