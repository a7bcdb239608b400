"""Measure the figures of README over seeds and threads, and write docs/readme_figures.md.

    python docs/make_readme_figures.py --threads 1        three seeds on one thread
    python docs/make_readme_figures.py --threads 2        the same on two; the page keeps the rows of earlier calls
    python docs/make_readme_figures.py --steps 1 --seeds 1 --samples 2 --work w --out x.md     a quick look

For each seed it runs README's commands: the built-in model is adapted and fills held-out gaps; the adapted model is
finetuned on word problems, in full and with LoRA, and solves held-out ones. Finished runs are not repeated. Times are
CPU seconds divided by threads, which other processes on the machine change little.
"""

from __future__ import annotations

import argparse
import json
import os
from pathlib import Path

from llamafactory_runs import ROOT, run_recipe

# What a row measures: heading, unit, digits.
COLUMNS = {
    "eval_loss": ("eval_loss", "", 3),
    "gaps": ("gaps filled exactly", " %", 1),
    "full": ("solved, full", " %", 1),
    "lora": ("solved, LoRA", " %", 1),
    "minutes": ("adaptation, min", "", 1),
    "full_minutes": ("full, min", "", 1),
    "lora_minutes": ("LoRA, min", "", 1),
}


def fewer(arguments: argparse.Namespace) -> tuple[str, ...]:
    """Return max_samples, which limits each data set, if --samples is set."""
    return () if arguments.samples is None else (f"max_samples={arguments.samples}",)


def trained(recipe: str, folder: Path, seed: int, arguments: argparse.Namespace, *words: str) -> float:
    """Train, unless that is done; return the minutes it took, CPU time divided by threads."""
    took = folder / "minutes.json"
    if not took.is_file():
        if arguments.steps is not None:
            words += (f"max_steps={arguments.steps}", "warmup_steps=0")
        words += (f"output_dir={folder}", f"seed={seed}", "plot_loss=false", *fewer(arguments))
        seconds = run_recipe(f"examples/{recipe}", *words)
        took.write_text(json.dumps(seconds / 60 / arguments.threads), encoding="utf-8")
    return float(json.loads(took.read_text(encoding="utf-8")))


def share(recipe: str, folder: Path, metric: str, arguments: argparse.Namespace, *words: str) -> float:
    """Generate, unless that is done; return a metric of the texts, in percent."""
    results = folder / "predict_results.json"
    if not results.is_file():
        run_recipe(f"examples/{recipe}", f"output_dir={folder}", "save_trace=false", *fewer(arguments), *words)
    return float(json.loads(results.read_text(encoding="utf-8"))[metric])


def measure(seed: int, arguments: argparse.Namespace) -> dict[str, float]:
    """Run README's commands with one seed, and return its row of the table."""
    work = Path(arguments.work).resolve() / f"{arguments.threads}-{seed}"
    adapted, full, lora = work / "ddm", work / "ddm_sft", work / "lora"
    base = f"model_name_or_path={adapted}"
    minutes = trained("tiny_gpt2_full_ddm.yaml", adapted, seed, arguments)
    row = {
        "eval_loss": json.loads((adapted / "eval_results.json").read_text(encoding="utf-8"))["eval_loss"],
        "gaps": share("tiny_gpt2_infill_inference.yaml", adapted / "infill", "predict_exact_match", arguments, base),
        "minutes": minutes,
        "full_minutes": trained("tiny_gpt2_full_ddm_sft.yaml", full, seed, arguments, base),
        "lora_minutes": trained("tiny_gpt2_lora_ddm_sft.yaml", lora, seed, arguments, base),
    }
    solve, right = "tiny_gpt2_sft_inference.yaml", "predict_gsm8k_accuracy"
    row["full"] = share(solve, full / "predict", right, arguments, f"model_name_or_path={full}")
    adapter = (base, f"adapter_name_or_path={lora}", "finetuning_type=lora")
    row["lora"] = share(solve, lora / "predict", right, arguments, *adapter)
    (work / "row.json").write_text(json.dumps({**row, "threads": arguments.threads, "seed": seed}), encoding="utf-8")
    return row


def page(rows: list[dict[str, float]]) -> str:
    """Return the page: a row for each run, and the range of each column."""
    lines = [
        "# README's figures over seeds and threads",
        "",
        "Made by `python docs/make_readme_figures.py --threads 1` and `--threads 2`: README's recipes as they are,",
        "with the seed and the threads of each row. Minutes are CPU time over threads.",
        "",
        "| threads | seed | " + " | ".join(heading for heading, _, _ in COLUMNS.values()) + " |",
        "|---|---|" + "---|" * len(COLUMNS),
    ]
    for row in sorted(rows, key=lambda row: (row["threads"], row["seed"])):
        cells = [f"{row[key]:.{digits}f}{unit}" for key, (_, unit, digits) in COLUMNS.items()]
        lines.append(f"| {row['threads']:.0f} | {row['seed']:.0f} | {' | '.join(cells)} |")
    ranges = []
    for key, (_, unit, digits) in COLUMNS.items():
        values = [row[key] for row in rows]
        ranges.append(f"{min(values):.{digits}f} to {max(values):.{digits}f}{unit}")
    lines.append(f"| all | all | {' | '.join(ranges)} |")
    return "\n".join(lines) + "\n"


def main() -> None:
    """Read the command line, run what is missing, and write the page with the rows of all calls."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--threads", type=int, default=1, help="threads of a run")
    parser.add_argument("--seeds", type=int, nargs="+", default=[42, 1, 2], help="42 is the recipes' own")
    parser.add_argument("--steps", type=int, help="steps of each training; by default those of the recipe")
    parser.add_argument("--samples", type=int, help="use only N rows of each data set")
    parser.add_argument("--work", default=str(ROOT / "saves" / "readme_figures"), help="folder of the runs")
    parser.add_argument("--out", type=Path, default=ROOT / "docs" / "readme_figures.md")
    arguments = parser.parse_args()
    os.environ["OMP_NUM_THREADS"] = str(arguments.threads)  # read when the first run starts
    for seed in arguments.seeds:
        print(seed, measure(seed, arguments), flush=True)
    found = sorted(Path(arguments.work).glob("*/row.json"))
    arguments.out.write_text(page([json.loads(path.read_text(encoding="utf-8")) for path in found]), encoding="utf-8")


if __name__ == "__main__":
    main()
