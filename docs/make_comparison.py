"""Write docs/comparison_table.md and docs/parallelism.png: both comparisons of examples/eval/ on the built-in models.

    llamafactory-cli train examples/tiny_gpt2_full_ddm.yaml
    llamafactory-cli train examples/tiny_gpt2_full_ddm_sft.yaml
    python docs/make_comparison.py

Evaluations that are finished are not repeated.
"""

from __future__ import annotations

import argparse
import shutil
import sys
from pathlib import Path

from llamafactory_ddm.cli.compare import main as compare

HEAD = """# Comparisons of the built-in models

Written by `python docs/make_comparison.py`; [comparing.md](comparing.md) explains the numbers. One run.

"""


def main() -> None:
    """Read the command line, compare, and write page and plot."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--adapted", default="saves/tiny_gpt2/full/ddm")
    parser.add_argument("--finetuned", default="saves/tiny_gpt2/full/ddm_sft")
    parser.add_argument("--earlier", help="checkpoint of the finetuning; by default checkpoint-800 of the finetuned")
    parser.add_argument("--work", type=Path, default=Path("saves/tiny_gpt2"), help="folder of the evaluations")
    parser.add_argument("--samples", type=int, help="documents of each task; by default all")
    parser.add_argument("--out", type=Path, default=Path(__file__).parent)
    arguments = parser.parse_args()
    finetuned = f"models.finetuned.model_name_or_path={arguments.finetuned}"
    earlier = arguments.earlier or f"{arguments.finetuned}/checkpoint-800"
    samples = [f"max_samples={arguments.samples}"] if arguments.samples else []
    runs = {
        "compare": [f"models.adapted.model_name_or_path={arguments.adapted}"],
        "sweep": [f"models.step 800.model_name_or_path={earlier}"],
    }
    text = HEAD
    for name, words in runs.items():
        recipe, folder = f"examples/eval/tiny_gpt2_{name}.yaml", arguments.work / name
        if compare([recipe, finetuned, *words, *samples, f"save_dir={folder}"]) != 0:
            sys.exit(1)
        tables = (folder / "comparison.md").read_text(encoding="utf-8")
        text += f"## `llamafactory-ddm compare {recipe}`\n\n{tables.replace('## ', '### ')}\n"
    arguments.out.mkdir(parents=True, exist_ok=True)
    (arguments.out / "comparison_table.md").write_text(text.rstrip() + "\n", encoding="utf-8")
    shutil.copyfile(arguments.work / "sweep" / "parallelism.png", arguments.out / "parallelism.png")


if __name__ == "__main__":
    main()
