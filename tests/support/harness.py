"""A small diffusion model with random weights, and made-up rows, for tasks of lm-evaluation-harness."""

import importlib.util

from .cli import ROOT
from .tiny import save_model


def random_model(folder, positions=48):
    """Save a model of bytes with random weights, and return its folder."""
    return save_model(folder, positions=positions, width=16, layers=1)


def made_up_rows(folder):
    """Write the rows of data/make_task_rows.py, and return their folder."""
    spec = importlib.util.spec_from_file_location("make_task_rows", ROOT / "data" / "make_task_rows.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    module.write(folder)
    return folder
