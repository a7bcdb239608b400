"""Compare the formats and keys of variable length by how well the model predicts EOS: docs/ends_table.md.

    python docs/make_ends_table.py                thirteen runs, about 50 minutes on two cores
    python docs/make_ends_table.py --steps 2 --questions 4 --only none --out folder     a quick look

Every run is examples/tiny_gpt2_full_ddm_sft_varlen.yaml from the same model, with the same data, steps and seed; the
table lists the keys that differ. Each is measured as in examples/varlen_eval.yaml and
examples/tiny_gpt2_varlen_inference.yaml. Finished runs are not repeated. The table was made after llamafactory-cli
train examples/tiny_gpt2_full_ddm.yaml max_steps=800
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from llamafactory_runs import ROOT, run_recipe
from omegaconf import OmegaConf

RECIPE = ROOT / "examples" / "tiny_gpt2_full_ddm_sft_varlen.yaml"
FORMATS = ("eos_pad", "eos_eos", "rainbow")
WINDOW = {"eos_window_ratio": 0.3, "eos_window_max": 40}
OURS = ("variable_length", "pad_block_length", "pad_mask_ratio", "eos_window_ratio", "eos_window_max")


def runs(steps: int) -> Iterator[tuple[str, tuple[str, str, str], dict[str, Any]]]:
    """Yield each run's name, its first cells in the table, and its keys."""
    yield "none", ("none", "", ""), {}
    annealing = {"pad_mask_ratio": 0.3, "pad_anneal_steps": steps // 2}
    for name in FORMATS:
        for anneals in (False, True):
            for window in (False, True):
                said = "-".join([name, *["annealed"] * anneals, *["window"] * window])
                keys = {"variable_length": name, **(annealing if anneals else {}), **(WINDOW if window else {})}
                yield said, (name, "yes" if anneals else "", "yes" if window else ""), keys


def measure(name: str, keys: dict[str, Any], arguments: argparse.Namespace) -> dict[str, Any]:
    """Train, unless that is done, and return the metrics of EOS and the fraction of right answers."""
    folder = Path(arguments.work).resolve() / f"{name}-{arguments.steps}"
    folder.mkdir(parents=True, exist_ok=True)
    if not (folder / "all_results.json").is_file():
        recipe = OmegaConf.to_container(OmegaConf.load(RECIPE))
        if not isinstance(recipe, dict):
            raise SystemExit(f"{RECIPE} holds no keys")
        recipe = {key: value for key, value in recipe.items() if key not in (*OURS, "eval_dataset", "eval_steps")}
        recipe |= {
            **keys,
            "model_name_or_path": str(arguments.model),
            "output_dir": str(folder),
            "max_steps": arguments.steps,
            "warmup_steps": arguments.steps // 20,
            "save_strategy": "no",
            "eval_strategy": "no",
            "plot_loss": False,
        }
        path = folder.with_suffix(".yaml")
        OmegaConf.save(OmegaConf.create(recipe), path)
        run_recipe(path)
    words = [f"model_name_or_path={folder}", f"max_samples={arguments.questions}"]
    if not (folder / "eval" / "eos_metrics.json").is_file():
        ends = [] if "variable_length" in keys else ["variable_length=eos_eos"]
        run_recipe(ROOT / "examples" / "varlen_eval.yaml", *words, *ends, f"output_dir={folder / 'eval'}")
    if not (folder / "predict" / "predict_results.json").is_file():
        run_recipe(ROOT / "examples" / "tiny_gpt2_varlen_inference.yaml", *words, f"output_dir={folder / 'predict'}")
    found = json.loads((folder / "eval" / "eos_metrics.json").read_text(encoding="utf-8"))
    results = json.loads((folder / "predict" / "predict_results.json").read_text(encoding="utf-8"))
    return {**found, "right": results["predict_exact_match"]}


def line(said: tuple[str, str, str], found: dict[str, Any]) -> str:
    """Return a run's row of the table."""
    first = found["revealed 0"]
    quarters = " / ".join(f"{found[f'quarter {number}']['f1']:.3f}" for number in (1, 2, 3, 4))
    numbers = f"{100 * first['top1']:.1f} % | {first['mrr']:.3f} | {first['length_mae']:.2f}"
    return f"| {' | '.join(said)} | {numbers} | {quarters} | {found['right']:.1f} % |"


def main() -> None:
    """Read the command line, run, and write the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=400)
    parser.add_argument("--questions", type=int, default=350, help="held-out questions to answer")
    parser.add_argument("--only", nargs="*", help="names of runs, such as eos_pad-annealed-window")
    parser.add_argument(
        "--model", type=Path, default=ROOT / "saves/tiny_gpt2/full/ddm", help="the model that all runs start from"
    )
    parser.add_argument("--work", type=Path, default=ROOT / "saves/ends", help="folder of the runs")
    parser.add_argument("--out", type=Path, default=Path(__file__).parent)
    arguments = parser.parse_args()
    lines = [
        "| variable_length | annealing | window | top-1 | MRR | length error | F1 by quarter | right |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for name, said, keys in runs(arguments.steps):
        if arguments.only is None or name in arguments.only:
            lines.append(line(said, measure(name, keys, arguments)))
            print(lines[-1], flush=True)
    arguments.out.mkdir(parents=True, exist_ok=True)
    (arguments.out / "ends_table.md").write_text("\n".join(lines) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
