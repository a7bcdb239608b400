"""Rows that processes share: each scored token is predicted by one process; what cannot be shared is refused.

tests/e2e/test_many_processes.py trains with groups of processes.
"""

import pytest
import torch
from transformers import AutoModelForCausalLM, LlamaConfig

from llamafactory_ddm.modeling.sequence_parallel import SequenceParallel, check_shares_rows


def member(rank, size):
    """One process of a group, without the group."""
    one = object.__new__(SequenceParallel)
    one.rank, one.size = rank, size
    return one


@pytest.mark.parametrize("size", [1, 2, 4])
def test_the_parts_of_a_batch_are_the_batch(size):
    torch.manual_seed(0)
    hidden = torch.randn(3, 8, 5)
    ids = torch.arange(24).reshape(3, 8)
    head_index = torch.randperm(24)[:11]
    targets = torch.arange(11)
    found = {}
    for rank in range(size):
        one = member(rank, size)
        own, attention = one.inputs(ids, {"attention_mask": "whole", "position_ids": None})
        assert attention["attention_mask"] == "whole"
        assert torch.equal(own, attention["position_ids"] + 8 * torch.arange(3)[:, None])
        index, scored = one.scored(ids.shape, head_index, {"target": targets})
        rows = hidden[:, one.columns(8)].reshape(-1, 5)[index]
        found |= {int(target): row for target, row in zip(scored["target"], rows, strict=True)}
    assert torch.equal(torch.stack([found[n] for n in range(11)]), hidden.reshape(-1, 5)[head_index])


def test_positions_of_documents_are_kept():
    positions = torch.tensor([[0, 1, 2, 0, 1, 2, 3, 4]])
    _, attention = member(1, 2).inputs(torch.zeros(1, 8, dtype=torch.int64), {"position_ids": positions})
    assert attention["position_ids"].tolist() == [[1, 2, 3, 4]]


def test_rows_are_padded_to_a_multiple():
    z_t = torch.arange(10).reshape(2, 5)
    index = torch.tensor([0, 4, 7, 9])
    padded, moved, placement = member(0, 4).padded(z_t, index, {"position_ids": z_t % 5})
    assert padded.shape == (2, 8) and torch.equal(padded.reshape(-1)[moved], z_t.reshape(-1)[index])
    assert placement["is_padding"].tolist() == [[False] * 5 + [True] * 3] * 2
    assert placement["position_ids"].shape == (2, 8)
    _, _, placement = member(0, 4).padded(z_t, index, {"block": torch.arange(5)})
    assert placement.keys() == {"block"} and placement["block"].tolist() == [0, 1, 2, 3, 4, -1, -1, -1]
    assert member(0, 5).padded(z_t, index, {})[2] == {}


@pytest.mark.parametrize(
    ("size", "world", "attention", "pattern"),
    [
        (2, 3, "sdpa", "number of processes, 3"),
        (3, 6, "sdpa", "4 heads"),
        (4, 4, "sdpa", "2 key-value heads"),
        (2, 2, "eager", "flash_attn: sdpa.*eager"),
        (2, 2, "flash_attention_2", "flash_attn: sdpa.*flash_attention_2"),
    ],
)
def test_groups_that_cannot_share_a_model_are_refused(size, world, attention, pattern):
    config = LlamaConfig(
        hidden_size=16, intermediate_size=16, num_hidden_layers=1, num_attention_heads=4, num_key_value_heads=2
    )
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config, attn_implementation="sdpa")
    model.config._attn_implementation_internal = attention  # not by its setter, which looks for packages and a GPU
    with pytest.raises(ValueError, match=f"sequence_parallel_size: {size} .*{pattern}"):
        check_shares_rows(model, size, world)
