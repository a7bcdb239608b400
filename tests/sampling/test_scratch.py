"""Memory of draws that is used again: what a draw returned stays as it is, in every mode and thread."""

import threading

import pytest
import torch

from llamafactory_ddm.sampling import scratch as module
from llamafactory_ddm.sampling.logits import LogitsConfig
from llamafactory_ddm.sampling.scratch import scratch
from llamafactory_ddm.sampling.tokens import draw_tokens

MEASURES = frozenset({"log_prob", "margin", "entropy", "argmax", "top_log_prob"})


def draws(seed, config, *, rows=5, vocab=700, dtype=torch.float32, measures=MEASURES):
    generator = torch.Generator().manual_seed(seed)
    logits = torch.randn(rows, vocab, generator=generator).to(dtype)
    before = logits.clone()
    u = torch.rand(rows, 8, generator=generator, dtype=torch.float64)
    result = draw_tokens(logits, config, u, suppress=(3,), measures=measures)
    assert torch.equal(logits, before)
    return [value for value in result if value is not None]


@pytest.mark.parametrize("measures", [MEASURES, frozenset({"log_prob"})], ids=len)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16], ids=str)
@pytest.mark.parametrize("config", [LogitsConfig(), LogitsConfig(0.7, 0.9), LogitsConfig(1.0, 0.9), LogitsConfig(0.0)])
def test_draws_equal_those_with_memory_of_their_own(config, dtype, measures, monkeypatch):
    cases = [(1, 5, 700), (2, 9, 20000), (3, 1, 400)]
    used_again = [draws(seed, config, rows=n, vocab=v, dtype=dtype, measures=measures) for seed, n, v in cases]
    monkeypatch.setattr(module, "_LARGEST", 0)
    for (seed, n, v), ours in zip(cases, used_again, strict=True):
        own = draws(seed, config, rows=n, vocab=v, dtype=dtype, measures=measures)
        assert all(torch.equal(a, b) for a, b in zip(ours, own, strict=True))


def test_a_buffer_serves_in_and_outside_inference_mode():
    config = LogitsConfig(0.7, 0.9)
    with torch.inference_mode():
        inside = draws(4, config)
    assert all(torch.equal(a, b) for a, b in zip(inside, draws(4, config), strict=True))


def test_each_thread_has_buffers_of_its_own():
    like = torch.zeros(2, 3)
    ours = scratch(like, 0)
    assert ours is not None and ours.shape == (2, 3) and ours.data_ptr() == scratch(like[:1], 0).data_ptr()
    assert ours.data_ptr() != scratch(like, 1).data_ptr()
    theirs = []
    thread = threading.Thread(target=lambda: theirs.append(scratch(like, 0)))
    thread.start()
    thread.join()
    assert theirs[0].data_ptr() != ours.data_ptr()


def test_other_devices_gradients_and_large_results_have_none():
    assert scratch(torch.zeros(2, 3, device="meta"), 0) is None
    assert scratch(torch.zeros(2, 3, requires_grad=True), 0) is None
    assert scratch(torch.zeros(1).expand(2**20 + 1), 0) is None


@pytest.mark.parametrize("vocab", [700, 2**14])
def test_no_row_gives_no_draw(vocab):
    ids, *measures = draws(0, LogitsConfig(top_p=0.9), rows=0, vocab=vocab)
    assert len(ids) == 0 and all(len(value) == 0 for value in measures)


def test_the_default_device_does_not_matter():
    module._buffers.by_slot.clear()
    expected = draws(5, LogitsConfig(0.7, 0.9))
    module._buffers.by_slot.clear()
    logits, u = torch.randn(2, 700), torch.rand(2, 8, dtype=torch.float64)
    with torch.device("meta"):
        draw_tokens(logits, LogitsConfig(0.7, 0.9), u)
    assert all(torch.equal(a, b) for a, b in zip(expected, draws(5, LogitsConfig(0.7, 0.9)), strict=True))
