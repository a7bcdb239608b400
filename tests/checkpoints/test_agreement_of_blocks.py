"""An adapter and its base model agree about blocks."""

from dataclasses import replace

import pytest

from llamafactory_ddm.checkpoints.adapters import check_agreement
from llamafactory_ddm.modeling.diffusion_config import DiffusionConfig

FULL = DiffusionConfig("[MASK]", 3, True, "masked", 0.0, "linear", 1.0)
BLOCK = replace(FULL, attention="block", train_block_length=4)


@pytest.mark.parametrize(("adapter", "base"), [(FULL, FULL), (BLOCK, FULL), (BLOCK, BLOCK)])
def test_an_adapter_may_make_a_block_model_of_a_full_one(adapter, base):
    check_agreement([("adapter", adapter), ("base", base)])


@pytest.mark.parametrize("adapter", [FULL, replace(BLOCK, train_block_length=8)])
def test_an_adapter_of_another_attention_does_not_fit_a_block_model(adapter):
    with pytest.raises(ValueError, match=r"base .*train_block_length: 4, .*adapter .*train_block_length"):
        check_agreement([("adapter", adapter), ("base", BLOCK)])
