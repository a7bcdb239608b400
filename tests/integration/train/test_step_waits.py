"""How often a training step would make the host wait for an accelerator: never, but for what a log line shows."""

import pytest
from torch.utils.data import dataloader
from transformers import TrainerCallback

from support.device_costs import Waits
from support.tiny import Rows

# Reads at which an accelerator does not make the host wait: in the backward pass of each micro-batch the factor of its
# gradient is read on the CPU only, and whether the loss of a step was finite is read one step later.
GRADIENT, FINITE = "chunked_head.py", "finite.py"
# Of a log line: upstream's loss and gradient norm, through `log` and `_maybe_log_save_evaluate`; our two sums.
OF_LOG = ["step_metrics.py", "step_metrics.py", "trainer.py", "trainer.py"]


class ByStep(TrainerCallback):
    """Takes the waits of each step, of the log line after it, and of what follows."""

    def __init__(self, waits):
        self.waits, self.steps, self.logs = waits, [], []

    def on_step_end(self, args, state, control, **kwargs):
        self.steps.append(self.files())

    def on_log(self, args, state, control, logs=None, **kwargs):
        if "loss" in logs:
            self.logs.append(self.files())

    def files(self):
        return sorted(place.split(":")[0] for place in self.waits.take())


@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"anneal_steps": 100},
        {"objective": {"uniform_ratio": 0.2}},
        {"objective": {"block_length": 4}},
        {"train": Rows(64, [16, 9, 5, 7] * 16)},
        {"logits_chunk": 0},
        {"gradient_accumulation_steps": 2, "per_device_train_batch_size": 4},
    ],
)
def test_a_step_does_not_wait(make_trainer, monkeypatch, settings):
    # On a device the whole mask is used.
    monkeypatch.setattr("llamafactory_ddm.integration.train.trainer.takes_tiles", lambda model, device: False)
    trainer = make_trainer(max_steps=6, logging_steps=3, logging_nan_inf_filter=False, **settings)
    waits = Waits(monkeypatch)
    # Rows are collated and noised on the CPU.
    trainer._noise = waits.on_host(trainer._noise)
    iterator = dataloader._SingleProcessDataLoaderIter
    monkeypatch.setattr(iterator, "_next_data", waits.on_host(iterator._next_data))
    by_step = ByStep(waits)
    trainer.add_callback(by_step)
    with waits:
        trainer.train()
    assert len(by_step.steps) == 6 and len(by_step.logs) == 2
    micro = settings.get("gradient_accumulation_steps", 1)
    gradients = [] if settings.get("logits_chunk") == 0 else [GRADIENT] * micro
    # The first step also checks the model and its output embedding.
    assert by_step.steps[1:] == [[*gradients, FINITE]] * 5
    assert by_step.logs[0] == OF_LOG
    # Before the end of a run its last loss and its weights are read.
    assert by_step.logs[1] == [FINITE, FINITE, *OF_LOG]
