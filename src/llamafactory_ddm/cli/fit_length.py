"""`llamafactory-ddm fit-length x.yaml`: fit length predictors to a model trained with variable_length."""

from __future__ import annotations

import os
import sys

from .yaml_command import usage_status

USAGE = """usage: llamafactory-ddm fit-length x.yaml [key=value ...]

Train the length predictors of a model on `dataset`, calibrate their thresholds on `eval_dataset`, report the quality
of predicted lengths, and save all beside the model. The YAML is that of a LLaMA-Factory run without do_train;
learning_rate, num_train_epochs and length_coverage apply to the predictors. Example: examples/varlen_fit_length.yaml
"""


def main(argv: list[str]) -> int:
    """Run the command; returns the exit status."""
    status = usage_status(argv, USAGE)
    if status is not None:
        return status
    from .._autoload import activate

    os.environ.setdefault("CUDA_VISIBLE_DEVICES", "0")  # upstream refuses one process with several devices
    activate()
    from ..evaluation.lengths import as_table
    from ..integration.predict.fit_length import fit_from_command_line

    try:
        path, metrics = fit_from_command_line(argv)
    except (ValueError, OSError) as error:
        print(f"llamafactory-ddm fit-length: {error}", file=sys.stderr)
        return 1
    print(as_table(metrics))
    print(f"saved: {path}; set early_stop: predict to use it")
    return 0
