"""Left padding and packing in every family of decoders that transformers has and LLaMA-Factory's users train."""

import inspect

import pytest
import torch
import transformers
from packaging.version import Version
from transformers import CONFIG_MAPPING
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

from llamafactory_ddm.modeling.bidirectional import (
    NotBidirectionalError,
    full_attention_mask,
    make_bidirectional,
    probe_bidirectional,
)
from llamafactory_ddm.modeling.block_denoiser import BlockDenoiser
from llamafactory_ddm.modeling.cached_denoiser import CachedDenoiser, check_cacheable
from llamafactory_ddm.modeling.denoiser import ModelDenoiser
from llamafactory_ddm.modeling.joint_pass import run_joint
from llamafactory_ddm.modeling.model_info import window_of
from llamafactory_ddm.modeling.model_runner import ModelRunner
from llamafactory_ddm.sampling import STRATEGIES, get_strategy, sample

LENGTH = 10
STRATEGY_NAMES = sorted(STRATEGIES)
DENSE = [
    "apertus",
    "arcee",
    "bitnet",
    "cohere",
    "cohere2",
    "cwm",
    "ernie4_5",
    "exaone4",
    "falcon",
    "gemma",
    "gemma2",
    "gemma3_text",
    "glm",
    "glm4",
    "gpt2",
    "gpt_bigcode",
    "gpt_neox",
    "gptj",
    "granite",
    "helium",
    "hunyuan_v1_dense",
    "jais2",
    "llama",
    "ministral",
    "mistral",
    "nanochat",
    "olmo",
    "olmo2",
    "olmo3",
    "persimmon",
    "phi",
    "phi3",
    "qwen2",
    "qwen3",
    "seed_oss",
    "smollm3",
    "stablelm",
    "starcoder2",
    "vaultgemma",
]
EXPERTS = [
    "dots1",
    "ernie4_5_moe",
    "exaone_moe",
    "flex_olmo",
    "glm4_moe",
    "gpt_oss",
    "granitemoe",
    "granitemoeshared",
    "hunyuan_v1_moe",
    "mixtral",
    "olmoe",
    "phimoe",
    "qwen2_moe",
    "qwen3_moe",
]
# They look back by a state of their own, or build their causality in: refused, never trained in silence.
REFUSED = ("bloom", "ctrl", "mamba", "mpt", "nemotron", "qwen3_5_text", "qwen3_next", "recurrent_gemma", "rwkv")
# A value, and what configs call the sizes that get it; each takes those that it knows.
NAMES = {
    1: "num_key_value_heads n_shared_experts n_group topk_group first_k_dense_replace",
    2: "num_hidden_layers n_layer n_layers num_layers num_attention_heads n_head n_heads num_experts_per_tok moe_k",
    4: "num_experts num_local_experts n_routed_experts moe_num_experts",
    8: "rotary_dim",
    16: "head_dim moe_intermediate_size",
    32: "hidden_size n_embd d_model",
    40: "vocab_size",
    48: "intermediate_size",
    64: "max_position_embeddings n_positions",
}
SETTINGS = {name: value for value, names in NAMES.items() for name in names.split()}
SETTINGS |= {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2, "hidden_act": "silu"}


def known(names):
    """Return those of `names` that this version of transformers has."""
    return [name for name in names if name in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES]


def build(name):
    kind = CONFIG_MAPPING[name]
    taken = {*inspect.signature(kind.__init__).parameters, *getattr(kind, "__dataclass_fields__", ())}
    torch.manual_seed(1)
    config = kind(**{key: value for key, value in SETTINGS.items() if key in taken})
    model = getattr(transformers, MODEL_FOR_CAUSAL_LM_MAPPING_NAMES[name])(config).eval()
    with torch.no_grad():  # larger weights, so that a dependence shows
        for parameter in model.parameters():
            if parameter.dim() > 1:
                parameter.mul_(3)
    return model


def forward(model, ids, *, is_padding=None, document=None, **rest):
    shape = {"batch": len(ids), "length": ids.shape[1], "dtype": model.dtype, "device": ids.device}
    mask = full_attention_mask(model, is_padding=is_padding, document=document, visible=None, **shape)
    with torch.no_grad():
        return model(input_ids=ids, attention_mask=mask, use_cache=False, **rest).logits


def test_at_least_forty_families_are_known():
    assert len(known([*DENSE, *EXPERTS])) >= 40


@pytest.mark.parametrize("name", known([*DENSE, *EXPERTS]))
def test_padding_and_packing_change_nothing(name):
    model = build(name)
    make_bidirectional(model)
    probe_bidirectional(model)
    ids = torch.randint(3, 40, (2, LENGTH), generator=torch.Generator().manual_seed(5))
    alone = forward(model, ids[:1])
    scale = 1e-4 * float(alone.std())

    is_padding = torch.zeros(2, LENGTH, dtype=torch.bool)
    is_padding[1, :6] = True
    positions = torch.arange(LENGTH).repeat(2, 1)
    positions[1] = (positions[1] - 6).clamp(min=0)
    padded = forward(model, ids, is_padding=is_padding, position_ids=positions)
    torch.testing.assert_close(padded[0], alone[0], rtol=0, atol=scale)
    torch.testing.assert_close(padded[1, 6:], forward(model, ids[1:, 6:])[0], rtol=0, atol=scale)

    document = torch.tensor([[1] * 4 + [2] * 5 + [0]])
    positions = torch.tensor([[0, 1, 2, 3, 0, 1, 2, 3, 4, 0]])
    packed = forward(model, ids[:1], is_padding=document == 0, document=document, position_ids=positions)
    for part in (slice(0, 4), slice(4, 9)):
        torch.testing.assert_close(packed[0, part], forward(model, ids[:1, part])[0], rtol=0, atol=scale)
    assert (packed[0, 4:9] - alone[0, 4:9]).abs().max() > 10 * scale  # the test would see a leak


@pytest.mark.parametrize("name", known([*DENSE, *EXPERTS]))
def test_a_cache_that_is_computed_again_in_every_pass_changes_nothing(name):
    if name == "phimoe" and Version(transformers.__version__) < Version("5"):
        pytest.skip("its rotary embedding takes the number of columns for the largest position")
    model = build(name)
    make_bidirectional(model)
    check_cacheable(model, "dual")
    ids = torch.randint(3, 40, (2, LENGTH), generator=torch.Generator().manual_seed(6))
    is_padding = torch.arange(LENGTH) < torch.tensor([[0], [3]])
    options = {"shift": True, "is_padding": is_padding}
    strategy = STRATEGY_NAMES[[*DENSE, *EXPERTS].index(name) % len(STRATEGY_NAMES)]

    def run(denoiser):
        editable = torch.arange(LENGTH).expand(2, -1) >= 5
        output = sample(
            denoiser, ids, editable=editable, mask_id=1, steps=6, block_length=3, strategy=get_strategy(strategy)
        )
        denoiser.close()
        return output

    plain = run(ModelDenoiser(model, **options))
    refreshed = run(CachedDenoiser(model, kind="dual", refresh=1, **options))
    assert torch.equal(refreshed.sequences, plain.sequences) and torch.equal(refreshed.committed, plain.committed)
    assert refreshed.computed == plain.computed
    assert run(CachedDenoiser(model, kind="dual", **options)).computed < plain.computed


@pytest.mark.parametrize("name", known([*DENSE, *EXPERTS]))
def test_a_joint_pass_is_its_passes(name):
    """Passes that differ in rows, columns, padding and cache give what each gives alone, and so do their caches."""
    if name == "phimoe" and Version(transformers.__version__) < Version("5"):
        pytest.skip("its rotary embedding takes the number of columns for the largest position")
    model = build(name)
    make_bidirectional(model)
    is_padding = torch.arange(LENGTH) < torch.tensor([[0], [3]])
    sizes = [(1, 8), (2, LENGTH), (1, 9), (2, LENGTH), (1, 9)]
    runner = ModelRunner(model)

    def hidden_states(run):
        """Of three steps of each denoiser; from the second on those with a cache compute only some columns."""
        generator = torch.Generator().manual_seed(7)
        canvases = [torch.randint(3, 40, size, generator=generator) for size in sizes]
        denoisers = [
            ModelDenoiser(model, shift=True),
            ModelDenoiser(model, shift=True, is_padding=is_padding),
            CachedDenoiser(model, kind="dual", shift=False),
            CachedDenoiser(model, kind="prefix", shift=True, is_padding=is_padding),
        ]
        if window_of(model) is None:
            denoisers.append(BlockDenoiser(model, block_length=4, shift=True))
        for step in range(3):
            passes = []
            for denoiser, z in zip(denoisers, canvases, strict=False):
                z[:, 4 + step] = 9 + step
                asked = torch.tensor([5, 7]) + (len(z) - 1) * z.shape[1]
                passes += denoiser.passes(z, asked, (torch.arange(z.shape[1]) >= 4).expand(z.shape))[0]
            yield from (hidden for hidden, _ in run(passes))

    alone = list(hidden_states(lambda passes: [runner.run(one) for one in passes]))
    joint = list(hidden_states(lambda passes: run_joint(runner, passes)))
    for one, other in zip(joint, alone, strict=True):
        torch.testing.assert_close(one, other, rtol=0, atol=1e-4 * float(other.std()))
    runner.close()


@pytest.mark.parametrize("name", known(REFUSED))
def test_families_that_stay_causal_are_refused(name):
    with pytest.raises(NotBidirectionalError):
        model = build(name)
        make_bidirectional(model)
        probe_bidirectional(model)
