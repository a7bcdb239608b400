"""A small diffusion model with random weights, and made-up rows, for tasks of lm-evaluation-harness."""

import importlib.util

from .cli import ROOT
from .tiny import save_model

# A task that may run code which the model wrote.
UNSAFE_TASK = """
task: tiny_unsafe
dataset_path: json
dataset_kwargs: {data_files: {test: data/tiny_stories_eval.jsonl}}
output_type: loglikelihood
test_split: test
doc_to_text: "{{text[:8]}}"
doc_to_target: " a"
unsafe_code: true
metric_list: [{metric: acc}]
"""


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
