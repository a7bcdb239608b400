"""The formula of memory against the bytes of tensors: of models, their states, and a training step."""

import json

import pytest
import torch
from torch.distributed._tools.mem_tracker import MemTracker
from transformers import AutoModelForCausalLM, GPT2Config, LlamaConfig, Qwen3Config

from llamafactory_ddm.cli.main import main
from llamafactory_ddm.diffusion.chunked_head import head_loss
from llamafactory_ddm.modeling.activations import fuse_gelu
from llamafactory_ddm.modeling.memory import Run, kept_bytes, parts, shape_of
from support.cli import ROOT, in_processes

SMALL = {"hidden_size": 64, "num_hidden_layers": 3, "num_attention_heads": 4, "vocab_size": 101}
CONFIGS = {
    "llama": LlamaConfig(**SMALL, intermediate_size=160, num_key_value_heads=2),
    "qwen3": Qwen3Config(**SMALL, intermediate_size=160, num_key_value_heads=2, head_dim=32),
    "gpt2": GPT2Config(n_embd=64, n_layer=3, n_head=4, vocab_size=101, n_positions=64, attn_pdrop=0.0),
}
LLAMA_7B = LlamaConfig(hidden_size=4096, intermediate_size=11008, num_hidden_layers=32, num_attention_heads=32)


@pytest.mark.parametrize("half", [False, True])
@pytest.mark.parametrize("name", CONFIGS)
def test_what_layers_keep_is_what_they_keep_on_a_device(name, half):
    shape = shape_of(CONFIGS[name], row=32, half=half)
    dtype = torch.bfloat16 if half else torch.float32
    model = AutoModelForCausalLM.from_config(CONFIGS[name], dtype=dtype, attn_implementation="sdpa").train()
    fuse_gelu(model)
    kept = kept_bytes(model, torch.zeros((2, 32), dtype=torch.int64))
    assert 2 * (shape.layers * shape.layer_bytes + shape.other_bytes) == pytest.approx(kept, rel=0.01)


def test_a_llama_layer_by_hand():
    """Elements of 2 bytes that a layer keeps of a token, and its statistics of 4 bytes.

    A norm keeps its input in float32 (2h), the normalised input (h) and its output (h); attention q, k, v and its
    output; the gated network its two products, the activation, and the product of both.
    """
    shape = shape_of(LLAMA_7B, row=16, half=True)
    assert shape.parameters == 6_738_415_616 and shape.layers == 32
    h, f, heads = 4096, 11008, 32
    elements = 2 * (2 * h + h + h) + 3 * h + h + 4 * f
    assert shape.layer_bytes == 16 * (2 * elements + 4 * (heads + 2))


def test_parameters_gradients_and_states_of_one_process():
    config = CONFIGS["llama"]
    model = AutoModelForCausalLM.from_config(config)
    optimizer = torch.optim.AdamW(model.parameters())
    model(torch.zeros((1, 8), dtype=torch.int64)).logits.sum().backward()
    optimizer.step()
    sizes = parts(shape_of(config, row=8, half=False), Run(half=False))
    assert sizes["weights"] == sum(value.nbytes for value in model.parameters())
    assert sizes["gradients"] == sum(value.grad.nbytes for value in model.parameters())
    states = [value for state in optimizer.state.values() for value in state.values() if value.dim()]
    assert sizes["optimizer state"] == sum(value.nbytes for value in states)


@pytest.mark.parametrize("checkpointing", [False, True])
def test_the_peak_of_a_step(checkpointing):
    """Of a step with the loss in chunks: weights, gradients, activations and logits."""
    config = LlamaConfig(**SMALL | {"num_hidden_layers": 8}, intermediate_size=160)
    rows, row = 4, 128
    model = AutoModelForCausalLM.from_config(config, attn_implementation="sdpa").train()
    if checkpointing:
        model.gradient_checkpointing_enable({"use_reentrant": False})
    ids = torch.zeros((rows, row), dtype=torch.int64)
    tracker = MemTracker()
    tracker.track_external(model)
    with tracker:
        hidden = model.model(input_ids=ids, use_cache=False).last_hidden_state.reshape(-1, config.hidden_size)
        cost = lambda logits, _: (logits.float().logsumexp(1).sum(), logits.detach().sum())  # noqa: E731
        head_loss(hidden, model.lm_head.weight, None, cost, rows=64)[0].backward()
    peak = tracker.get_tracker_snapshot("peak")[torch.device("cpu")]["Total"]
    run = Run(rows=rows, half=False, checkpointing=checkpointing, logits=64)
    sizes = parts(shape_of(config, row=row, half=False), run)
    assert sum(sizes.values()) - sizes["optimizer state"] == pytest.approx(peak, rel=0.15)


@pytest.mark.parametrize(
    ("sharding", "expected"),
    [
        ("none", (4, 4, 8)),
        ("zero1", (2, 2, 12 / 8)),
        ("zero2", (2, 2 / 8, 12 / 8)),
        ("zero3", (2 / 8, 2 / 8, 12 / 8)),
        ("fsdp2", (4 / 8, 4 / 8, 8 / 8)),
    ],
)
def test_bytes_of_a_parameter(sharding, expected):
    shape = shape_of(CONFIGS["llama"], row=8, half=True)
    sizes = parts(shape, Run(sharding=sharding, processes=8))
    for name, of_one in zip(("weights", "gradients", "optimizer state"), expected, strict=True):
        assert sizes[name] == pytest.approx(of_one * shape.parameters, abs=1)


@pytest.mark.slow
@pytest.mark.parametrize("shardings", [("fsdp2",), ("zero1", "zero2", "zero3")], ids="-".join)
def test_two_processes_share_what_the_formula_says(shardings, tmp_path):
    if "zero1" in shardings:
        pytest.importorskip("deepspeed")
    CONFIGS["llama"].save_pretrained(tmp_path)
    script = ROOT / "tests" / "modeling" / "sharded_bytes.py"
    finished = in_processes(2, script, tmp_path, *shardings, env={"DS_ACCELERATOR": "cpu"})
    shape = shape_of(CONFIGS["llama"], row=8, half=True)
    outputs = [[json.loads(line) for line in done.stdout.splitlines() if line.startswith('{"')] for done in finished]
    for sharding, *measured in zip(shardings, *outputs, strict=True):
        of_both = [sum(sizes) for sizes in zip(*(one[sharding] for one in measured), strict=True)]
        expected = [2 * size for size in list(parts(shape, Run(sharding=sharding, processes=2)).values())[:3]]
        if sharding == "zero1":  # the whole gradients are gone after the step's reduction
            expected[1] = of_both[1] = 0
        assert of_both == expected, sharding


def test_the_command(tmp_path, capsys):
    CONFIGS["llama"].save_pretrained(tmp_path)
    keys = [f"model_name_or_path={tmp_path}", "cutoff_len=32", "logits_chunk=16"]

    def lines(*words):
        assert main(["memory", "examples/llama2_full_ddm.yaml", *keys, *words]) == 0
        pairs = (line.rsplit(maxsplit=2) for line in capsys.readouterr().out.replace(", without", "\n").splitlines())
        return {words[0].strip(): float(words[1]) for words in pairs if words[-1] == "GB"}

    sizes = lines("gpus=2")
    assert set(sizes) == {*parts(shape_of(CONFIGS["llama"], row=8, half=True), Run()), "total on each GPU"}
    assert any(name.startswith("host: ") for name in lines("deepspeed=examples/deepspeed/ds_z3_offload_config.json"))
    fsdp = ("deepspeed=null", "fsdp=full_shard auto_wrap", "fsdp_config=examples/fsdp/fsdp2_config.json")
    assert "weights in use" in lines(*fsdp)


@pytest.mark.parametrize(
    ("word", "name"),
    [("finetuning_type=lora", "finetuning_type"), ("gpus=0", "gpus"), ("model_name_or_path=null", "model_name")],
)
def test_what_the_formula_does_not_cover_is_an_error(word, name, capsys):
    assert main(["memory", "examples/llama2_full_ddm.yaml", word]) == 1
    error = capsys.readouterr().err
    assert error.startswith(f"llamafactory-ddm memory: {name}") and error.count("\n") == 1


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("owner/nothing-of-this-name", "check the name, the connection and HF_HUB_OFFLINE, or give a folder"),
        ("/nowhere/at/all", "is not a folder; check the path"),
        ("{folder}", "give a folder that holds the config.json"),
    ],
)
def test_a_model_whose_config_is_not_there(name, words, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    name = name.format(folder=tmp_path)
    assert main(["memory", "examples/llama2_full_ddm.yaml", f"model_name_or_path={name}"]) == 1
    error = capsys.readouterr().err
    assert error.startswith("llamafactory-ddm memory: model_name_or_path: ") and error.count("\n") == 1
    assert name in error and words in error and "installation" not in error
