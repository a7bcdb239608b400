"""`llamafactory-ddm plot-loss NAME=FOLDER ... --out x.png`: the losses of several runs in one plot."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path


def main(argv: list[str]) -> int:
    """Run the command; returns the exit status."""
    parser = argparse.ArgumentParser(
        prog="llamafactory-ddm plot-loss", description="Plot the losses of several runs against the training step."
    )
    parser.add_argument("runs", nargs="+", metavar="NAME=FOLDER", help="name in the legend, and output_dir of a run")
    parser.add_argument("--out", required=True, type=Path, help="the picture: .png, .pdf or .svg")
    parser.add_argument("--keys", default="loss", help="what to plot, separated by commas (default: loss)")
    parser.add_argument(
        "--smooth", type=int, default=1, help="draw the mean of so many neighbouring values (default: 1)"
    )
    arguments = parser.parse_args(argv)
    from ..integration.train.loss_curves import FORMATS, plot_runs

    try:
        runs: dict[str, Path] = {}
        for run in arguments.runs:
            name, equals, folder = run.partition("=")
            if not (name and equals and folder):
                raise ValueError(f"{run!r} is not of the form NAME=FOLDER, such as adapted=saves/tiny_gpt2/full/ddm")
            if name in runs:
                raise ValueError(f"the name {name!r} is given twice; name each run differently")
            runs[name] = Path(folder)
        keys = list(dict.fromkeys(key.strip() for key in arguments.keys.split(",") if key.strip()))
        if not keys:
            raise ValueError("--keys is empty; name what to plot, such as loss,eval_loss")
        if arguments.smooth < 1:
            raise ValueError(f"--smooth must be at least 1, got {arguments.smooth}")
        if arguments.out.suffix[1:].lower() not in FORMATS:
            raise ValueError(f"--out: {arguments.out} must end in .{', .'.join(FORMATS)}")
        notes = plot_runs(runs, keys, arguments.out, arguments.smooth)
    except (ValueError, OSError) as error:
        print(f"llamafactory-ddm plot-loss: {error}", file=sys.stderr)
        return 1
    for note in notes:
        print(f"llamafactory-ddm plot-loss: {note}", file=sys.stderr)
    print(f"saved: {arguments.out}")
    return 0
