"""What torchrun's children run in place of LLaMA-Factory's launcher when PyTorch's autoload is off."""

import sys
from pathlib import Path

if __name__ == "__main__":
    # Python puts this file's folder first, where our modules would pass for top-level ones (data, modeling, cli). The
    # package itself may be importable from the parent's working directory alone.
    package = Path(__file__).resolve().parent
    sys.path[:] = [entry for entry in sys.path if not entry or Path(entry).resolve() != package]
    if str(package.parent) not in sys.path:
        sys.path.append(str(package.parent))
    from llamafactory_ddm._autoload import activate

    activate()
    from llamafactory.train.tuner import run_exp

    run_exp()
