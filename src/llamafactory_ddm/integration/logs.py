"""Loggers that write as upstream's do, and quiet about what is known and harmless."""

from __future__ import annotations

import logging
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from llamafactory.extras import logging as upstream

_PACKAGE, _OURS = "llamafactory_ddm", "llamafactory_ddm.integration"
# Loggers -> how the lines start that a run of ours leaves out, and why they are harmless.
_LINES = {
    # Upstream passes it by its old name.
    "transformers.configuration_utils": ("`torch_dtype` is deprecated",),
    "transformers.modeling_utils": ("`torch_dtype` is deprecated",),
    # A card's results need a metric's data set, which a training run has none of.
    "transformers.modelcard": ("Dropping the following result",),
}
_MIXED_PRECISION = {"llamafactory.hparams.parser": ("We recommend enable mixed precision training",)}
# PEFT finds out by itself how GPT-2's layers lie, and says so at each of them.
_WARNINGS = (r"fan_in_fan_out is set to False but the target module is `Conv1D`",)


def get_logger(name: str) -> Any:
    """Return the logger of a module of this folder; it has the handlers and the level of upstream's.

    Args:
        name: the module's `__name__`.
    """
    root = upstream.get_logger()
    logging.getLogger(_PACKAGE)  # made later, it would come between the two
    ours = logging.getLogger(_OURS)
    if ours.parent is not root:
        ours.parent = root
        ours.setLevel(logging.NOTSET)  # so that levels that were looked up before are forgotten
    return logging.getLogger(name)


@contextmanager
def without_known_noise(*, on_cpu: bool) -> Iterator[None]:
    """Leave out lines of other libraries that worry users for nothing.

    Args:
        on_cpu: leave out the advice to train in mixed precision too.
    """
    silenced = {**_LINES, **(_MIXED_PRECISION if on_cpu else {})}
    filters = [(logging.getLogger(name), _without(starts)) for name, starts in silenced.items()]
    for logger, leaves in filters:
        logger.addFilter(leaves)
    try:
        with warnings.catch_warnings():
            for message in _WARNINGS:
                warnings.filterwarnings("ignore", message=message)
            yield
    finally:
        for logger, leaves in filters:
            logger.removeFilter(leaves)


def _without(starts: tuple[str, ...]) -> Any:
    return lambda record: not record.getMessage().startswith(starts)
