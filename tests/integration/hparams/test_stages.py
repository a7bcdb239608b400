"""The table of stages."""

import pytest

from llamafactory_ddm.integration.hparams.stages import STAGES, Stage, register


def test_ddm_shares_the_data_path_of_pt():
    assert STAGES["ddm"].base == "pt"
    assert STAGES["ddm"].load_runner().__name__ == "run"


def test_a_stage_is_registered_once():
    with pytest.raises(ValueError, match="'ddm'"):
        register(Stage("ddm", "pt", "a:b", "x", ("full",)))
