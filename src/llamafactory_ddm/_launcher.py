"""The script that torchrun starts instead of LLaMA-Factory's launcher when PyTorch's autoload is off."""

import sys
from pathlib import Path

if __name__ == "__main__":
    # Python puts this file's folder first in sys.path, so that this package's modules (data, modeling, cli) would be
    # imported as top-level ones. The package itself may be importable only from the parent's working directory.
    package = Path(__file__).resolve().parent
    sys.path[:] = [entry for entry in sys.path if not entry or Path(entry).resolve() != package]
    if str(package.parent) not in sys.path:
        sys.path.append(str(package.parent))
    from llamafactory_ddm._autoload import activate

    activate()
    from llamafactory.train.tuner import run_exp

    run_exp()
