"""Training under flash attention with padding and packing, with kernels that sdpa computes: the step of sdpa."""

import pytest
import torch
from transformers import CONFIG_MAPPING, AutoModelForCausalLM, TrainerCallback

from llamafactory_ddm.data.collators import ResponseCollator
from llamafactory_ddm.modeling.bidirectional import NotBidirectionalError, make_bidirectional
from llamafactory_ddm.modeling.flash_attention import segment_arguments, segments
from support.device_costs import Waits
from support.fake_flash import FakeKernels
from support.tiny import MASK_ID, VOCABULARY

IDS = torch.randint(3, MASK_ID, (60,), generator=torch.Generator().manual_seed(4)).tolist()


def make_model(family, implementation, **settings):
    torch.manual_seed(0)
    config = CONFIG_MAPPING[family](
        vocab_size=VOCABULARY,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=8,
        max_position_embeddings=64,
        pad_token_id=0,
        bos_token_id=1,
        eos_token_id=2,
        **settings,
    )
    config._attn_implementation = "sdpa"
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    make_bidirectional(model)
    # Not by its setter, which looks for the package and a GPU.
    model.config._attn_implementation_internal = implementation
    return model


def row(*lengths, offset=0):
    """Return a row of answers with prompts of two tokens, packed if there are several."""
    ids = IDS[offset : offset + sum(lengths)]
    labels = [token for n in lengths for token in [-100, -100, *[0] * (n - 2)]]
    labels = [token if label == 0 else -100 for token, label in zip(ids, labels, strict=True)]
    return {
        "input_ids": ids,
        "labels": labels,
        "attention_mask": [1] * len(ids),
        "position_ids": [i for n in lengths for i in range(n)],
    }


PACKED = [row(7, 9), row(5, 4, 7, offset=20), row(16, offset=30), row(3, 9, offset=40)]
PADDED = [{k: v for k, v in row(n, offset=n).items() if k != "position_ids"} for n in (7, 16, 5, 12)]
WHOLE = [{k: v for k, v in row(16, offset=n).items() if k != "position_ids"} for n in (0, 5, 9, 20)]


class Gradients(TrainerCallback):
    """Keeps the gradients of the first step."""

    def on_pre_optimizer_step(self, args, state, control, model=None, **kwargs):
        self.first = getattr(self, "first", None) or {n: p.grad.clone() for n, p in model.named_parameters()}


def step(make_trainer, model, rows, **settings):
    """Return the log of one step, its gradients, and the metrics of an evaluation."""
    size = settings.pop("size", len(rows))
    trainer = make_trainer(
        model=model,
        train=rows,
        evaluation=rows,
        max_steps=1,
        per_device_train_batch_size=size,
        per_device_eval_batch_size=size,
        folder=str(id(model)),
        **settings,
    )
    trainer.data_collator = ResponseCollator(pad_id=0, shift=True)
    trainer.finetuning_args.disable_shuffling = True
    kept = Gradients()
    trainer.add_callback(kept)
    before = trainer.evaluate()
    trainer.train()
    return next(log for log in trainer.state.log_history if "loss" in log), kept.first, before


GEMMA3 = {"sliding_window": 4, "query_pre_attn_scalar": 8, "sliding_window_pattern": 2}


@pytest.mark.parametrize(("rows", "n_segments"), [(PACKED, 9), (PADDED, 7), (WHOLE, None)])
@pytest.mark.parametrize(
    ("family", "settings", "version"),
    [
        ("llama", {}, 2),
        ("gemma3_text", GEMMA3, 3),
        pytest.param("llama", {}, 3, marks=pytest.mark.slow),
        pytest.param("qwen3", {}, 2, marks=pytest.mark.slow),
        pytest.param("mistral", {"sliding_window": 4}, 2, marks=pytest.mark.slow),
    ],
)
def test_a_step_is_that_of_sdpa(make_trainer, monkeypatch, family, settings, version, rows, n_segments):
    """Loss, gradients and evaluation agree to 1e-5, and each kernel gets the segments of the batch."""
    kernels = FakeKernels(version)
    kernels.install(monkeypatch)
    expected = step(make_trainer, make_model(family, "sdpa", **settings), rows)
    assert not kernels.calls
    log, gradients, evaluation = step(make_trainer, make_model(family, f"flash_attention_{version}", **settings), rows)
    for name in ("loss", "nll", "grad_norm"):
        assert log[name] == pytest.approx(expected[0][name], rel=1e-5)
    assert evaluation["eval_loss"] == pytest.approx(expected[2]["eval_loss"], rel=1e-5)
    assert gradients.keys() == expected[1].keys()
    for name, value in gradients.items():
        torch.testing.assert_close(value, expected[1][name], rtol=1e-4, atol=1e-5, msg=name)
    counts = {None if call is None else len(call[0]) - 1 for call in kernels.calls[-2:]}
    assert counts == {n_segments}


@pytest.mark.parametrize("rows", [PACKED, WHOLE])
def test_a_single_row_is_a_step_of_sdpa(make_trainer, monkeypatch, rows):
    """transformers would look for documents in its positions."""
    kernels = FakeKernels()
    kernels.install(monkeypatch)
    expected, other = (
        step(make_trainer, make_model("llama", name), rows[:1], size=1) for name in ("sdpa", "flash_attention_2")
    )
    assert other[0]["loss"] == pytest.approx(expected[0]["loss"], rel=1e-5)
    assert all(call is not None for call in kernels.calls[-2:])


def test_documents_never_leak(make_trainer, monkeypatch):
    """If one document changes, the logits of the others in its row and beside it are the same bit for bit."""
    FakeKernels().install(monkeypatch)
    model = make_model("llama", "flash_attention_2").eval()
    trainer = make_trainer(model=model)

    def logits(rows):
        batch = ResponseCollator(pad_id=0, shift=True)(rows)
        clean = trainer.objective.clean(batch)
        everywhere = torch.arange(clean.x_0.numel())
        with torch.no_grad():
            return trainer.bound_logits(model, clean.x_0, everywhere, clean.placement()).view(*clean.x_0.shape, -1)

    changed = [dict(one) for one in PACKED]
    changed[1]["input_ids"] = [*PACKED[1]["input_ids"][:5], 4, 5, 6, 7, *PACKED[1]["input_ids"][9:]]
    before, after = logits(PACKED), logits(changed)
    moved = (before != after).any(dim=-1)
    assert moved[1, 5:9].all() and moved.sum() == 4


def test_segments():
    padding = torch.tensor([[0, 0, 0, 1], [1, 1, 0, 0], [0, 0, 0, 0]], dtype=torch.bool)
    assert segments((3, 4), None, None) == {}
    found = segments((3, 4), padding, None)
    assert found["cu_seq_lens"].tolist() == [0, 3, 4, 6, 8, 12] and found["max_length"] == 4
    documents = torch.tensor([[1, 1, 2, 0], [0, 0, 1, 2], [1, 2, 2, 2]])
    found = segments((3, 4), padding, documents)
    assert found["cu_seq_lens"].tolist() == [0, 2, 3, 4, 6, 7, 8, 9, 12] and found["max_length"] == 3
    assert segments((1, 4), None, None)["cu_seq_lens"].tolist() == [0, 4]
    assert set(segment_arguments(found)) == {"cu_seq_lens_q", "cu_seq_lens_k", "max_length_q", "max_length_k"}
    assert segment_arguments({}) == {}


@pytest.mark.parametrize("rows", [PACKED, PADDED, WHOLE, PACKED[:1], WHOLE[:1]])
def test_a_forward_under_flash_attention_does_not_wait(make_trainer, monkeypatch, rows):
    """Where the segments begin is computed on the CPU, once for all layers."""
    kernels, waits = FakeKernels(), Waits(monkeypatch)
    kernels.plain, kernels.varlen = waits.on_host(kernels.plain), waits.on_host(kernels.varlen)
    kernels.install(monkeypatch)
    model = make_model("llama", "flash_attention_2")
    trainer = make_trainer(model=model, train=rows, max_steps=2, per_device_train_batch_size=len(rows))
    trainer.data_collator = ResponseCollator(pad_id=0, shift=True)
    trainer.train()  # checks the model
    forward, places = model.forward, []

    def watched(*args, **kwargs):
        waits.take()
        with waits:
            result = forward(*args, **kwargs)
        places.append(waits.take())
        return result

    model.forward = watched
    n_calls = len(kernels.calls)
    trainer.train()
    assert places == [[], []] and len(kernels.calls) == n_calls + 4  # of two layers in two steps


def test_a_model_that_ignores_the_segments_is_refused(make_trainer, monkeypatch):
    FakeKernels().install(monkeypatch)
    model = make_model("llama", "flash_attention_2")
    inner = model.model.forward
    names = ("cu_seq_lens_q", "cu_seq_lens_k", "max_length_q", "max_length_k")
    model.model.forward = lambda *a, **k: inner(*a, **{key: v for key, v in k.items() if key not in names})
    monkeypatch.setattr("transformers.modeling_flash_attention_utils._is_packed_sequence", lambda *a, **k: False)
    trainer = make_trainer(model=model, train=WHOLE)
    trainer.data_collator = ResponseCollator(pad_id=0, shift=True)
    with pytest.raises(NotBidirectionalError, match=r"cu_seq_lens_q.*see each other.*flash_attn: sdpa"):
        trainer.train()


@pytest.mark.parametrize(
    ("settings", "match"),
    [
        ({"anneal_steps": 10}, r"anneal_steps.*flash_attn: sdpa.*anneal_steps: 0"),
        ({"objective": {"block_length": 4}}, r"attention: block.*flash_attn: sdpa"),
    ],
)
def test_what_needs_a_mask_is_refused(make_trainer, monkeypatch, settings, match):
    FakeKernels().install(monkeypatch)
    with pytest.raises((ValueError, NotBidirectionalError), match=match):
        make_trainer(model=make_model("llama", "flash_attention_2"), **settings).train()


@pytest.mark.parametrize("value", [0.1, 0.0])
def test_dropout_that_version_3_lacks_is_said(monkeypatch, value):
    from llamafactory_ddm.integration.model import loader

    said = []
    monkeypatch.setattr(loader.logger, "warning_rank0", said.append)
    config = CONFIG_MAPPING["gpt2"](vocab_size=8, n_embd=8, n_layer=1, n_head=1, attn_pdrop=value)
    loader._warn_of_dropout(AutoModelForCausalLM.from_config(config))
    assert ["attn_pdrop: 0.1" in line for line in said] == ([True] if value else [])
