"""Which log lines a run shows, and under which logger name."""

import logging
import warnings

import pytest

from llamafactory_ddm.integration.logs import get_logger, hide_harmless_messages

HARMLESS = [
    ("transformers.configuration_utils", "`torch_dtype` is deprecated! Use `dtype` instead!"),
    ("transformers.modeling_utils", "`torch_dtype` is deprecated! Use `dtype` instead!"),
    ("transformers.modelcard", "Dropping the following result as it does not have all the necessary fields:\n{}"),
    ("llamafactory.hparams.parser", "We recommend enable mixed precision training."),
]


@pytest.fixture
def shown():
    """The records that reach the handlers of upstream's and transformers' loggers."""
    records = []
    handler = logging.Handler()
    handler.emit = records.append
    roots = [logging.getLogger(name) for name in ("llamafactory", "transformers")]
    for root in roots:
        root.addHandler(handler)
    yield records
    for root in roots:
        root.removeHandler(handler)


def test_our_loggers_have_the_module_name_and_upstreams_handlers(shown):
    logger = get_logger("llamafactory_ddm.integration.workflow")
    upstream = logging.getLogger("llamafactory")
    assert logger.name == "llamafactory_ddm.integration.workflow"
    assert logger.getEffectiveLevel() == upstream.getEffectiveLevel()
    logger.warning_rank0("told")
    assert [(record.name, record.getMessage()) for record in shown] == [(logger.name, "told")]
    before = upstream.level
    try:
        upstream.setLevel(logging.ERROR)
        assert not logger.isEnabledFor(logging.WARNING)
    finally:
        upstream.setLevel(before)


def test_processes_after_the_first_log_nothing(shown, monkeypatch):
    monkeypatch.setenv("LOCAL_RANK", "1")
    get_logger("llamafactory_ddm.integration.workflow").info_rank0("told")
    assert shown == []


@pytest.mark.parametrize(("name", "line"), HARMLESS)
def test_harmless_lines_are_hidden_during_a_run_only(shown, name, line):
    logger = logging.getLogger(name)
    with hide_harmless_messages(on_cpu=True):
        logger.warning(line)
        logger.warning(f"Another line, not {line}")
    logger.warning(line)
    assert [record.getMessage() for record in shown] == [f"Another line, not {line}", line]


def test_the_advice_to_use_mixed_precision_is_shown_on_a_gpu(shown):
    with hide_harmless_messages(on_cpu=False):
        logging.getLogger(HARMLESS[-1][0]).warning(HARMLESS[-1][1])
    assert len(shown) == 1


def test_harmless_warnings_are_hidden_during_a_run_only():
    line = "fan_in_fan_out is set to {} but the target module is `{}`. Setting fan_in_fan_out to {}."
    with warnings.catch_warnings(record=True) as seen:
        warnings.simplefilter("always")
        with hide_harmless_messages(on_cpu=True):
            warnings.warn(line.format(False, "Conv1D", True), stacklevel=1)
            warnings.warn(line.format(True, "torch.nn.Linear", False), stacklevel=1)
        warnings.warn(line.format(False, "Conv1D", True), stacklevel=1)
    assert ["Linear" in str(warning.message) for warning in seen] == [True, False]
