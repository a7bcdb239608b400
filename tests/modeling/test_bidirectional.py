import pytest
import torch
from transformers import (
    FalconConfig,
    FalconForCausalLM,
    Gemma2Config,
    Gemma2ForCausalLM,
    Gemma3ForCausalLM,
    Gemma3TextConfig,
    GPT2Config,
    GPT2LMHeadModel,
    GPTNeoConfig,
    GPTNeoForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
    MistralConfig,
    MistralForCausalLM,
    OPTConfig,
    OPTForCausalLM,
    Qwen2Config,
    Qwen2ForCausalLM,
    Qwen3Config,
    Qwen3ForCausalLM,
    Qwen3MoeConfig,
    Qwen3MoeForCausalLM,
)

from llamafactory_ddm.modeling import bidirectional
from llamafactory_ddm.modeling.bidirectional import (
    NotBidirectionalError,
    full_attention_mask,
    is_bidirectional,
    make_bidirectional,
    probe_bidirectional,
)

LENGTH, WINDOW = 10, 3
SMALL = {
    "vocab_size": 40,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "head_dim": 16,
    "max_position_embeddings": 64,
    "pad_token_id": 0,
}


def build(name, attention="sdpa", layers=1):
    torch.manual_seed(1)
    small = {**SMALL, "num_hidden_layers": layers}
    qwen2 = {key: value for key, value in small.items() if key != "head_dim"}
    window = {"sliding_window": WINDOW}
    always = {**window, "use_sliding_window": True, "max_window_layers": 0}
    full, sliding = {"layer_types": ["full_attention"] * layers}, {"layer_types": ["sliding_attention"] * layers}
    soft = {**window, "attn_logit_softcapping": None, "final_logit_softcapping": 5.0}
    gpt2 = {"vocab_size": 40, "n_positions": 64, "n_embd": 32, "n_layer": layers, "n_head": 2}
    kind, config_kind, settings = {
        "gpt2": (GPT2LMHeadModel, GPT2Config, gpt2),
        "llama": (LlamaForCausalLM, LlamaConfig, small),
        "qwen2": (Qwen2ForCausalLM, Qwen2Config, qwen2),
        "qwen2_window": (Qwen2ForCausalLM, Qwen2Config, {**qwen2, **always}),
        "qwen3": (Qwen3ForCausalLM, Qwen3Config, small),
        "qwen3_window": (Qwen3ForCausalLM, Qwen3Config, {**small, **always}),
        "mistral": (MistralForCausalLM, MistralConfig, {**small, "sliding_window": None}),
        "mistral_window": (MistralForCausalLM, MistralConfig, {**small, **window}),
        "gemma2": (Gemma2ForCausalLM, Gemma2Config, {**small, **soft, **full}),
        "gemma2_window": (Gemma2ForCausalLM, Gemma2Config, {**small, **soft, **sliding}),
        "gemma3": (Gemma3ForCausalLM, Gemma3TextConfig, {**small, **soft, **full}),
        "gemma3_window": (Gemma3ForCausalLM, Gemma3TextConfig, {**small, **soft, **sliding}),
    }[name]
    config = config_kind(**settings)
    config._attn_implementation = attention
    model = kind(config).eval()
    # Larger weights, so that every dependence shows in float32.
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() > 1:
                parameter.mul_(8)
    return model


NAMES = [
    "gpt2",
    "llama",
    "qwen2",
    "qwen2_window",
    "qwen3",
    "qwen3_window",
    "mistral",
    "mistral_window",
    "gemma2",
    "gemma2_window",
    "gemma3",
    "gemma3_window",
]


def forward(model, ids, *, is_padding=None, visible=None, document=None, **rest):
    mask = full_attention_mask(
        model,
        batch=len(ids),
        length=ids.shape[1],
        is_padding=is_padding,
        visible=visible,
        dtype=model.dtype,
        device=ids.device,
        document=document,
    )
    with torch.no_grad():
        return model(input_ids=ids, attention_mask=mask, use_cache=False, **rest).logits


def dependence(model, **masks):
    """Entry [i, j]: whether changing token j moves the logits at i. One layer shows exactly what is attended to."""
    ids = torch.arange(1, LENGTH + 1)[None]
    base = forward(model, ids, **masks)[0]
    result = torch.zeros(LENGTH, LENGTH, dtype=torch.bool)
    for j in range(LENGTH):
        other = ids.clone()
        other[0, j] = 30
        result[:, j] = (forward(model, other, **masks)[0] - base).abs().amax(dim=1) > 0
    return result


def expected(name):
    position = torch.arange(LENGTH)
    near = (position[:, None] - position[None, :]).abs() < WINDOW
    return near if name.endswith("window") else torch.ones(LENGTH, LENGTH, dtype=torch.bool)


@pytest.mark.parametrize("attention", ["eager", "sdpa"])
@pytest.mark.parametrize("name", NAMES)
def test_each_position_depends_on_exactly_what_it_may_see(name, attention):
    model = build(name, attention)
    make_bidirectional(model)
    assert is_bidirectional(model)
    assert torch.equal(dependence(model), expected(name))
    visible = (torch.rand(LENGTH, LENGTH, generator=torch.Generator().manual_seed(2)) < 0.4) | torch.ones(
        LENGTH, LENGTH, dtype=torch.bool
    ).tril()
    assert torch.equal(dependence(model, visible=visible[None, None]), expected(name) & visible)
    is_padding = torch.zeros(1, LENGTH, dtype=torch.bool)
    is_padding[0, -3:] = True
    seen = dependence(model, is_padding=is_padding)[: LENGTH - 3]
    assert torch.equal(seen, (expected(name) & ~is_padding)[: LENGTH - 3])


@pytest.mark.parametrize("name", NAMES)
def test_eager_and_sdpa_agree(name):
    ids = torch.randint(0, 40, (2, LENGTH), generator=torch.Generator().manual_seed(3))
    is_padding = torch.zeros(2, LENGTH, dtype=torch.bool)
    is_padding[1, 6:] = True
    outputs = []
    for attention in ("eager", "sdpa"):
        model = build(name, attention, layers=1)
        make_bidirectional(model)
        outputs.append(forward(model, ids, is_padding=is_padding)[~is_padding])
    torch.testing.assert_close(*outputs, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("attention", ["eager", "sdpa"])
@pytest.mark.parametrize("name", NAMES)
def test_a_padded_row_equals_the_row_alone(name, attention):
    model = build(name, attention)
    make_bidirectional(model)
    ids = torch.randint(1, 40, (2, LENGTH), generator=torch.Generator().manual_seed(4))
    is_padding = torch.zeros(2, LENGTH, dtype=torch.bool)
    is_padding[1, 4:] = True
    together = forward(model, ids, is_padding=is_padding)
    assert together.isfinite().all()
    torch.testing.assert_close(together[1, :4], forward(model, ids[1:, :4])[0], rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("attention", ["eager", "sdpa"])
@pytest.mark.parametrize("name", NAMES)
def test_a_row_padded_on_the_left_equals_the_row_alone_at_the_same_positions(name, attention):
    model = build(name, attention, layers=2)
    make_bidirectional(model)
    ids = torch.randint(1, 40, (2, LENGTH), generator=torch.Generator().manual_seed(5))
    is_padding = torch.zeros(2, LENGTH, dtype=torch.bool)
    is_padding[1, :6] = True
    positions = torch.arange(LENGTH).repeat(2, 1)
    positions[1] = (positions[1] - 6).clamp(min=0)
    together = forward(model, ids, is_padding=is_padding, position_ids=positions)
    assert together.isfinite().all()
    torch.testing.assert_close(together[:1], forward(model, ids[:1]), rtol=1e-3, atol=1e-3)
    torch.testing.assert_close(together[1, 6:], forward(model, ids[1:, 6:])[0], rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("attention", ["eager", "sdpa"])
@pytest.mark.parametrize("name", NAMES)
def test_packed_documents_equal_each_document_alone(name, attention):
    model = build(name, attention, layers=2)
    make_bidirectional(model)
    ids = torch.randint(1, 40, (2, LENGTH), generator=torch.Generator().manual_seed(6))
    document = torch.tensor([[1] * 4 + [2] * 5 + [0], [1] * LENGTH])
    positions = torch.tensor([[0, 1, 2, 3, 0, 1, 2, 3, 4, 0], list(range(LENGTH))])
    together = forward(model, ids, document=document, is_padding=document == 0, position_ids=positions)
    for row, part in ((0, slice(0, 4)), (0, slice(4, 9)), (1, slice(0, LENGTH))):
        alone = forward(model, ids[row : row + 1, part])[0]
        torch.testing.assert_close(together[row, part], alone, rtol=1e-3, atol=1e-3)
    other = ids.clone()
    other[0, :4] = 3
    changed = forward(model, other, document=document, is_padding=document == 0, position_ids=positions)
    assert torch.equal(changed[0, 4:9], together[0, 4:9])
    assert not torch.equal(changed[0, :4], together[0, :4])


def test_annealing_and_packing_together():
    model = build("gpt2")
    make_bidirectional(model)
    document = torch.tensor([[1, 1, 1, 1, 2, 2, 2, 2, 2, 2]])
    causal = torch.ones(LENGTH, LENGTH, dtype=torch.bool).tril()
    seen = dependence(model, visible=causal[None, None], document=document)
    assert torch.equal(seen, causal & (document[0][:, None] == document[0][None, :]))


def test_padding_that_sees_nothing_does_not_spread_nan_in_float16():
    """Scores far below zero, added to float16's smallest number, are minus infinity in a row that hides everything."""
    model = build("qwen2_window", "eager", layers=2)
    make_bidirectional(model)
    with torch.no_grad():
        for layer in model.model.layers:
            layer.self_attn.q_proj.bias.fill_(8.0)
            layer.self_attn.k_proj.bias.fill_(-8.0)
            for part in (layer.self_attn.q_proj, layer.self_attn.k_proj):
                part.weight.zero_()
    model.half()
    ids = torch.randint(1, 40, (1, LENGTH), generator=torch.Generator().manual_seed(5))
    is_padding = torch.zeros(1, LENGTH, dtype=torch.bool)
    is_padding[0, :6] = True
    assert forward(model, ids, is_padding=is_padding).isfinite().all()


@pytest.mark.parametrize("kind", ["padding", "annealing", "window"])
def test_masks_are_additive_finite_and_hide_what_they_should(kind):
    model = build("gemma2_window" if kind == "window" else "llama")
    make_bidirectional(model)
    is_padding = torch.tensor([[False, False, False, True, True], [True, True, True, True, False]])
    visible = torch.rand(1, 1, 5, 5, generator=torch.Generator().manual_seed(0)) < 0.4
    visible |= torch.eye(5, dtype=torch.bool)
    masks = {
        "padding": {"is_padding": is_padding, "visible": None},
        "annealing": {"is_padding": None, "visible": visible},
        "window": {"is_padding": is_padding, "visible": visible},
    }[kind]
    mask = full_attention_mask(model, batch=2, length=5, dtype=torch.bfloat16, device=torch.device("cpu"), **masks)
    for layers, part in mask.items() if isinstance(mask, dict) else [("full_attention", mask)]:
        assert part.dtype == torch.bfloat16
        assert set(part.unique().tolist()) == {0.0, torch.finfo(torch.bfloat16).min}
        for row, query, key in torch.cartesian_prod(torch.arange(2), torch.arange(5), torch.arange(5)).tolist():
            if is_padding[row, query] and kind != "annealing":
                continue
            seen = (kind == "annealing" or not is_padding[row, key]) and (
                kind == "padding" or visible[0, 0, query, key]
            )
            seen = seen and (layers == "full_attention" or abs(query - key) < WINDOW)
            assert bool(part.expand(2, 1, 5, 5)[row, 0, query, key] == 0) == bool(seen)


def test_a_mask_of_another_shape_is_an_error():
    model = build("llama")
    options = {"batch": 2, "length": 4, "dtype": torch.float32, "device": torch.device("cpu")}
    with pytest.raises(ValueError, match=r"is_padding .*\(2, 3\).*\(2, 4\)"):
        full_attention_mask(model, is_padding=torch.zeros(2, 3, dtype=torch.bool), visible=None, **options)
    with pytest.raises(ValueError, match=r"visible .*\(4, 4\)"):
        full_attention_mask(model, is_padding=None, visible=torch.ones(4, 4, dtype=torch.bool), **options)


@pytest.mark.parametrize("name", ["gpt2", "llama", "gemma3"])
def test_a_row_of_nothing_but_padding_is_finite(name):
    model = build(name, "eager")
    make_bidirectional(model)
    ids = torch.ones(1, LENGTH, dtype=torch.int64)
    assert forward(model, ids, is_padding=torch.ones(1, LENGTH, dtype=torch.bool)).isfinite().all()


@pytest.mark.parametrize("name", ["gpt2", "llama", "qwen2", "qwen3", "mistral"])
def test_full_attention_passes_no_mask_so_that_fast_kernels_run(name, monkeypatch):
    monkeypatch.setattr(bidirectional, "_READS_CONFIG", True)
    model = build(name)
    make_bidirectional(model)
    mask = full_attention_mask(
        model, batch=2, length=8, is_padding=None, visible=None, dtype=torch.float32, device=torch.device("cpu")
    )
    assert mask is None or set(mask.values()) == {None}


def test_older_transformers_get_an_explicit_mask_of_zeros(monkeypatch):
    monkeypatch.setattr(bidirectional, "_READS_CONFIG", False)
    model = build("gpt2", "eager")
    make_bidirectional(model)
    mask = full_attention_mask(
        model, batch=2, length=8, is_padding=None, visible=None, dtype=torch.float32, device=torch.device("cpu")
    )
    assert torch.equal(mask, torch.zeros(1, 1, 8, 8))
    assert torch.equal(dependence(model), expected("gpt2"))


@pytest.mark.parametrize("attention", ["eager", "sdpa"])
@pytest.mark.parametrize("name", NAMES)
def test_the_probe_tells_causal_from_bidirectional(name, attention):
    model = build(name, attention, layers=3)
    # A mask of "nothing hidden" opens a model by itself: older transformers always get one, and eager attention does
    # where
    # the model takes a dict of masks.
    if bidirectional._READS_CONFIG and (attention == "sdpa" or name.split("_")[0] in ("gpt2", "llama", "mistral")):
        with pytest.raises(NotBidirectionalError, match="causally"):
            probe_bidirectional(model)
    assert not is_bidirectional(model)
    make_bidirectional(model)
    model.train()
    probe_bidirectional(model)
    assert model.training


def test_the_probe_leaves_random_numbers_and_modes_alone():
    model = build("gpt2")
    make_bidirectional(model)
    model.train()
    model.lm_head.eval()
    before = torch.get_rng_state()
    probe_bidirectional(model)
    assert torch.equal(torch.get_rng_state(), before)
    assert model.training and not model.lm_head.training


def test_the_probe_works_in_bfloat16_and_through_a_wrapper():
    model = build("llama", layers=2)
    make_bidirectional(model)
    model.bfloat16()

    class Wrapper(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.module = model

        def forward(self, **inputs):
            return self.module(**inputs)

    probe_bidirectional(Wrapper(), inner=model)
    model.model.layers[0].self_attn.is_causal = model.model.layers[1].self_attn.is_causal = True
    model.config.is_causal = True
    if bidirectional._READS_CONFIG:
        with pytest.raises(NotBidirectionalError, match=r"LlamaForCausalLM .*'sdpa'.*causally"):
            probe_bidirectional(Wrapper(), inner=model)


def test_equal_rows_of_the_embedding_do_not_fool_the_probe():
    model = build("llama", layers=2)
    make_bidirectional(model)
    with torch.no_grad():
        model.model.embed_tokens.weight[:12] = model.model.embed_tokens.weight[0].clone()
    probe_bidirectional(model)


def test_nan_logits_fail_the_probe():
    model = build("llama")
    make_bidirectional(model)
    with torch.no_grad():
        model.model.norm.weight.fill_(float("nan"))
    with pytest.raises(NotBidirectionalError, match=r"NaN .*torch\.float32"):
        probe_bidirectional(model)


def test_a_model_that_takes_no_additive_mask_is_found_before_training():
    """OPT counts its positions in the mask, so that a four-dimensional one breaks its forward."""
    model = OPTForCausalLM(
        OPTConfig(
            vocab_size=40,
            hidden_size=32,
            ffn_dim=32,
            num_hidden_layers=1,
            num_attention_heads=2,
            word_embed_proj_dim=32,
            max_position_embeddings=64,
        )
    )
    make_bidirectional(model)
    with pytest.raises(NotBidirectionalError, match=r"OPTForCausalLM .*flash_attn: sdpa"):
        probe_bidirectional(model)


def test_flash_attention_gets_a_two_dimensional_mask_and_no_annealing():
    model = build("llama")
    make_bidirectional(model)
    model.config._attn_implementation = "flash_attention_2"
    is_padding = torch.tensor([[False, True]])
    options = {"batch": 1, "length": 2, "dtype": torch.float32, "device": torch.device("cpu")}
    assert full_attention_mask(model, is_padding=None, visible=None, **options) is None
    assert full_attention_mask(model, is_padding=is_padding, visible=None, **options).tolist() == [[1, 0]]
    with pytest.raises(ValueError, match=r"anneal_steps.*flash_attn: sdpa.*anneal_steps: 0"):
        full_attention_mask(model, is_padding=None, visible=torch.ones(1, 1, 2, 2, dtype=torch.bool), **options)
    with pytest.raises(ValueError, match="segments"):
        full_attention_mask(model, is_padding=None, visible=None, document=torch.ones(1, 2).long(), **options)


def test_what_cannot_be_made_bidirectional_is_an_error():
    model = build("llama")
    model.config.layer_types = ["chunked_attention"]
    with pytest.raises(NotBidirectionalError, match="chunked_attention"):
        make_bidirectional(model)
    model = build("llama")
    model.config._attn_implementation = "flex_attention"
    with pytest.raises(NotBidirectionalError, match="flash_attn: sdpa"):
        make_bidirectional(model)
    model = build("llama")
    for module in model.modules():
        if hasattr(module, "is_causal"):
            del module.is_causal
    with pytest.raises(NotBidirectionalError, match="is_causal"):
        make_bidirectional(model)


def gpt_neo(kind):
    config = GPTNeoConfig(
        vocab_size=40,
        hidden_size=32,
        num_layers=2,
        num_heads=2,
        max_position_embeddings=64,
        attention_types=[[["global", kind], 1]],
        window_size=3,
    )
    return GPTNeoForCausalLM(config)


def test_a_window_built_into_the_attention_is_refused_and_the_model_left_as_it_was():
    model = gpt_neo("local")
    with pytest.raises(NotBidirectionalError, match=r"GPTNeoForCausalLM .*local window"):
        make_bidirectional(model)
    assert not is_bidirectional(model)
    assert not model.transformer.h[0].attn.attention.bias.all()
    model = gpt_neo("global")
    make_bidirectional(model)
    probe_bidirectional(model)


def test_alibi_is_refused():
    config = {"vocab_size": 40, "hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
    with pytest.raises(NotBidirectionalError, match="ALiBi"):
        make_bidirectional(FalconForCausalLM(FalconConfig(alibi=True, **config)))
    make_bidirectional(FalconForCausalLM(FalconConfig(alibi=False, **config)))


def test_a_recurrent_layer_beside_attention_is_refused():
    """Its attention would pass the probe, while the recurrent layer stays causal."""

    class Recurrent(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.conv1d = torch.nn.Conv1d(8, 8, 4, groups=8, padding=3)

    model = build("llama")
    model.model.layers[0].mixer = Recurrent()
    with pytest.raises(NotBidirectionalError, match="Recurrent"):
        make_bidirectional(model)
    assert not is_bidirectional(model)


def moe(**keys):
    torch.manual_seed(0)
    sizes = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2, "num_attention_heads": 2}
    experts = {"moe_intermediate_size": 8, "num_experts": 4, "num_experts_per_tok": 2, "head_dim": 8}
    return Qwen3MoeForCausalLM(Qwen3MoeConfig(vocab_size=40, num_key_value_heads=2, **sizes, **experts, **keys))


def test_a_config_that_requests_further_outputs():
    """A router's loss needs a mask of another form; upstream writes the key into config.json."""
    model = moe(output_router_logits=True, output_hidden_states=True)
    make_bidirectional(model)
    probe_bidirectional(model)
    ids, visible = torch.arange(6)[None], torch.ones(1, 1, 6, 6, dtype=torch.bool)
    plain = moe()
    make_bidirectional(plain)
    results = []
    for one in (model, plain):
        mask = full_attention_mask(
            one, batch=1, length=6, is_padding=None, visible=visible, dtype=torch.float32, device=ids.device
        )
        results.append(one.eval()(input_ids=ids, attention_mask=mask, use_cache=False))
    assert torch.equal(results[0].logits, results[1].logits)
    assert results[0].router_logits is None and results[0].hidden_states is None


def test_an_unrelated_error_is_not_attributed_to_masks():
    model = moe()
    make_bidirectional(model)
    model.model.layers[0].mlp.gate = torch.nn.Identity()
    with pytest.raises(NotBidirectionalError, match=r"config.json"):
        probe_bidirectional(model)


@pytest.mark.parametrize(
    "name",
    ["flash_attention_2", "flash_attention_3", "kernels-community/vllm-flash-attn3", "kernels-community/flash-attn"],
)
def test_every_kind_of_flash_attention_is_treated_alike(monkeypatch, name):
    model = moe()
    model.config._attn_implementation_internal = name
    make_bidirectional(model)
    about = {"batch": 1, "length": 4, "visible": None, "dtype": torch.float32, "device": torch.device("cpu")}
    padding = torch.tensor([[False, False, False, True]])
    assert full_attention_mask(model, is_padding=None, **about) is None
    assert full_attention_mask(model, is_padding=padding, **about).tolist() == [[1, 1, 1, 0]]
    with pytest.raises(ValueError, match="segments"):
        full_attention_mask(model, is_padding=None, **about, document=torch.zeros(1, 4, dtype=torch.long))
    model.config._attn_implementation_internal = "flex_attention"
    with pytest.raises(NotBidirectionalError, match=r"'flex_attention'.*flash_attn: sdpa"):
        make_bidirectional(model)
