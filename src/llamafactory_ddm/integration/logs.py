"""Loggers that write as LLaMA-Factory's do, and a filter of harmless log lines and warnings."""

from __future__ import annotations

import logging
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from llamafactory.extras import logging as upstream

_PACKAGE, _OURS = "llamafactory_ddm", "llamafactory_ddm.integration"
# Logger -> beginnings of the harmless lines that a diffusion run does not show.
_HARMLESS_LINES = {
    # Upstream passes the argument under its old name.
    "transformers.configuration_utils": ("`torch_dtype` is deprecated",),
    "transformers.modeling_utils": ("`torch_dtype` is deprecated",),
    # A model card lists a result only with the data set of its metric, which a training run does not have.
    "transformers.modelcard": ("Dropping the following result",),
}
_MIXED_PRECISION = {"llamafactory.hparams.parser": ("We recommend enable mixed precision training",)}
# PEFT detects the layout of GPT-2's weights itself, and warns at each layer.
_HARMLESS_WARNINGS = (r"fan_in_fan_out is set to False but the target module is `Conv1D`",)


def get_logger(name: str) -> Any:
    """Return the logger of a module of this folder, with the handlers and the level of upstream's logger.

    Args:
        name: the module's `__name__`.
    """
    root = upstream.get_logger()
    logging.getLogger(_PACKAGE)  # if created later, it would become the parent of ours
    ours = logging.getLogger(_OURS)
    if ours.parent is not root:
        ours.parent = root
        ours.setLevel(logging.NOTSET)  # clears the cached levels
    return logging.getLogger(name)


@contextmanager
def hide_harmless_messages(*, on_cpu: bool) -> Iterator[None]:
    """Hide harmless log lines and warnings of other libraries.

    Args:
        on_cpu: whether to hide the advice to train in mixed precision too.
    """
    hidden = {**_HARMLESS_LINES, **(_MIXED_PRECISION if on_cpu else {})}
    filters = [(logging.getLogger(name), _drop_lines(beginnings)) for name, beginnings in hidden.items()]
    for logger, line_filter in filters:
        logger.addFilter(line_filter)
    try:
        with warnings.catch_warnings():
            for message in _HARMLESS_WARNINGS:
                warnings.filterwarnings("ignore", message=message)
            yield
    finally:
        for logger, line_filter in filters:
            logger.removeFilter(line_filter)


def _drop_lines(beginnings: tuple[str, ...]) -> Any:
    return lambda record: not record.getMessage().startswith(beginnings)


def describe(error: BaseException) -> str:
    """Return the first line of an error's message, after its type unless it is a mistake of the user or the disk's."""
    line = (str(error).strip() or "no message").splitlines()[0]
    return line if isinstance(error, ValueError | OSError) else f"{type(error).__name__}: {line}"
