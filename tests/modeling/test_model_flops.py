"""The operations of a training step, against those that PyTorch counts while it computes one."""

from dataclasses import replace

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch.utils.flop_counter import FlopCounterMode
from transformers import CONFIG_MAPPING, AutoModelForCausalLM

from llamafactory_ddm.data.collators import ResponseCollator
from llamafactory_ddm.diffusion.attention import full_pairs
from llamafactory_ddm.diffusion.schedules import get_schedule
from llamafactory_ddm.modeling.bidirectional import full_attention_mask, make_bidirectional
from llamafactory_ddm.modeling.block_attention import two_stream_inputs, two_stream_visibility
from llamafactory_ddm.modeling.device_peaks import peak_flops
from llamafactory_ddm.modeling.model_flops import ModelFlops, StepCounts, model_flops
from llamafactory_ddm.modeling.row_selecting_head import RowSelectingHead
from llamafactory_ddm.objectives.base import CleanBatch
from llamafactory_ddm.objectives.block import BlockObjective
from llamafactory_ddm.objectives.masked import MaskedObjective

VOCABULARY, MASK_ID, LENGTH, BATCH, LAYERS, WIDTH = 41, 40, 16, 2, 3, 32
LATENT = {"qk_rope_head_dim": 4, "qk_nope_head_dim": 8, "head_dim": 4, "num_key_value_heads": 4}


def make_model(family, **settings):
    sizes = {
        "vocab_size": VOCABULARY,
        "max_position_embeddings": 2 * LENGTH,
        "hidden_size": WIDTH,
        "num_hidden_layers": LAYERS,
        "num_attention_heads": 4,
        "bos_token_id": 1,
        "eos_token_id": 2,
        "pad_token_id": 0,
    }
    if family != "gpt2":
        sizes |= {"intermediate_size": 48, "num_key_value_heads": 2, "head_dim": 12}
    config = CONFIG_MAPPING[family](**{**sizes, **settings})
    torch.manual_seed(0)
    # Eager attention computes every pair, in products that PyTorch counts.
    model = AutoModelForCausalLM.from_config(config, attn_implementation="eager", dtype=torch.float32)
    make_bidirectional(model)
    return model.train()


def noised(objective, clean):
    return objective.noise(clean, sample_index=torch.arange(len(clean.x_0)), group_size=len(clean.x_0))


def rows(lengths=(LENGTH, LENGTH)):
    keep = (torch.arange(LENGTH) < torch.tensor(lengths)[:, None]).long()
    ids = torch.randint(3, MASK_ID, keep.shape, generator=torch.Generator().manual_seed(1))
    return {"input_ids": ids, "attention_mask": keep}


def objective(kind=MaskedObjective, **settings):
    return kind(mask_id=MASK_ID, shift=True, schedule=get_schedule("linear"), **settings)


def counted(model, batch, clean):
    """Return the operations that PyTorch counts in the forward and backward pass of a step."""
    if batch.placement is None:
        arguments = {
            "attention_mask": full_attention_mask(
                model,
                batch=len(clean.x_0),
                length=clean.x_0.shape[1],
                is_padding=clean.is_padding,
                visible=None,
                dtype=torch.float32,
                device=torch.device("cpu"),
                document=clean.document,
            )
        }
    else:
        arguments = two_stream_inputs(model, batch.z_t, dtype=torch.float32, **batch.placement)
    head = RowSelectingHead(model)
    with FlopCounterMode(display=False) as counter, head.only(batch.head_index):
        model(input_ids=batch.z_t, use_cache=False, **arguments).logits.square().sum().backward()
    head.remove()
    by_module = counter.get_flop_counts()
    angles = sum(sum(found.values()) for name, found in by_module.items() if name.endswith("rotary_emb"))
    return counter.get_total_flops() - angles  # of positions, which have no weights


def ours(model):
    return model_flops(model, model.get_output_embeddings())


def lora(model, **settings):
    made = get_peft_model(model, LoraConfig(r=4, **settings))
    made.enable_input_require_grads()  # as upstream does with gradient checkpointing: the first layer is no exception
    return made


@pytest.mark.parametrize(
    ("family", "settings"),
    [
        ("gpt2", {}),
        ("gpt2", {"tie_word_embeddings": False}),
        ("llama", {"tie_word_embeddings": True}),
        ("llama", {"tie_word_embeddings": False, "attention_bias": True}),
        ("qwen3", {}),
        # Its values are narrower than its queries and keys, and config.head_dim is a part of these.
        ("youtu", {"q_lora_rank": 8, "kv_lora_rank": 8, "v_head_dim": 6, **LATENT}),
    ],
)
def test_full_finetuning(family, settings):
    model, ddm = make_model(family, **settings), objective()
    clean = ddm.clean(rows())
    batch = noised(ddm, clean)
    counts = StepCounts.of(clean, batch, None)
    assert counts == StepCounts(BATCH * LENGTH, len(batch.head_index), BATCH * LENGTH**2, BATCH * LENGTH**2)
    assert 0 < counts.logits < BATCH * (LENGTH - 1)
    assert ours(model).of(counts) == counted(model, batch, clean)
    if family == "gpt2":  # 12 d^2 weights a layer: four d x d for attention, two of d x 4 d
        n, heads = 12 * WIDTH**2 * LAYERS, WIDTH
        assert ours(model) == ModelFlops(6 * n, 6 * VOCABULARY * WIDTH, 12 * LAYERS * heads, 0)


@pytest.mark.parametrize(
    ("family", "settings"),
    [
        ("gpt2", {"target_modules": ["c_attn", "c_proj", "c_fc"], "fan_in_fan_out": True}),
        ("llama", {"target_modules": ["q_proj", "v_proj"]}),
        ("llama", {"target_modules": "all-linear"}),
        ("llama", {"target_modules": ["q_proj", "lm_head"]}),
        ("llama", {"target_modules": ["q_proj"], "modules_to_save": ["lm_head"]}),
    ],
)
def test_lora(family, settings):
    model, ddm = lora(make_model(family), **settings), objective()
    clean = ddm.clean(rows())
    batch = noised(ddm, clean)
    operations = ours(model).of(StepCounts.of(clean, batch, None))
    # Gradients of the inputs of the first layer, which are needed for nothing: those of its query, key and value
    # layers before an adapter. The formula counts none that precede the first trained weight.
    total = counted(model, batch, clean)
    first = sum(p.numel() for name, p in model.named_parameters() if ".0." in name and "embed" not in name)
    assert total - 2 * BATCH * LENGTH * first <= operations <= total
    assert operations > 0.9 * total


def test_lora_without_input_gradients():
    """Weights of the first layer to which nothing trained leads back get no gradient of their input."""
    model = get_peft_model(make_model("gpt2"), LoraConfig(r=4, target_modules=["c_attn"], fan_in_fan_out=True))
    ddm = objective()
    clean = ddm.clean(rows())
    batch = noised(ddm, clean)
    assert ours(model).of(StepCounts.of(clean, batch, None)) == counted(model, batch, clean)


def test_frozen_layers():
    model, ddm = make_model("gpt2"), objective()
    model.requires_grad_(False)
    model.transformer.h[-1].requires_grad_(True)
    clean = ddm.clean(rows())
    batch = noised(ddm, clean)
    assert ours(model).of(StepCounts.of(clean, batch, None)) == counted(model, batch, clean)


def test_gradient_checkpointing_is_not_counted():
    model, ddm = make_model("llama"), objective()
    clean = ddm.clean(rows())
    batch = noised(ddm, clean)
    plain = counted(model, batch, clean)
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    counts = StepCounts.of(clean, batch, None)
    assert counted(model, batch, clean) > 1.2 * plain
    assert ours(model).of(counts) == plain


def test_padding_and_other_documents_are_not_counted():
    """What eager attention computes beyond them is known."""
    ddm = objective()
    clean = ddm.clean(rows((LENGTH, 5)))
    counts = StepCounts.of(clean, noised(ddm, clean), None)
    assert (counts.columns, counts.pairs) == (LENGTH + 5, LENGTH**2 + 5**2)
    ids = list(range(3, 15))
    packed = {"input_ids": ids, "labels": ids, "attention_mask": [1] * 12, "position_ids": [*range(5), *range(7)]}
    short = {"input_ids": ids[:3], "labels": ids[:3], "attention_mask": [1] * 3, "position_ids": [*range(3)]}
    clean = ddm.clean(ResponseCollator(pad_id=0, shift=True)([packed, short]))
    assert sorted(clean.document_lengths().tolist())[-3:] == [3, 5, 7]
    counts = StepCounts.of(clean, noised(ddm, clean), 3)
    near = sum(abs(i - j) < 3 for n in (3, 5, 7) for i in range(n) for j in range(n))
    assert counts == StepCounts(15, counts.logits, 9 + 25 + 49, near)


@pytest.mark.parametrize("window", [1, 2, 5, 9, 100])
def test_pairs_in_a_window(window):
    lengths = torch.tensor([0, 1, 4, 9])
    expected = sum(abs(i - j) < window for n in lengths.tolist() for i in range(n) for j in range(n))
    assert full_pairs(lengths, window) == expected


def test_layers_with_a_sliding_window():
    sizes = {"head_dim": 12, "sliding_window": 4, "query_pre_attn_scalar": 12}
    flops = ours(make_model("gemma2", **sizes))  # every other layer has a window, from the first
    assert (flops.per_near_pair, flops.per_pair) == (2 * 12 * 48, 12 * 48)
    flops = ours(make_model("mistral", sliding_window=4))
    assert (flops.per_near_pair, flops.per_pair) == (3 * 12 * 48, 0)
    flops = ours(make_model("mistral", sliding_window=None))
    assert (flops.per_near_pair, flops.per_pair) == (0, 3 * 12 * 48)


@pytest.mark.parametrize("lengths", [(LENGTH, LENGTH), (LENGTH, 5)])
def test_two_streams(lengths):
    """Both streams count as columns, and of the pairs those that see each other."""
    model, ddm = make_model("llama"), objective(BlockObjective, block_length=4)
    clean = ddm.clean(rows(lengths))
    batch = noised(ddm, clean)
    counts, columns = StepCounts.of(clean, batch, None), batch.z_t.shape[1]
    block, is_noisy = (torch.atleast_2d(batch.placement[name]).expand(2, -1) for name in ("block", "is_noisy"))
    is_token = block >= 0
    seen = two_stream_visibility(block, is_noisy)[:, 0] & is_token[:, :, None]
    assert counts.pairs == int(seen.sum()) < BATCH * columns**2
    assert counts.columns == int(is_token.sum()) > sum(lengths)
    everything = replace(counts, columns=BATCH * columns, pairs=BATCH * columns**2)
    assert ours(model).of(everything) == counted(model, batch, clean)


def test_two_streams_of_packed_documents():
    ids = list(range(3, 17))
    packed = {"input_ids": ids, "labels": ids, "attention_mask": [1] * 14, "position_ids": [*range(5), *range(9)]}
    short = {"input_ids": ids[:7], "labels": ids[:7], "attention_mask": [1] * 7, "position_ids": [*range(7)]}
    ddm = objective(BlockObjective, block_length=4)
    clean = ddm.clean(ResponseCollator(pad_id=0, shift=True)([packed, short]))
    batch = noised(ddm, clean)
    place = batch.placement
    seen = two_stream_visibility(place["block"], place["is_noisy"], place["document"])[:, 0]
    counts = StepCounts.of(clean, batch, None)
    assert counts.pairs == int((seen & (place["block"] >= 0)[:, :, None]).sum()) > 50


def test_a_model_whose_operations_are_not_known():
    experts = {"moe_intermediate_size": 16, "num_experts": 4}
    model = make_model("qwen3_moe", **experts, num_experts_per_tok=2)
    assert ours(model) is None
    model = make_model("gemma4_text", **experts, enable_moe_block=True, top_k_experts=2, global_head_dim=12)
    assert ours(model) is None and not hasattr(model.config, "num_experts_per_tok")
    model = make_model("llama")
    model.model.layers[0].mlp.register_buffer("qweight", torch.zeros(2, 2, dtype=torch.int32))
    assert ours(model) is None


@pytest.mark.parametrize(
    ("name", "dtype", "tf32", "teraflops"),
    [
        ("NVIDIA A100-SXM4-80GB", torch.bfloat16, False, 312),
        ("NVIDIA A100 80GB PCIe", torch.float32, True, 156),
        ("NVIDIA A100 80GB PCIe", torch.float32, False, 19.5),
        ("NVIDIA H100 80GB HBM3", torch.float16, False, 989.4),
        ("NVIDIA H200", torch.bfloat16, False, 989.4),
        ("Tesla T4", torch.float16, False, 65),
        ("Tesla T4", torch.bfloat16, False, None),  # it has no matrix units for bfloat16
        ("Tesla T4", torch.float32, True, 8.1),
        ("NVIDIA A100-SXM4-40GB MIG 1g.5gb", torch.bfloat16, False, None),
        ("NVIDIA GeForce RTX 4090 Laptop GPU", torch.bfloat16, False, None),
        ("NVIDIA H200", torch.float64, False, None),
        ("cpu", torch.float32, False, None),
    ],
)
def test_peaks(name, dtype, tf32, teraflops):
    assert peak_flops(name, dtype, tf32=tf32) == (None if teraflops is None else pytest.approx(1e12 * teraflops))


def test_a_clean_batch_without_padding_or_documents():
    clean = CleanBatch.of({"input_ids": torch.ones(3, 7, dtype=torch.int64)}, shift=False, mask_id=MASK_ID)
    assert clean.document_lengths().tolist() == [7, 7, 7]
