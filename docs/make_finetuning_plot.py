"""Compare finetuning from adapted and from random weights: docs/finetuning.png and docs/finetuning_table.md.

    python docs/make_finetuning_plot.py                six runs, about 40 minutes on two cores
    python docs/make_finetuning_plot.py --steps 2 --every 1 --problems 2 --out folder     a quick look

The runs are examples/tiny_gpt2_full_ddm_sft.yaml and tiny_gpt2_lora_ddm_sft.yaml from different weights. Each
checkpoint solves the held-out problems as in examples/tiny_gpt2_sft_inference.yaml. Finished runs are not repeated.
The plot was made after llamafactory-cli train examples/tiny_gpt2_full_ddm.yaml max_steps=800
"""

from __future__ import annotations

import argparse
import json
import shutil
from pathlib import Path

import matplotlib
import torch
from llamafactory_runs import run_recipe
from transformers import AutoConfig, AutoModelForCausalLM

matplotlib.use("Agg")
from matplotlib import pyplot

ADAPTED = "saves/tiny_gpt2/full/ddm"
LORA = "examples/tiny_gpt2_lora_ddm_sft.yaml"
FULL = "examples/tiny_gpt2_full_ddm_sft.yaml"
# name, what the plot says, recipe, what overrides it, whether weights are random
SLOW = ("learning_rate=5.0e-4",)
STARTS: tuple[tuple[str, str, str, tuple[str, ...], bool], ...] = (
    ("adapted", "adapted weights, full", FULL, (), False),
    ("random", "random weights, full", FULL, (), True),
    ("slow", "adapted weights, full, a quarter of the learning rate", FULL, SLOW, False),
    ("slow-random", "random weights, full, a quarter of the learning rate", FULL, SLOW, True),
    ("lora", "adapted weights, LoRA", LORA, (), False),
    ("lora-random", "random weights, LoRA", LORA, (), True),
)


def random_weights(arguments: argparse.Namespace) -> str:
    """Return the folder of a model like the adapted one, but with random weights."""
    folder = Path(arguments.work).resolve() / "random_weights"
    if not folder.is_dir():
        torch.manual_seed(0)
        model = AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(arguments.model))
        model.save_pretrained(folder)
        for pattern in ("*token*", "diffusion_config.json"):
            for file in Path(arguments.model).glob(pattern):
                shutil.copy(file, folder)
    return str(folder)


def train(name: str, recipe: str, model: str, overrides: tuple[str, ...], arguments: argparse.Namespace) -> Path:
    """Train from one start, unless that is done, with a checkpoint every `--every` steps."""
    folder = Path(arguments.work).resolve() / f"{name}-{arguments.steps}"
    if not (folder / "all_results.json").is_file():
        run_recipe(
            recipe,
            f"model_name_or_path={model}",
            f"output_dir={folder}",
            f"max_steps={arguments.steps}",
            f"warmup_steps={arguments.steps // 20}",
            f"save_steps={arguments.every}",
            "save_only_model=true",
            'eval_strategy="no"',
            "plot_loss=false",
            "disable_tqdm=true",
            *overrides,
        )
    return folder


def accuracy(checkpoint: Path, base: str, arguments: argparse.Namespace) -> float:
    """Return the percentage of held-out problems that a checkpoint solves."""
    results = checkpoint / "solved" / "predict_results.json"
    if not results.is_file():
        adapter = (checkpoint / "adapter_config.json").is_file()
        model = (
            (f"model_name_or_path={base}", f"adapter_name_or_path={checkpoint}", "finetuning_type=lora")
            if adapter
            else (f"model_name_or_path={checkpoint}",)
        )
        run_recipe(
            "examples/tiny_gpt2_sft_inference.yaml",
            *model,
            f"output_dir={checkpoint / 'solved'}",
            f"max_samples={arguments.problems}",
            "disable_tqdm=true",
        )
    return float(json.loads(results.read_text(encoding="utf-8"))["predict_gsm8k_accuracy"])


def main() -> None:
    """Read the command line, train, solve, and write plot and table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=800)
    parser.add_argument("--every", type=int, default=200, help="steps between two points of a curve")
    parser.add_argument("--problems", type=int, default=200, help="held-out problems to solve")
    parser.add_argument("--starts", type=int, default=len(STARTS), help="how many of the runs")
    parser.add_argument("--model", default=ADAPTED, help="the adapted model")
    parser.add_argument("--work", default="saves/finetuning", help="folder of the runs")
    parser.add_argument("--out", type=Path, default=Path(__file__).parent)
    arguments = parser.parse_args()
    steps = list(range(arguments.every, arguments.steps + 1, arguments.every))
    lines = [
        "| start | " + " | ".join(f"{step} steps" for step in steps) + " |",
        "|---|" + "---|" * len(steps),
    ]
    figure, axes = pyplot.subplots(figsize=(9, 3.6))
    for name, said, recipe, overrides, is_random in STARTS[: arguments.starts]:
        model = random_weights(arguments) if is_random else arguments.model
        folder = train(name, recipe, model, overrides, arguments)
        solved = [accuracy(folder / f"checkpoint-{step}", model, arguments) for step in steps]
        lines.append(f"| {said} | " + " | ".join(f"{share:.1f} %" for share in solved) + " |")
        axes.plot(steps, solved, "--" if is_random else "-", marker="o", label=said)
    axes.set(xlabel="optimiser steps", ylabel="held-out problems solved (%)", ylim=(0, 100))
    axes.legend(fontsize=8, loc="upper left", bbox_to_anchor=(1.0, 1.0))
    figure.tight_layout()
    arguments.out.mkdir(parents=True, exist_ok=True)
    figure.savefig(arguments.out / "finetuning.png", dpi=120)
    (arguments.out / "finetuning_table.md").write_text("\n".join(lines) + "\n", encoding="utf-8")
    print("\n".join(lines))


if __name__ == "__main__":
    main()
