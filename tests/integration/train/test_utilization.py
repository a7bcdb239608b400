"""The MFU in the log of a run."""

import pytest
import torch

from llamafactory_ddm.modeling.model_flops import model_flops
from support.tiny import LENGTH, VOCABULARY, Rows, tiny_model


def training_logs(trainer):
    trainer.train()
    return [log for log in trainer.state.log_history if "loss" in log]


def test_the_log_holds_the_mfu(make_trainer):
    """It is the operations of a step, counted by hand, in the time that tokens_per_second tells."""
    trainer = make_trainer(max_steps=3, gradient_accumulation_steps=2, peak_tflops=0.125)
    logs = training_logs(trainer)
    assert len(logs) == 3
    tokens, width, layers = 16 * LENGTH, 32, 2
    for log in logs:
        seconds = tokens / log["tokens_per_second"]
        scored = round(log["masked_fraction"] * 16 * (LENGTH - 1))  # with shift the first token is not masked
        blocks = 6 * 12 * width**2 * layers * tokens + 12 * layers * width * LENGTH * tokens
        assert log["mfu"] == pytest.approx((blocks + 6 * VOCABULARY * width * scored) / seconds / 1.25e11, rel=2e-3)


def test_the_peak_of_all_devices_counts(make_trainer):
    from llamafactory_ddm.integration.train.utilization import utilization

    model = tiny_model()
    args = make_trainer(model=model).args
    one = utilization(model, model.lm_head, args, 2.0, torch.float32)

    class Args:
        device, world_size = args.device, 4

    four = utilization(model, model.lm_head, Args, 2.0, torch.float32)
    assert (one.peak, four.peak) == (2e12, 8e12) and one.flops == four.flops == model_flops(model, model.lm_head)


def test_without_a_peak_there_is_no_mfu_and_one_line_says_so(make_trainer, caplog):
    logs = training_logs(make_trainer(max_steps=3))
    assert all("mfu" not in log for log in logs)
    lines = [record.getMessage() for record in caplog.records if "MFU" in record.getMessage()]
    assert len(lines) == 1 and "peak_tflops" in lines[0] and "cpu" in lines[0]


def test_a_known_gpu_needs_no_key(monkeypatch):
    from llamafactory_ddm.integration.train.utilization import utilization

    model = tiny_model()

    class Args:
        device, world_size = torch.device("cuda"), 1

    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "NVIDIA H200")
    assert utilization(model, model.lm_head, Args, None, torch.bfloat16).peak == pytest.approx(989.4e12)
    assert utilization(model, model.lm_head, Args, 500.0, torch.bfloat16).peak == pytest.approx(500e12)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "NVIDIA GeForce GTX 1080")
    assert utilization(model, model.lm_head, Args, None, torch.bfloat16) is None


@pytest.mark.parametrize("settings", [{"objective": {"block_length": 4}}, {"objective": {"uniform_ratio": 0.2}}])
def test_other_objectives(make_trainer, settings):
    """Two streams take more operations for each token, and mixed noise scores every token."""
    data = {"train": Rows(16), "max_steps": 1, "peak_tflops": 0.125}
    (plain,) = training_logs(make_trainer(folder="plain", **data))
    (other,) = training_logs(make_trainer(**data, **settings))
    per_token = [log["mfu"] / log["tokens_per_second"] for log in (plain, other)]
    assert per_token[1] > 1.01 * per_token[0]
