"""The trainer with attention: block: its gradient is that of the blocks one by one, however a step is split."""

import pytest
import torch

from llamafactory_ddm.data.collators import ResponseCollator
from llamafactory_ddm.modeling import block_attention, tiled_attention
from llamafactory_ddm.modeling.bidirectional import NotBidirectionalError
from llamafactory_ddm.modeling.diffusion_config import DiffusionConfig
from llamafactory_ddm.modeling.model_info import implementation
from support.blocks import loss_by_blocks, noised_ids
from support.tiny import MASK_ID, Rows, tiny_model

LENGTHS = [16, 9, 3, 16, 12, 16, 5, 16]
BLOCKS = {"block_length": 4}


def first_step(trainer):
    """Train, and return the gradients of the first step."""
    gradients = {}

    def keep(*args, **kwargs):
        if not gradients:
            gradients.update({n: p.grad.clone() for n, p in trainer.model.named_parameters()})

    trainer.finetuning_args.disable_shuffling = True
    trainer.create_optimizer_and_scheduler(num_training_steps=2)
    trainer.optimizer.register_step_pre_hook(keep)
    trainer.train()
    return gradients


@pytest.mark.parametrize("shift", [True, False])
def test_the_gradient_is_that_of_the_blocks_one_by_one(make_trainer, shift):
    data = Rows(8, lengths=LENGTHS)
    trainer = make_trainer(train=data, max_steps=1, objective={"shift": shift, **BLOCKS})
    gradient = first_step(trainer)
    clean = trainer.objective.clean({"input_ids": data.ids, "attention_mask": data.keep})
    batch = trainer.objective.noise(clean, sample_index=torch.arange(8), group_size=8)
    z = noised_ids(trainer.objective, clean, torch.arange(8))
    model, total = tiny_model(), torch.zeros(())
    rule = {"block_length": 4, "shift": shift, "mask_id": MASK_ID}
    for row, n in enumerate(LENGTHS):
        total = total + loss_by_blocks(model, clean.x_0[row, :n], z[row, :n], clean.maskable[row, :n], **rule)
    (total / int(batch.denominator)).backward()
    expected = total.item() / int(batch.denominator)
    assert trainer.state.log_history[0]["loss"] == pytest.approx(expected, rel=1e-4)
    for name, parameter in model.named_parameters():
        torch.testing.assert_close(gradient[name], parameter.grad, rtol=1e-3, atol=1e-6, msg=name)


@pytest.mark.parametrize("settings", [{"objective": BLOCKS}, {}])
def test_two_streams_are_trained_and_evaluated_over_tiles(make_trainer, monkeypatch, settings):
    """Results are the dense ones. Full attention over rows without padding has no mask, so no tiles."""
    results = []
    for size in (2, 1000):
        monkeypatch.setattr(tiled_attention, "_TILE", size)
        monkeypatch.setattr(tiled_attention, "_LARGEST_SHARE", 0.99)
        sizes = set()
        dense = tiled_attention.ALL_ATTENTION_FUNCTIONS["sdpa"]

        def counted(layer, query, *rest, dense=dense, sizes=sizes, **keys):
            sizes.add(query.shape[2])
            return dense(layer, query, *rest, **keys)

        with monkeypatch.context() as patch:
            patch.setitem(tiled_attention.ALL_ATTENTION_FUNCTIONS, "sdpa", counted)
            rows = {"train": Rows(8, lengths=[8] * 8), "evaluation": Rows(4, lengths=[8] * 4, seed=1)}
            trainer = make_trainer(**rows, max_steps=1, folder=str(size), **settings)
            gradients = first_step(trainer)
            of_training = set(sizes)
            sizes.clear()
            metrics = trainer.evaluate()
        assert implementation(trainer.model) == "sdpa"
        results.append((gradients, metrics["eval_loss"]))
        assert (2 in of_training, 2 in sizes) == ((size == 2,) * 2 if settings else (False, False))
    for name, gradient in results[0][0].items():
        torch.testing.assert_close(gradient, results[1][0][name], rtol=1e-4, atol=1e-6, msg=name)
    assert results[0][1] == pytest.approx(results[1][1], rel=1e-5)


@pytest.mark.parametrize("objective", [{"norm": "sequence"}, {"block_noise": "times", "truncate_ratio": 0.5}])
def test_accumulation_is_exact(make_trainer, objective):
    data = Rows(16, lengths=[*LENGTHS, 4, 4, 4, 4, 16, 16, 16, 2])
    objective = {**BLOCKS, **objective}
    whole = make_trainer(train=data, objective=objective)
    split = make_trainer(
        train=data, objective=objective, per_device_train_batch_size=2, gradient_accumulation_steps=4, folder="split"
    )
    first, second = first_step(whole), first_step(split)
    for name in first:
        torch.testing.assert_close(first[name], second[name], rtol=1e-4, atol=1e-7, msg=name)
    for one, two in zip(whole.state.log_history[:2], split.state.log_history[:2], strict=True):
        for key in ("loss", "nll", "masked_fraction", "grad_norm"):
            assert one[key] == pytest.approx(two[key], rel=1e-4), key


def test_evaluation_is_the_same_for_any_batch(make_trainer):
    evaluation = Rows(7, lengths=[16, 9, 3, 16, 1, 12, 16], seed=1)
    one, three = (
        make_trainer(evaluation=evaluation, objective=BLOCKS, per_device_eval_batch_size=size, folder=str(size))
        for size in (1, 3)
    )
    metrics = one.evaluate()
    for name, value in three.evaluate().items():
        if "runtime" not in name and "per_second" not in name:
            assert value == pytest.approx(metrics[name], rel=1e-4), name
    assert {"eval_loss", "eval_nll", "eval_nll_first", "eval_nll_q1", "eval_nll_q4"} <= metrics.keys()


def test_checkpoints_say_block_and_no_annealing_applies(make_trainer, tmp_path):
    trainer = make_trainer(objective=BLOCKS, anneal_steps=100, max_steps=1)
    trainer.train()
    trainer.save_model()
    stored = DiffusionConfig.load(tmp_path / "out")
    assert (stored.attention, stored.train_block_length, stored.attention_ratio) == ("block", 4, 1.0)
    assert trainer.state.log_history[0]["attention_ratio"] == 1.0


def test_rows_without_padding_share_a_mask_from_step_to_step(make_trainer, monkeypatch):
    built = []
    inner = block_attention.two_stream_visibility
    monkeypatch.setattr(block_attention, "two_stream_visibility", lambda *a: (built.append(a), inner(*a))[1])
    make_trainer(objective=BLOCKS, max_steps=4).train()
    assert len(built) == 2  # the probe's, and the steps'


def test_a_causal_model_is_refused(make_trainer):
    model = tiny_model()
    inner = model.forward
    model.forward = lambda attention_mask, **rest: inner(
        attention_mask=torch.zeros(1, 1, *[rest["input_ids"].shape[1]] * 2).fill_(-1e9).triu(1), **rest
    )
    with pytest.raises(NotBidirectionalError, match="attention: block"):
        make_trainer(model=model, objective=BLOCKS).train()


def test_responses_are_padded_to_the_end_of_their_last_block():
    rows = [{"input_ids": list(range(1, n + 1)), "labels": [-100] * 2 + list(range(3, n + 1))} for n in (5, 8, 11)]
    batch = ResponseCollator(pad_id=0, shift=True, target_length=16, block_length=4)(rows)
    assert batch["input_ids"].shape == (3, 12)
    assert batch["attention_mask"].sum(dim=1).tolist() == [8, 8, 12]
    assert batch["maskable"].sum(dim=1).tolist() == [6, 6, 10]
    assert not bool((batch["maskable"] & (batch["attention_mask"] == 0)).any())
    # The last block may be cut short by cutoff_len.
    assert ResponseCollator(pad_id=0, shift=True, target_length=11, block_length=4)(rows)["input_ids"].shape == (3, 11)
