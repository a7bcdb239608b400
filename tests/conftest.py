"""One thread for each process, here and in the programs that tests start: two workers share two cores."""

import gc
import logging
import os

import pytest
from hypothesis import HealthCheck, settings

os.environ.setdefault("OMP_NUM_THREADS", "1")  # before anything imports PyTorch
# No limits of time: the machine may be busy.
settings.register_profile("busy", deadline=None, suppress_health_check=[HealthCheck.too_slow])
settings.load_profile("busy")


@pytest.fixture
def told(caplog):
    """What LLaMA-Factory's logger, and with it this package's, is told."""
    logger = logging.getLogger("llamafactory")
    logger.addHandler(caplog.handler)
    yield caplog
    logger.removeHandler(caplog.handler)


@pytest.fixture(scope="module", autouse=True)
def _fast_garbage_collection():
    """Leave out of garbage collection what was imported so far: looking through it took a third of a training run."""
    gc.collect()
    gc.freeze()
