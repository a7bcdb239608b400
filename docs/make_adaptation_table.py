"""Compare adaptation from autoregressive and from random weights, and write docs/adaptation.md.

    python docs/make_adaptation_table.py               all runs: 4 variants x 3 seeds, about 10 minutes on two cores
    python docs/make_adaptation_table.py --steps 2 --seeds 1 --out x.md     a quick look

Every run is examples/tiny_gpt2_full_ddm.yaml with the keys of its row in VARIANTS overridden. The figure is eval_loss
on the held-out split at the last step. Finished runs are not repeated.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from llamafactory_runs import ROOT, run_recipe

# name, what overrides the recipe
VARIANTS: tuple[tuple[str, str, str, str, tuple[str, ...]], ...] = (
    ("ar", "autoregressive", "yes", "yes", ()),
    ("ar-full", "autoregressive", "yes", "no", ("anneal_steps=0",)),
    ("ar-noshift", "autoregressive", "no", "yes", ("shift=false",)),
    ("random", "random", "yes", "no", ("train_from_scratch=true", "anneal_steps=0")),
)


def run(name: str, overrides: tuple[str, ...], seed: int, arguments: argparse.Namespace) -> float:
    """Train one variant with one seed, unless that is done; return its held-out bound in nats per token."""
    folder = Path(arguments.work) / f"{name}-{arguments.steps}-{seed}"
    results = folder / "eval_results.json"
    if not results.is_file():
        words = [
            "examples/tiny_gpt2_full_ddm.yaml",
            f"output_dir={folder}",
            f"max_steps={arguments.steps}",
            f"anneal_steps={arguments.steps // 4}",
            f"seed={seed}",
            'save_strategy="no"',
            'eval_strategy="no"',
            "plot_loss=false",
            "disable_tqdm=true",
            *overrides,
            *arguments.override,
        ]
        os.environ["OMP_NUM_THREADS"] = "1"  # runs go side by side
        run_recipe(*words)
    return float(json.loads(results.read_text(encoding="utf-8"))["eval_loss"])


def table(arguments: argparse.Namespace) -> str:
    """Return the page as Markdown."""
    seeds = range(1, arguments.seeds + 1)
    variants = VARIANTS[: arguments.variants]
    jobs = [(name, overrides, seed) for name, *_, overrides in variants for seed in seeds]
    with ThreadPoolExecutor(arguments.jobs) as pool:
        losses = list(pool.map(lambda job: run(*job, arguments), jobs))
    found = {(name, seed): loss for (name, _, seed), loss in zip(jobs, losses, strict=True)}
    lines = [
        "# The gain from adaptation, on the built-in model",
        "",
        f"Made by `python docs/make_adaptation_table.py`: `examples/tiny_gpt2_full_ddm.yaml` for {arguments.steps} "
        "steps,",
        f"with attention annealed over the first {arguments.steps // 4} steps in the rows that say so. "
        "The figures are `eval_loss`,",
        "the evidence bound in nats per token, on the held-out split; lower is better.",
        "",
        "| start | shift | annealing | " + " | ".join(f"seed {s}" for s in seeds) + " | mean | spread (max - min) |",
        "|---|---|---|" + "---|" * (len(seeds) + 2),
    ]
    for name, start, shift, annealing, _ in variants:
        row = [found[name, seed] for seed in seeds]
        cells = [f"{v:.3f}" for v in (*row, statistics.mean(row), max(row) - min(row))]
        lines.append(f"| {start} | {shift} | {annealing} | " + " | ".join(cells) + " |")
    if variants != VARIANTS:
        return "\n".join(lines) + "\n"
    margins = [found["random", s] - found["ar", s] for s in seeds]
    lines += [
        "",
        "With the same seed and steps, the run from autoregressive weights (first row) ends",
        f"{min(margins):.3f} to {max(margins):.3f} nats per token below the one from random weights (last row).",
    ]
    return "\n".join(lines) + "\n"


def main() -> None:
    """Read the command line, train, and write the page."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=120)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--jobs", type=int, default=2, help="runs at a time, one thread each")
    parser.add_argument("--variants", type=int, default=len(VARIANTS), help="run only the first N variants")
    parser.add_argument("--override", nargs="*", default=[], help="more key=value for every run")
    parser.add_argument("--work", default=str(ROOT / "saves" / "adaptation"))
    parser.add_argument("--out", type=Path, default=ROOT / "docs" / "adaptation.md")
    arguments = parser.parse_args()
    arguments.out.write_text(table(arguments), encoding="utf-8")


if __name__ == "__main__":
    main()
