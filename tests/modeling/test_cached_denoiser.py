"""Cached decoding: which columns are computed, what the others hold, and when the texts are those of no cache."""

import dataclasses
import math

import pytest
import torch
from torch.nn import functional
from transformers import (
    Gemma2Config,
    Gemma2ForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
    MistralConfig,
    MistralForCausalLM,
    Phi3Config,
    Phi3ForCausalLM,
)

from llamafactory_ddm.modeling.bidirectional import make_bidirectional
from llamafactory_ddm.modeling.cached_denoiser import CachedDenoiser, check_cacheable, fresh_columns
from llamafactory_ddm.modeling.denoiser import ModelDenoiser
from llamafactory_ddm.sampling import STRATEGIES, Context, Edits, LogitsConfig, get_strategy, sample
from support.tiny import LENGTH, MASK_ID, VOCABULARY, Rows, tiny_model

NAMES = sorted(STRATEGIES)
SIZES = {
    "vocab_size": VOCABULARY,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "max_position_embeddings": 64,
}
KINDS = {
    "llama": (LlamaForCausalLM, LlamaConfig, {}),
    "mistral": (MistralForCausalLM, MistralConfig, {"sliding_window": 4}),
    "gemma2": (Gemma2ForCausalLM, Gemma2Config, {"sliding_window": 4, "attn_implementation": "eager"}),
}


def make(name="gpt2"):
    """A model whose logits depend on their context, unlike those of a fresh one."""
    if name == "gpt2":
        model = tiny_model().eval()
    else:
        kind, config, more = KINDS[name]
        torch.manual_seed(2)
        model = kind(config(**SIZES, **more)).eval()
        make_bidirectional(model)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() > 1:
                parameter.mul_(5)
    return model


def canvas(batch=4, n_padding=(0, 3, 0, 6)):
    """Ids, where they are editable, and padding: prompts, and in the last two rows fixed text behind a gap."""
    x = Rows(batch, seed=4).ids
    column = torch.arange(LENGTH)
    is_padding = column < torch.tensor(n_padding[:batch])[:, None]
    start = torch.tensor([4, 5, 3, 8])[:batch, None]
    end = torch.tensor([LENGTH, LENGTH, LENGTH - 2, LENGTH - 3])[:batch, None]
    editable = (column >= start) & (column < end)
    editable[2:, 10] = False
    return x, editable, is_padding


def run(denoiser, x, editable, *, name="low_confidence", sample_index=None, logits=None, **rest):
    rest = {"steps": 12, "block_length": 4, "seed": 3, "strategy": get_strategy(name), **rest}
    return sample(
        denoiser,
        x,
        editable=editable,
        mask_id=MASK_ID,
        logits=logits or LogitsConfig(0.7),
        sample_index=torch.arange(len(x)) if sample_index is None else sample_index,
        **rest,
    )


def same(one, two):
    """Whether two outputs are equal but for what was computed."""
    names = [field.name for field in dataclasses.fields(one) if field.name != "sample_computed"]
    return all(
        torch.equal(a, b) if isinstance(a, torch.Tensor) else a == b
        for a, b in ((getattr(one, name), getattr(two, name)) for name in names)
    )


def cached(model, kind, refresh=None, *, shift=True, is_padding=None, **options):
    return CachedDenoiser(model, kind=kind, refresh=refresh, shift=shift, is_padding=is_padding, **options)


# Which columns


def test_fresh_columns_by_hand():
    scope = torch.tensor([[0, 0, 0, 1, 1, 0, 0]]).bool()
    earlier = torch.tensor([[0, 1, 1, 0, 0, 0, 0]]).bool()
    z = torch.tensor([[5, 6, 7, 8, 9, 9, 9]])
    asked = torch.tensor([[0, 0, 1, 1, 0, 0, 0]]).bool()

    def fresh(kind="dual", refresh=None, *, known=z, passes=1, old=scope, asked=asked):
        found = fresh_columns(
            kind,
            refresh,
            computed_from=known,
            passes=torch.tensor([passes]),
            old_scope=old,
            z=z,
            scope=scope,
            asked=asked,
        )
        return found[0].nonzero().flatten().tolist()

    assert fresh() == [2, 3, 4]
    assert fresh("prefix") == [2, 3, 4, 5, 6]
    assert fresh(asked=scope) == [3, 4]
    for kind in ("dual", "prefix"):
        assert fresh(kind, old=earlier) == list(range(7))  # another block
        assert fresh(kind, known=z * 0 - 1) == list(range(7))  # never computed
        assert fresh(kind, 1) == list(range(7))
        assert fresh(kind, 3, passes=3) == list(range(7)) and fresh(kind, 3, passes=2) == fresh(kind)
    assert fresh(known=z - torch.tensor([[1, 0, 0, 0, 0, 0, 1]])) == [0, 2, 3, 4, 6]  # a changed token


def test_each_row_decides_for_itself():
    scope = torch.eye(3, 6).bool()
    z = torch.arange(18).view(3, 6)
    found = fresh_columns(
        "dual",
        2,
        computed_from=z,
        passes=torch.tensor([1, 2, 1]),
        old_scope=torch.cat([scope[:2], scope[:1]]),
        z=z,
        scope=scope,
        asked=torch.zeros(3, 6).bool(),
    )
    assert found.sum(dim=1).tolist() == [1, 6, 6]


class AsksAll:
    """Asks for every token of the block, and commits its first masked one; in odd rows up to `odd` of them."""

    name = "asks_all"
    measures = frozenset()

    def __init__(self, odd=1):
        self.odd = odd

    def candidates(self, view):
        return view.scope

    def commit(self, view, candidate, score):
        number = 1 + (torch.arange(len(candidate)) % 2 * (self.odd - 1))
        return view.is_masked & (view.is_masked.cumsum(dim=1) <= number[:, None])


def sizes_seen(model):
    """The list of the forward passes of a model, (rows, columns) each."""
    seen = []
    model.register_forward_pre_hook(lambda m, args, kw: seen.append(tuple(kw["input_ids"].shape)), with_kwargs=True)
    return seen


@pytest.mark.parametrize("shift", [True, False])
def test_columns_computed_in_a_block(shift):
    """S steps in each of 3 blocks of b columns: S L without a cache, L + (S - 1)(b + shift) with dual."""
    model, block, steps = make(), 4, 4
    x, editable, _ = canvas(1)
    plain = run(ModelDenoiser(model, shift=shift), x, editable, strategy=AsksAll())
    assert (plain.nfe, plain.computed) == (3 * steps, 3 * steps * LENGTH)
    seen = sizes_seen(model)
    for kind, refresh, expected in (
        ("dual", None, 3 * (LENGTH + (steps - 1) * (block + shift))),
        ("dual", 2, 3 * (2 * LENGTH + 2 * (block + shift))),
        ("dual", 3, 3 * (2 * LENGTH + 2 * (block + shift))),
        ("prefix", None, sum(LENGTH + (steps - 1) * (LENGTH - first + shift) for first in (4, 8, 12))),
    ):
        seen.clear()
        output = run(cached(model, kind, refresh, shift=shift), x, editable, strategy=AsksAll())
        assert (output.nfe, output.computed) == (3 * steps, expected)
        assert sum(columns for _, columns in seen) == expected


def test_rows_at_other_blocks_and_rows_that_refresh_are_passes_of_one_step():
    model = make()
    x, editable, is_padding = canvas()
    seen = sizes_seen(model)
    output = run(cached(model, "dual", 3, is_padding=is_padding), x, editable, strategy=AsksAll(odd=2))
    assert output.computed == sum(rows * columns for rows, columns in seen)
    assert len(seen) > output.nfe
    assert all(columns <= 6 or columns == LENGTH for _, columns in seen)


# Exact


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("shift", [True, False])
def test_a_refresh_in_every_pass_is_no_cache_bit_for_bit(name, shift):
    model = make("gpt2" if shift else "llama")
    x, editable, is_padding = canvas()
    plain = run(ModelDenoiser(model, shift=shift, is_padding=is_padding), x, editable, name=name)
    for kind in ("prefix", "dual"):
        output = run(cached(model, kind, 1, shift=shift, is_padding=is_padding), x, editable, name=name)
        assert same(output, plain) and output.computed == plain.computed


@pytest.mark.parametrize("family", KINDS)
def test_a_refresh_in_every_pass_with_windows_edits_and_stopping(family):
    model = make(family)
    x, editable, is_padding = canvas()
    rest = {"edits": Edits(0.3, None, 2), "eos_ids": (3, 5), "name": "confidence_threshold"}
    plain = run(ModelDenoiser(model, shift=True, is_padding=is_padding), x, editable, **rest)
    assert plain.edits.sum() > 0
    assert same(run(cached(model, "dual", 1, is_padding=is_padding), x, editable, **rest), plain)


def test_guidance_has_a_cache_for_each_of_its_passes():
    model = make()
    x, editable, is_padding = canvas()
    prompt = ~editable & ~is_padding
    rest = {"logits": LogitsConfig(0.7, guidance_scale=2.0), "context": Context(prompt=prompt)}
    plain = run(ModelDenoiser(model, shift=True, is_padding=is_padding), x, editable, **rest)
    assert same(run(cached(model, "prefix", 1, is_padding=is_padding), x, editable, **rest), plain)
    dual = run(cached(model, "dual", is_padding=is_padding), x, editable, **rest)
    assert same(run(Reference(model, "dual", None, is_padding), x, editable, **rest), dual)
    seen = sizes_seen(model)
    assert same(run(cached(model, "dual", is_padding=is_padding), x, editable, **rest), dual)
    assert dual.computed == sum(rows * columns for rows, columns in seen) and len(seen) >= dual.nfe


def test_models_that_project_their_logits_themselves_and_chunks():
    model = make()
    model.register_forward_hook(lambda module, args, output: setattr(output, "logits", output.logits * 0.5))
    x, editable, is_padding = canvas()
    plain = run(ModelDenoiser(model, shift=True, is_padding=is_padding), x, editable)
    options = {"is_padding": is_padding, "keep_hidden": True}
    assert same(run(cached(model, "dual", 1, **options), x, editable), plain)
    own = run(cached(model, "dual", **options), x, editable, name="confidence_threshold")
    model._forward_hooks.clear()
    model.transformer.ln_f.weight.data *= 0.5
    model.transformer.ln_f.bias.data *= 0.5
    parts = cached(model, "dual", rows_at_once=3, **options)
    assert same(run(parts, x, editable, name="confidence_threshold"), own)


# What is reused


class Reference:
    """GPT-2 in plain torch, one row and one column at a time, with keys and values as of their last computation."""

    def __init__(self, model, kind, refresh, is_padding):
        self.body, self.head, self.kind, self.refresh = model.transformer, model.lm_head, kind, refresh
        self.is_padding, self.states, self.computed = is_padding, {}, None

    def questions(self, z, asked, scope, branch=0):
        return z[:, :0]

    def step(self, scope, branch=0, answers=None):
        return lambda z, flat_index: self.logits(scope, branch, z, flat_index)

    def take_computed(self):
        return torch.zeros(len(self.is_padding), dtype=torch.int64)

    def logits(self, scope, branch, z, flat_index):
        length = z.shape[1]
        wanted = {}
        for index in (flat_index - 1).tolist():
            wanted.setdefault(index // length, []).append(index % length)
        return torch.cat([self.row(branch, row, z[row], scope[row], columns) for row, columns in wanted.items()])

    def row(self, branch, row, z, scope, asked):
        block = scope.nonzero().flatten().tolist()
        state = self.states.get((branch, row))
        if state is None or state["block"] != block or (self.refresh and state["age"] == self.refresh):
            fresh = list(range(len(z)))
            state = self.states[branch, row] = {"block": block, "age": 0, "kv": state["kv"] if state else {}}
        else:
            fresh = sorted({*(block if self.kind == "dual" else range(block[0], len(z))), *asked})
        state["age"] += 1
        with torch.no_grad():
            hidden = self.forward(z, fresh, state["kv"], self.is_padding[row])
        return torch.stack([self.head(hidden[column]) for column in asked])

    def forward(self, z, fresh, kv, is_padding):
        n_padding, body = int(is_padding.sum()), self.body
        h = {c: body.wte.weight[z[c]] + body.wpe.weight[max(c - n_padding, 0)] for c in fresh}
        seen = range(n_padding, len(z))
        for number, layer in enumerate(body.h):
            heads = layer.attn.num_heads
            queries = {}
            for c in fresh:
                q, kv[number, c, "k"], kv[number, c, "v"] = (
                    part.view(heads, -1) for part in layer.attn.c_attn(layer.ln_1(h[c])).chunk(3)
                )
                queries[c] = q
            keys = torch.stack([kv[number, c, "k"] for c in seen], dim=1)
            values = torch.stack([kv[number, c, "v"] for c in seen], dim=1)
            for c in fresh:
                weight = ((keys @ queries[c][:, :, None]) / math.sqrt(keys.shape[-1])).softmax(dim=1)
                h[c] = h[c] + layer.attn.c_proj((weight * values).sum(dim=1).flatten())
                h[c] = h[c] + layer.mlp.c_proj(functional.gelu(layer.mlp.c_fc(layer.ln_2(h[c])), approximate="tanh"))
        return {c: body.ln_f(h[c]) for c in fresh}


@pytest.mark.parametrize(
    ("kind", "refresh", "name"),
    [
        ("dual", None, "low_confidence"),
        ("dual", 2, "confidence_threshold"),
        ("prefix", None, "remdm"),
        ("prefix", 3, "topk"),
    ],
)
def test_reused_states_are_those_of_the_last_computation(kind, refresh, name):
    model = make()
    x, editable, is_padding = canvas()
    rest = {"name": name, "edits": Edits(0.0, 0.3, 1)}
    output = run(cached(model, kind, refresh, is_padding=is_padding), x, editable, **rest)
    assert same(run(Reference(model, kind, refresh, is_padding), x, editable, **rest), output)
    assert not same(run(ModelDenoiser(model, shift=True, is_padding=is_padding), x, editable, **rest), output)


@pytest.mark.parametrize("family", ["gpt2", *KINDS])
@pytest.mark.parametrize(("kind", "refresh"), [("dual", None), ("dual", 3), ("prefix", None)])
def test_rows_do_not_depend_on_their_batch(family, kind, refresh):
    model = make(family)
    x, editable, is_padding = canvas()
    rest = {"name": "confidence_threshold", "eos_ids": (3, 5)}
    output = run(cached(model, kind, refresh, is_padding=is_padding), x, editable, **rest)
    for row, n in enumerate(is_padding.sum(dim=1).tolist()):
        index = torch.tensor([row])
        alone = run(
            cached(model, kind, refresh), x[row : row + 1, n:], editable[row : row + 1, n:], sample_index=index, **rest
        )
        assert torch.equal(alone.sequences[0], output.sequences[row, n:])
        assert torch.equal(alone.committed[0] >= 0, output.committed[row, n:] >= 0)
        assert alone.nfe == output.sample_nfe[row]
        assert alone.computed <= output.sample_computed[row]


@pytest.mark.parametrize("kind", ["prefix", "dual"])
def test_padding_does_not_delay_a_refresh(kind):
    """A pass over all tokens of a row counts as one over all columns, with padding in front of them or without."""

    def computed(n):
        """Columns of each pass over a row of 7 tokens behind `n` of padding: the first token, and a block."""
        column = torch.arange(n + 7)[None]
        denoiser = cached(make(), kind, 3, is_padding=column < n if n else None)
        z, counts = torch.full((1, n + 7), MASK_ID), []
        for asked in ([1, 4], [1, 4], [4], [4], [4], [4]):  # the prediction of token 1 is read at token 0
            list(denoiser.step(column > n)(z, torch.tensor(asked) + n))
            counts.append(int(denoiser.take_computed()))
        return counts

    assert computed(0) == [7, 7, 6, 6, 7, 6]
    assert computed(5) == [12, 7, 6, 6, 12, 6]


# Errors


def test_models_that_take_a_cache_and_models_that_do_not(monkeypatch):
    for name in ("gpt2", *KINDS):
        check_cacheable(make(name), "dual")
    model = make("llama")
    forward = model.model.forward
    monkeypatch.setattr(model.model, "forward", lambda *args, past_key_values=None, **kw: forward(*args, **kw))
    with pytest.raises(ValueError, match=r"kv_cache: dual .*LlamaForCausalLM.*kv_cache: none"):
        check_cacheable(model, "dual")
    model = make("llama")
    monkeypatch.setattr(model.config, "_attn_implementation", "flash_attention_2")
    with pytest.raises(ValueError, match=r"kv_cache: prefix .*flash_attn: sdpa"):
        check_cacheable(model, "prefix")


def test_position_embeddings_that_depend_on_the_length():
    factors = {"short_factor": [1.0] * 4, "long_factor": [2.0] * 4}
    rope = {"type": "longrope", **factors}
    config = Phi3Config(
        **SIZES, pad_token_id=0, original_max_position_embeddings=16, rope_scaling=rope, tie_word_embeddings=False
    )
    model = Phi3ForCausalLM(config).eval()
    make_bidirectional(model)
    check_cacheable(model, "dual", length=16)
    with pytest.raises(ValueError, match=r"kv_cache: dual .*16 tokens.*17"):
        check_cacheable(model, "dual", length=17)
