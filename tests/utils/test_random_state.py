import random

import numpy as np
import pytest
import torch

from llamafactory_ddm.utils.random_state import unchanged_random_state


def draws():
    return random.random(), float(np.random.rand()), float(torch.rand(()))


def test_draws_and_seeds_in_the_block_change_nothing_after_it():
    with unchanged_random_state():
        expected = draws()
    with pytest.raises(KeyError), unchanged_random_state():
        draws()
        random.seed(1)
        np.random.seed(1)
        torch.manual_seed(1)
        raise KeyError
    assert draws() == expected
