"""One thread for each process, here and in the programs that tests start: two workers share two cores."""

import logging
import os

import pytest

os.environ.setdefault("OMP_NUM_THREADS", "1")  # before anything imports PyTorch


@pytest.fixture
def told(caplog):
    """What LLaMA-Factory's logger, and with it this package's, is told."""
    logger = logging.getLogger("llamafactory")
    logger.addHandler(caplog.handler)
    yield caplog
    logger.removeHandler(caplog.handler)
