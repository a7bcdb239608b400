"""Compare block diffusion with full attention and with the autoregressive model: docs/block_table.md.

    python docs/make_block_table.py                 ten runs a seed, about 25 CPU minutes a seed
    python docs/make_block_table.py --steps 2 --rows 32 --seeds 1 --blocks 4 --questions 4 --texts 8 --work w --out o

data/tiny_gpt2 is adapted as in examples/tiny_gpt2_full_ddm.yaml, with full attention and with blocks of several
lengths, and each result is finetuned as in examples/tiny_gpt2_full_ddm_sft.yaml: the same data, optimiser steps and
seeds. Blocks of one token with shift are the autoregressive loss, so that model is the autoregressive one, trained for
the same steps; it writes with transformers' KV cache. Texts are drawn with temperature 0.8 and top-p 0.95; their loss
is that of data/tiny_gpt2 on them. Answers are greedy. Diffusion models unmask by confidence_threshold. Finished runs
are not repeated.
"""

from __future__ import annotations

import argparse
import json
import math
import statistics
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from llamafactory_runs import ROOT, run_recipe
from make_mixed_table import judged, recipe
from transformers import AutoModelForCausalLM, AutoTokenizer

from llamafactory_ddm import load
from llamafactory_ddm.evaluation.text import gsm8k_accuracy
from llamafactory_ddm.generation.autoregressive import AutoregressiveModel
from llamafactory_ddm.sampling.logits import LogitsConfig

FULL, AUTOREGRESSIVE = 0, 1
LENGTH, BATCH = 64, 8
DRAW = {"temperature": 0.8, "top_p": 0.95}
PARALLEL = {"denoising_strategy": "confidence_threshold"}
# A full-attention model decodes a canvas in blocks too, so that a cache has something to keep.
CANVAS = {"block_length": 16, "diffusion_steps": LENGTH}
COLUMNS = {
    "bound": ("held-out bound, nats a token", 3),
    "loss": ("loss of its texts, nats a token", 2),
    "text_pace": ("tokens a pass, texts", 2),
    "seconds": ("CPU ms a token, texts", 2),
    "right": ("right answers, %", 1),
    "answer_pace": ("tokens a pass, answers", 2),
}
Row = dict[str, float]


def name_of(block: int) -> str:
    """Return how a model is called in the table."""
    return {FULL: "full attention", AUTOREGRESSIVE: "autoregressive"}.get(block, f"blocks of {block}")


def train(block: int, seed: int, arguments: argparse.Namespace, start: Path | None = None) -> Path:
    """Adapt, or finetune from `start`, unless that is done, and return the folder of the model."""
    steps = arguments.steps
    folder = Path(arguments.work).resolve() / f"{'ddm' if start is None else 'ddm_sft'}-{block}-{seed}-{steps}"
    if (folder / "all_results.json").is_file():
        return folder
    folder.mkdir(parents=True, exist_ok=True)
    keys: dict[str, Any] = {
        "output_dir": str(folder),
        "seed": seed,
        "max_steps": steps,
        "warmup_steps": max(1, steps // 40),
        "save_strategy": "no",
        "do_eval": True,
        "eval_strategy": "no",
        "eval_steps": None,
        "sample_steps": None,
        "sample_length": None,
        "plot_loss": False,
        "max_samples": arguments.rows,
    }
    if start is not None:
        keys["model_name_or_path"] = str(start)
    elif block == FULL:
        keys["anneal_steps"] = max(1, steps // 12)
    else:
        keys |= {"attention": "block", "train_block_length": block, "anneal_steps": None}
    if block != FULL:
        keys["antithetic_time"] = None  # blocks draw how many of their tokens are masked, not a time
    name = "tiny_gpt2_full_ddm.yaml" if start is None else "tiny_gpt2_full_ddm_sft.yaml"
    run_recipe(recipe(name, folder / "train.yaml", keys))
    return folder


def timed(write: Callable[[int], Sequence[Any]], n: int) -> tuple[list[Any], float]:
    """Return what `write` gives for batches that start at 0, BATCH …, up to n, and the CPU seconds."""
    write(0)  # the first call of a model also allocates
    start = time.process_time()
    written = [one for low in range(0, n, BATCH) for one in write(low)]
    return written, time.process_time() - start


def texts(model: Path, keys: dict[str, Any], arguments: argparse.Namespace) -> Row:
    """Return loss, tokens a pass and CPU milliseconds a token of texts from noise."""
    generator = load(model)

    def write(low: int) -> list[Any]:
        options = {"num_samples": BATCH, "batch_size": BATCH, "max_new_tokens": LENGTH, "seed": low}
        return list(generator.stream(**options, **DRAW, **PARALLEL, **keys))

    return row_of_texts(*timed(write, arguments.texts))


def autoregressive_texts(model: Path, arguments: argparse.Namespace) -> Row:
    """Return the same of an autoregressive model with transformers' KV cache."""
    plain = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32)
    writer = AutoregressiveModel(plain, AutoTokenizer.from_pretrained(model))
    config = LogitsConfig(**DRAW)

    def write(low: int) -> list[Any]:
        return writer.sample(LENGTH, config, seed=0, sample_indices=range(low, low + BATCH))

    return row_of_texts(*timed(write, arguments.texts))


def row_of_texts(written: list[Any], seconds: float) -> Row:
    """Return the cells of texts."""
    n_tokens = sum(one.n_tokens for one in written)
    return {
        "loss": math.log(judged([getattr(one, "predict", None) or one.text for one in written])["perplexity"]),
        "text_pace": n_tokens / sum(one.num_forward_passes for one in written),
        "seconds": 1000 * seconds / n_tokens,
    }


def answers(model: Path, keys: dict[str, Any], arguments: argparse.Namespace) -> Row:
    """Return the percentage of right answers to held-out problems, and tokens a pass."""
    lines = (ROOT / "data/tiny_problems_eval.jsonl").read_text(encoding="utf-8").splitlines()[: arguments.questions]
    problems = [json.loads(line) for line in lines]
    written = list(
        load(model).stream(
            [one["instruction"] for one in problems],
            max_new_tokens=32,
            batch_size=BATCH,
            temperature=0,
            **PARALLEL,
            **keys,
        )
    )
    right = gsm8k_accuracy([one.predict for one in written], [one["output"] for one in problems])
    pace = sum(one.n_tokens for one in written) / sum(one.num_forward_passes for one in written)
    return {"right": math.nan if right is None else right, "answer_pace": pace}


def rows_of(block: int, seed: int, arguments: argparse.Namespace) -> dict[str, Row]:
    """Train a model and return its rows by name; full attention has one for each cache."""
    adapted = train(block, seed, arguments)
    finetuned = train(block, seed, arguments, adapted)
    bound = json.loads((adapted / "all_results.json").read_text(encoding="utf-8"))["eval_loss"]
    rows = {}
    for cache in ("none", "dual") if block == FULL else (None,):
        keys = {} if cache is None else {"kv_cache": cache}
        canvas = {} if cache is None else CANVAS
        if block == AUTOREGRESSIVE:
            written = autoregressive_texts(adapted, arguments)
        else:
            written = texts(adapted, keys | canvas, arguments)
        name = name_of(block) + (f", kv_cache: {cache}" if cache else "")
        rows[name] = {"bound": bound, **written, **answers(finetuned, keys, arguments)}
    return rows


def table(rows: dict[str, list[Row]]) -> str:
    """Return the Markdown table: mean and range over the seeds."""
    lines = [
        "| model | " + " | ".join(title for title, _ in COLUMNS.values()) + " |",
        "|---" * (len(COLUMNS) + 1) + "|",
    ]
    for name, found in rows.items():
        cells = []
        for column, (_, digits) in COLUMNS.items():
            values = [row[column] for row in found]
            low, high = f"{min(values):.{digits}f}", f"{max(values):.{digits}f}"
            cells.append(f"{statistics.mean(values):.{digits}f}" + (f" ({low} to {high})" if low != high else ""))
        lines.append(f"| {name} | {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"


def main() -> None:
    """Read the command line, run, and write the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=200, help="optimiser steps of adaptation, and of finetuning")
    parser.add_argument("--rows", type=int, help="rows of each data set, for a quick look; all by default")
    parser.add_argument("--seeds", type=int, nargs="*", default=[1, 2, 3])
    parser.add_argument("--blocks", type=int, nargs="*", default=[4, 8, 16], help="block lengths")
    parser.add_argument("--questions", type=int, default=200)
    parser.add_argument("--texts", type=int, default=64)
    parser.add_argument("--threads", type=int, default=1, help="CPU threads of generation")
    parser.add_argument("--work", type=Path, default=ROOT / "saves/blocks", help="folder of the runs")
    parser.add_argument("--out", type=Path, default=Path(__file__).parent)
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    found: dict[str, list[Row]] = {}
    for seed in arguments.seeds:
        for block in (AUTOREGRESSIVE, *arguments.blocks, FULL):
            for name, row in rows_of(block, seed, arguments).items():
                found.setdefault(name, []).append(row)
                print(name, f"seed {seed}:", {key: round(value, 3) for key, value in row.items()}, flush=True)
    arguments.out.mkdir(parents=True, exist_ok=True)
    (arguments.out / "block_table.md").write_text(table(found), encoding="utf-8")


if __name__ == "__main__":
    main()
