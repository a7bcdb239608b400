"""Compare masked and mixed noise by quality against denoising steps: docs/mixed_table.md and mixed.png.

    python docs/make_mixed_table.py                twelve runs and 90 generations, about an hour on two cores
    python docs/make_mixed_table.py --continue-steps 2 --seeds 1 --questions 4 --texts 4 --work w --out o  a quick look

Two models are trained further: that of examples/tiny_gpt2_full_ddm.yaml with max_steps=800 (texts), and that of
examples/tiny_gpt2_full_ddm_sft_varlen.yaml, trained from it (answers). Each is trained once under masked noise and
once with a tenth of the noise uniform, as in examples/tiny_gpt2_full_ddm_xdlm.yaml, with the same data, steps and
seeds. Answers are measured by exact match. Texts generated from noise are measured by their perplexity under the
autoregressive model data/tiny_gpt2 and by the entropy of their words, which is low if a text repeats itself. The mixed
model generates with edits (its uniform_ratio as edit_ratio) and without. Finished runs are not repeated; --only
answers and --only texts can run at the same time, and a last call writes the table.
"""

from __future__ import annotations

import argparse
import collections
import json
import math
import statistics
from pathlib import Path
from typing import Any

import torch
from llamafactory_runs import ROOT, run_recipe
from omegaconf import OmegaConf
from transformers import AutoModelForCausalLM, AutoTokenizer

# Name in the table -> what a run trains with, what it generates with.
WAYS: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "masked": ({"noise_process": "masked"}, {}),
    "mixed, with edits": ({"noise_process": "mixed", "uniform_ratio": 0.1}, {}),
    "mixed, no edits": ({"noise_process": "mixed", "uniform_ratio": 0.1}, {"edit_ratio": 0}),
}
# What is measured -> the recipe that training goes on with, the model that it starts from, and optimiser steps.
TASKS = {
    "texts": ("tiny_gpt2_full_ddm.yaml", "saves/tiny_gpt2/full/ddm", 400),
    "answers": ("tiny_gpt2_full_ddm_sft_varlen.yaml", "saves/tiny_gpt2/full/ddm_sft_varlen", 200),
}
LEARNING_RATE = 1e-3
ENDS = ("pad_mask_ratio", "eos_window_ratio", "eos_window_max")  # they say which tokens become [MASK]


def recipe(name: str, path: Path, keys: dict[str, Any]) -> Path:
    """Write a recipe of examples/ with changed keys; None removes a key."""
    found = OmegaConf.to_container(OmegaConf.load(ROOT / "examples" / name))
    if not isinstance(found, dict):
        raise SystemExit(f"{name} holds no keys")
    found |= {"overwrite_cache": True, "disable_tqdm": True, **keys}
    OmegaConf.save(OmegaConf.create({key: value for key, value in found.items() if value is not None}), path)
    return path


def train(task: str, way: str, seed: int, arguments: argparse.Namespace) -> Path:
    """Train further, unless that is done, and return the folder of the model."""
    noise, steps = WAYS[way][0], arguments.continue_steps or TASKS[task][2]
    folder = Path(arguments.work).resolve() / f"{task}-{noise['noise_process']}-{seed}-{steps}"
    if not (folder / "all_results.json").is_file():
        folder.mkdir(parents=True, exist_ok=True)
        keys = {
            **noise,
            "model_name_or_path": str(arguments.model or ROOT / TASKS[task][1]),
            "output_dir": str(folder),
            "seed": seed,
            "learning_rate": LEARNING_RATE,
            "max_steps": steps,
            "warmup_steps": steps // 20,
            "save_strategy": "no",
            "do_eval": None,
            "eval_dataset": None,
            "eval_strategy": None,
            "eval_steps": None,
            "plot_loss": False,
            **dict.fromkeys(ENDS),
        }
        run_recipe(recipe(TASKS[task][0], folder / "train.yaml", keys))
    return folder


def generate(model: Path, way: str, steps: int, name: str, result: str, keys: dict[str, Any]) -> Path:
    """Generate with a recipe of examples/, unless that is done, and return the folder of the result."""
    folder = model / f"{way.replace(', ', '-').replace(' ', '-')}-{steps}"
    if not (folder / result).is_file():
        folder.mkdir(exist_ok=True)
        own = {"model_name_or_path": str(model), "output_dir": str(folder), "diffusion_steps": steps}
        run_recipe(recipe(name, folder / "predict.yaml", {**WAYS[way][1], **own, **keys}))
    return folder


def answers(model: Path, way: str, steps: int, arguments: argparse.Namespace) -> dict[str, float]:
    """Return the percentage of right answers under greedy decoding."""
    keys = {"max_samples": arguments.questions}
    folder = generate(model, way, steps, "tiny_gpt2_varlen_inference.yaml", "predict_results.json", keys)
    return {"exact match": json.loads((folder / "predict_results.json").read_text())["predict_exact_match"]}


def texts(model: Path, way: str, steps: int, arguments: argparse.Namespace) -> dict[str, float]:
    """Return the perplexity of texts under data/tiny_gpt2, and the entropy of their words, in nats."""
    keys = {
        "block_length": None,
        "topp_temp": 1.0,
        "num_samples": arguments.texts,
        "early_stop": "none",
        "per_device_eval_batch_size": 32,
    }
    folder = generate(model, way, steps, "tiny_gpt2_inference.yaml", "generated_predictions.jsonl", keys)
    lines = (folder / "generated_predictions.jsonl").read_text(encoding="utf-8").splitlines()
    return judged([json.loads(line)["predict"] for line in lines])


def judged(written: list[str]) -> dict[str, float]:
    """Return perplexity of texts under data/tiny_gpt2, and the entropy of their words, in nats."""
    tokenizer = AutoTokenizer.from_pretrained(ROOT / "data/tiny_gpt2")
    judge = AutoModelForCausalLM.from_pretrained(ROOT / "data/tiny_gpt2", dtype=torch.float32).eval()
    nats, count = 0.0, 0
    for text in written:
        ids = torch.tensor([[tokenizer.bos_token_id, *tokenizer.encode(text, add_special_tokens=False)]])
        with torch.inference_mode():
            log_probs = judge(input_ids=ids).logits[0, :-1].float().log_softmax(-1)
        nats -= float(log_probs.gather(1, ids[0, 1:, None]).sum())
        count += ids.shape[1] - 1
    words = collections.Counter(word for text in written for word in text.split())
    total = sum(words.values())
    return {
        "perplexity": math.exp(nats / max(count, 1)),
        "entropy": -sum(n / total * math.log(n / total) for n in words.values()),
    }


def table(found: dict[str, dict[str, dict[int, list[dict[str, float]]]]]) -> str:
    """Return the Markdown tables: mean and range over the seeds."""
    lines, counts = [], list(next(iter(found["texts"].values())))
    for task, measure in (("answers", "exact match"), ("texts", "perplexity"), ("texts", "entropy")):
        unit = {"exact match": "%, higher is better", "perplexity": "lower is better", "entropy": "nats"}[measure]
        lines += [f"**{task}: {measure}** ({unit})", "", f"| | {' | '.join(f'{n} steps' for n in counts)} |"]
        lines.append("|---" * (len(counts) + 1) + "|")
        for way, by_steps in found[task].items():
            cells = []
            for steps in counts:
                values = [one[measure] for one in by_steps[steps]]
                cells.append(f"{statistics.mean(values):.1f} ({min(values):.1f} to {max(values):.1f})")
            lines.append(f"| {way} | {' | '.join(cells)} |")
        lines.append("")
    return "\n".join(lines)


def plot(found: dict[str, dict[str, dict[int, list[dict[str, float]]]]], path: Path) -> None:
    """Plot quality against steps: a line for each way, with bars from the worst seed to the best."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(1, 2, figsize=(9, 3.6))
    panels = (("answers", "exact match", "exact match, %"), ("texts", "perplexity", "perplexity of texts"))
    for axis, (task, measure, label) in zip(axes, panels, strict=True):
        for way, by_steps in found[task].items():
            columns = [[one[measure] for one in results] for results in by_steps.values()]
            means = [statistics.mean(values) for values in columns]
            spread = [[m - min(v) for m, v in zip(means, columns, strict=True)],
                      [max(v) - m for m, v in zip(means, columns, strict=True)]]  # fmt: skip
            axis.errorbar(list(by_steps), means, yerr=spread, marker="o", markersize=4, capsize=3, label=way)
        axis.set_xscale("log", base=2)
        axis.set_xticks(list(by_steps), [str(steps) for steps in by_steps])
        axis.set_xlabel("denoising steps")
        axis.set_ylabel(label)
        axis.grid(alpha=0.3)
    axes[1].set_yscale("log")
    axes[1].legend(frameon=False)
    figure.tight_layout()
    figure.savefig(path, dpi=130)


def main() -> None:
    """Read the command line, run, and write table and plot."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--continue-steps", type=int, help="optimiser steps that training goes on, for a quick look")
    parser.add_argument("--seeds", type=int, nargs="*", default=[1, 2, 3])
    parser.add_argument("--denoising-steps", type=int, nargs="*", default=[4, 8, 16, 32, 64])
    parser.add_argument("--model", type=Path, help="start of both tasks, in place of their own")
    parser.add_argument("--questions", type=int, default=200)
    parser.add_argument("--texts", type=int, default=128)
    parser.add_argument("--work", type=Path, default=ROOT / "saves/mixed", help="folder of the runs")
    parser.add_argument("--out", type=Path, default=Path(__file__).parent)
    parser.add_argument("--only", choices=TASKS, help="run one task, without writing table and plot")
    arguments = parser.parse_args()
    found: dict[str, dict[str, dict[int, list[dict[str, float]]]]] = {}
    measures = {"answers": answers, "texts": texts}
    for seed in arguments.seeds:
        for task in (arguments.only,) if arguments.only else TASKS:
            for way in WAYS:
                model = train(task, way, seed, arguments)
                for steps in arguments.denoising_steps:
                    result = measures[task](model, way, steps, arguments)
                    found.setdefault(task, {}).setdefault(way, {}).setdefault(steps, []).append(result)
                    print(task, way, f"seed {seed}, {steps} steps:", result, flush=True)
    if not arguments.only:
        arguments.out.mkdir(parents=True, exist_ok=True)
        (arguments.out / "mixed_table.md").write_text(table(found), encoding="utf-8")
        plot(found, arguments.out / "mixed.png")


if __name__ == "__main__":
    main()
