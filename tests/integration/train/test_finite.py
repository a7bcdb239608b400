"""A NaN or infinite loss: when a run stops, what it logs and what it saves."""

import logging
import re
from pathlib import Path

import pytest
import torch

from llamafactory_ddm.integration.train import finite
from llamafactory_ddm.integration.train import trainer as trainer_module
from llamafactory_ddm.integration.train.finite import FiniteLoss, LossNotFiniteError, weights_are_finite
from support.tiny import Rows, tiny_model

CPU = torch.device("cpu")


def breaks(trainer, *steps, value=torch.nan, through_weights=True):
    """Set the loss of the last micro-batch of these steps, counted from 1, to `value`."""
    inner = trainer.compute_loss
    seen = []

    def compute_loss(model, inputs, **kwargs):
        loss = inner(model, inputs, **kwargs)
        step = trainer.state.global_step + 1
        seen.append(step)
        last = seen.count(step) == trainer.args.gradient_accumulation_steps
        if step not in steps or not last:
            return loss
        broken = loss * value if through_weights else loss + value
        trainer._finite.add(broken)
        return broken

    trainer.compute_loss = compute_loss
    return seen


def checkpoints(trainer):
    return sorted(p.name for p in Path(trainer.args.output_dir).glob("checkpoint-*"))


@pytest.fixture
def logged():
    """The lines that the trainer logs."""
    records = []
    handler = logging.Handler()
    handler.emit = lambda record: records.append(record.getMessage())
    names = [f"llamafactory_ddm.integration.train.{name}" for name in ("finite", "trainer")]
    for name in names:
        logging.getLogger(name).addHandler(handler)
    yield records
    for name in names:
        logging.getLogger(name).removeHandler(handler)


@pytest.mark.parametrize(("value", "accumulation"), [(torch.nan, 1), (torch.nan, 2), (torch.inf, 1)])
def test_the_second_step_in_a_row_stops_the_run_and_neither_is_saved(make_trainer, logged, value, accumulation):
    """The first step already breaks the weights."""
    trainer = make_trainer(
        max_steps=9,
        save_strategy="steps",
        save_steps=1,
        logging_steps=5,
        per_device_train_batch_size=4,
        gradient_accumulation_steps=accumulation,
    )
    seen = breaks(trainer, *range(3, 10), value=value)
    with pytest.raises(LossNotFiniteError, match=r"steps 3 to 4.*stop_after_nan_steps: 2"):
        trainer.train()
    assert max(seen) == 4
    assert checkpoints(trainer) == ["checkpoint-1", "checkpoint-2"]
    assert sum("loss of step 3 " in line for line in logged) == 1
    assert any(line.startswith("Step 3 ") for line in logged)


def test_single_steps_are_logged_and_the_run_continues(make_trainer, logged):
    trainer = make_trainer(max_steps=6, save_strategy="steps", save_steps=1)
    breaks(trainer, 2, 4, through_weights=False)
    trainer.train()
    assert trainer.state.global_step == 6
    assert [re.search(r"step (\d)", line)[1] for line in logged if line.startswith("The loss")] == ["2", "4"]
    assert checkpoints(trainer) == [f"checkpoint-{n}" for n in (1, 3, 5, 6)]


@pytest.mark.parametrize(("limit", "stops"), [(1, 2), (3, 4), (0, None)])
def test_a_key_sets_the_number_of_steps(make_trainer, limit, stops):
    trainer = make_trainer(max_steps=6)
    trainer.stop_after_nan_steps = limit
    seen = breaks(trainer, 2, 3, 4, 5, through_weights=False)
    if stops is None:
        trainer.train()
        assert max(seen) == 6
    else:
        with pytest.raises(LossNotFiniteError, match=f"step.* {stops},"):
            trainer.train()
        assert max(seen) == stops


def test_a_broken_last_step_is_an_error(make_trainer):
    trainer = make_trainer(max_steps=3, save_strategy="steps", save_steps=1)
    breaks(trainer, 3)
    with pytest.raises(LossNotFiniteError, match=r"last step, 3,"):
        trainer.train()
    assert checkpoints(trainer) == ["checkpoint-1", "checkpoint-2"]


def test_weights_that_break_in_a_step_with_a_finite_loss_are_not_saved(make_trainer):
    trainer = make_trainer(max_steps=9, save_strategy="steps", save_steps=1)
    inner = trainer._clip_grad_norm

    def spoil(model):
        if trainer.state.global_step == 2:
            next(model.parameters()).grad[0, 0] = torch.nan
        return inner(model)

    trainer._clip_grad_norm = spoil
    with pytest.raises(LossNotFiniteError, match=r"in steps 4 to 5,"):
        trainer.train()
    assert checkpoints(trainer) == ["checkpoint-1", "checkpoint-2"]


def test_the_best_weights_are_saved_even_if_the_last_step_breaks(make_trainer):
    trainer = make_trainer(
        max_steps=3,
        evaluation=Rows(4, seed=1),
        eval_strategy="steps",
        eval_steps=1,
        save_strategy="steps",
        save_steps=1,
        load_best_model_at_end=True,
        metric_for_best_model="eval_loss",
    )
    breaks(trainer, 3)
    trainer.train()
    assert all(parameter.isfinite().all() for parameter in trainer.model.parameters())


def test_a_flag_of_another_process_counts():
    """Of two processes one has a NaN loss in each step."""
    watches = [FiniteLoss(2, CPU), FiniteLoss(2, CPU)]
    for step in (1, 2):
        watches[0].add(torch.tensor(1.0))
        watches[1].add(torch.tensor(torch.nan))
        total = watches[0].take() + watches[1].take()
        for watch in watches:
            if step == 1:
                watch.count(total, step)
            else:
                with pytest.raises(LossNotFiniteError, match="in steps 1 to 2"):
                    watch.count(total, step)
    assert [int(watch.take()) for watch in watches] == [0, 0]


def test_a_step_is_counted_once():
    watch = FiniteLoss(2, CPU)
    watch.count(torch.tensor(1), 7)
    watch.count(torch.tensor(0), 7)
    assert watch.streak == 1
    watch.count(torch.tensor(0), 8)
    assert watch.streak == 0


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("value", [torch.nan, torch.inf, -torch.inf])
def test_weights_are_checked(dtype, value):
    model = tiny_model().to(dtype)
    assert weights_are_finite(model, lambda n: n, CPU)
    assert not weights_are_finite(model, lambda n: n + 1, CPU)  # another process' share
    with torch.no_grad():
        model.transformer.h[1].mlp.c_fc.weight[3, 5] = value
    assert not weights_are_finite(model, lambda n: n, CPU)
    model.requires_grad_(False)  # frozen weights are not checked
    assert weights_are_finite(model, lambda n: n, CPU)


class Event:
    """A stand-in for `torch.cuda.Event`."""

    n_waits = 0

    def record(self):
        pass

    def synchronize(self):
        Event.n_waits += 1


def test_a_gpu_reads_a_step_one_step_later(monkeypatch):
    monkeypatch.setattr(finite, "copies_in_background", lambda device: True)
    monkeypatch.setattr(torch.cuda, "Event", Event)
    counter, bad, Event.n_waits = FiniteLoss(2, CPU), torch.ones((), dtype=torch.int64), 0
    counter.count(bad, 1)
    assert (counter.streak, Event.n_waits) == (0, 0)
    counter.count(bad, 2)
    assert (counter.streak, Event.n_waits) == (1, 1)
    with pytest.raises(LossNotFiniteError, match="steps 1 to 2"):
        counter.read_all()


def test_pinned_copies_train_as_others(make_trainer, monkeypatch):
    """With the copies of a GPU, which pin each input first, the log is the same."""
    plain = make_trainer(max_steps=3, logging_steps=1)
    plain.train()
    n_pinned = 0

    def pin(tensor):
        nonlocal n_pinned
        n_pinned += 1
        return tensor

    for module in (finite, trainer_module):
        monkeypatch.setattr(module, "copies_in_background", lambda device: True)
    monkeypatch.setattr(torch.cuda, "Event", Event)
    monkeypatch.setattr(torch.Tensor, "pin_memory", pin)
    pinned = make_trainer(max_steps=3, logging_steps=1)
    pinned.train()
    losses = [[entry["loss"] for entry in one.state.log_history if "loss" in entry] for one in (plain, pinned)]
    assert len(losses[0]) == 3 and losses[0] == losses[1] and n_pinned > 0
