"""`llamafactory-ddm fit-length x.yaml`: length predictors for a model that was trained with variable_length."""

from __future__ import annotations

import os
import sys

USAGE = """usage: llamafactory-ddm fit-length x.yaml [key=value ...]

Train the length predictors of a model on `dataset`, calibrate their thresholds on `eval_dataset`, report the quality
of predicted lengths, and save all beside the model. The YAML is one of LLaMA-Factory without do_train; learning_rate,
num_train_epochs and length_coverage are the predictors'. An example: examples/varlen_fit_length.yaml
"""


def main(words: list[str]) -> int:
    """Run the command; returns the exit status."""
    if not words or words[0] in ("-h", "--help") or not words[0].endswith((".yaml", ".yml", ".json")):
        asked = bool(words) and words[0] in ("-h", "--help")
        print(USAGE, end="", file=sys.stdout if asked else sys.stderr)
        return 0 if asked else 2
    from .._autoload import activate

    os.environ.setdefault("CUDA_VISIBLE_DEVICES", "0")  # one process; upstream refuses several devices otherwise
    activate()
    from ..evaluation.lengths import as_table
    from ..integration.predict.fit_length import fit_from_command_line

    try:
        path, found = fit_from_command_line(words)
    except (ValueError, OSError) as error:
        print(f"llamafactory-ddm fit-length: {error}", file=sys.stderr)
        return 1
    print(as_table(found))
    print(f"saved: {path}; used with early_stop: predict")
    return 0
