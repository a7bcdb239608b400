"""Whose lines a run shows, and under what name."""

import logging
import warnings

import pytest

from llamafactory_ddm.integration.logs import get_logger, without_known_noise

HARMLESS = [
    ("transformers.configuration_utils", "`torch_dtype` is deprecated! Use `dtype` instead!"),
    ("transformers.modeling_utils", "`torch_dtype` is deprecated! Use `dtype` instead!"),
    ("transformers.modelcard", "Dropping the following result as it does not have all the necessary fields:\n{}"),
    ("llamafactory.hparams.parser", "We recommend enable mixed precision training."),
]


@pytest.fixture
def shown():
    """What reaches the handlers of upstream's logger, transformers' and ours."""
    records = []
    handler = logging.Handler()
    handler.emit = records.append
    roots = [logging.getLogger(name) for name in ("llamafactory", "transformers")]
    for root in roots:
        root.addHandler(handler)
    yield records
    for root in roots:
        root.removeHandler(handler)


def test_our_loggers_are_named_after_their_modules_and_write_where_upstream_does(shown):
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


def test_another_process_than_the_first_is_silent(shown, monkeypatch):
    monkeypatch.setenv("LOCAL_RANK", "1")
    get_logger("llamafactory_ddm.integration.workflow").info_rank0("told")
    assert shown == []


@pytest.mark.parametrize(("name", "line"), HARMLESS)
def test_harmless_lines_are_left_out_during_a_run_alone(shown, name, line):
    logger = logging.getLogger(name)
    with without_known_noise(on_cpu=True):
        logger.warning(line)
        logger.warning(f"Another line, not {line}")
    logger.warning(line)
    assert [record.getMessage() for record in shown] == [f"Another line, not {line}", line]


def test_on_a_gpu_mixed_precision_is_good_advice(shown):
    with without_known_noise(on_cpu=False):
        logging.getLogger(HARMLESS[-1][0]).warning(HARMLESS[-1][1])
    assert len(shown) == 1


def test_warnings_too():
    line = "fan_in_fan_out is set to {} but the target module is `{}`. Setting fan_in_fan_out to {}."
    with warnings.catch_warnings(record=True) as seen:
        warnings.simplefilter("always")
        with without_known_noise(on_cpu=True):
            warnings.warn(line.format(False, "Conv1D", True), stacklevel=1)
            warnings.warn(line.format(True, "torch.nn.Linear", False), stacklevel=1)
        warnings.warn(line.format(False, "Conv1D", True), stacklevel=1)
    assert ["Linear" in str(warning.message) for warning in seen] == [True, False]
