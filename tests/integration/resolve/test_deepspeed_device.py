"""DeepSpeed on a CPU is asked for by its own variable, not by keys with which accelerate leaves DeepSpeed out."""

from types import SimpleNamespace

import pytest

from llamafactory_ddm.integration.resolve import checks

CONFIG = "examples/deepspeed/ds_z2_config.json"


def training_args(**changes):
    return SimpleNamespace(**{"deepspeed": CONFIG, "use_cpu": False, **changes})


def test_keys_for_cpus_are_refused(monkeypatch):
    monkeypatch.delenv("ACCELERATE_USE_CPU", raising=False)
    with pytest.raises(ValueError, match=r"^deepspeed: .*remove use_cpu.*DS_ACCELERATOR=cpu") as raised:
        checks.check_deepspeed_device(training_args(use_cpu=True))
    assert "\n" not in str(raised.value)
    monkeypatch.setenv("ACCELERATE_USE_CPU", "true")
    with pytest.raises(ValueError, match=r"^deepspeed: .*remove the environment variable ACCELERATE_USE_CPU"):
        checks.check_deepspeed_device(training_args())


@pytest.mark.parametrize("changes", [{"deepspeed": None, "use_cpu": True}, {}])
def test_other_settings_are_not(changes, monkeypatch):
    monkeypatch.setenv("ACCELERATE_USE_CPU", "false")
    checks.check_deepspeed_device(training_args(**changes))
