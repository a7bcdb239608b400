"""The savings of early stopping, on the built-in questions with answers of 3 to 36 tokens.

    python benchmarks/early_stop.py [--model saves/tiny_gpt2/full/ddm_sft_varlen] [--rounds 3]

Each setting answers the same held-out questions, one setting after another in each round. Figures are the percentage
of answers that match exactly, the tokens that went through the model, and CPU seconds (median over rounds); the last
two are relative to the full canvas (early_stop: none) of the same round. Run llamafactory-cli train
examples/tiny_gpt2_full_ddm_sft_varlen.yaml and llamafactory-ddm fit-length examples/varlen_fit_length.yaml before.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from dataclasses import replace
from pathlib import Path

from llamafactory_ddm import LogitsConfig, SamplingSettings, TextGenerator, load
from llamafactory_ddm.data.canvas import Canvas
from llamafactory_ddm.modeling.length_heads import FILE_NAME as LENGTHS
from llamafactory_ddm.sampling.length_predictors import UNCALIBRATED

ROOT = Path(__file__).resolve().parents[1]
FULL = SamplingSettings(diffusion_steps=64, logits=LogitsConfig(temperature=0.0), early_stop="none")
WAYS = {
    "none": FULL,
    "eos": replace(FULL, early_stop="eos"),
    "predict": replace(FULL, early_stop="predict"),
    "predict, eos_quantile": replace(FULL, early_stop="predict", length_predictor="eos_quantile"),
    "predict, expected": replace(FULL, early_stop="predict", length_predictor="expected"),
    "predict, regressor": replace(FULL, early_stop="predict", length_predictor="regressor"),
    "predict, token_classifier": replace(FULL, early_stop="predict", length_predictor="token_classifier"),
    "grow": replace(FULL, early_stop="grow", grow_length=8),
    "none, blocks of 8": replace(FULL, block_length=8),
    "eos, blocks of 8": replace(FULL, block_length=8, early_stop="eos"),
    "predict, blocks of 8": replace(FULL, block_length=8, early_stop="predict"),
    "grow, blocks of 8": replace(FULL, block_length=8, early_stop="grow", grow_length=8),
}


def canvases(model: TextGenerator, rows: list[dict[str, str]], length: int) -> list[Canvas]:
    """Return the questions in DiffuLLaMA's format, as canvases of `length` tokens."""
    prompts = []
    for row in rows:
        ids = [model.tokenizer.bos_token_id, *model.codec.encode(row["instruction"]), model.config.sep_token_id]
        prompts.append(model.from_prompt(ids, length - len(ids), start=False))
    return prompts


def answer(
    model: TextGenerator, asked: list[Canvas], settings: SamplingSettings, batch: int
) -> tuple[dict[int, str], int]:
    """Return the answers by the index of their question, and the number of tokens that went through the model."""
    computed, texts = 0, {}
    order, todo = list(range(len(asked))), asked
    if settings.early_stop in ("predict", "grow"):
        sized = [one for low in range(0, len(asked), batch) for one in model.sized(asked[low : low + batch], settings)]
        computed, todo = sum(one.computed for one in sized), [one.canvas for one in sized]
        order.sort(key=lambda number: len(todo[number]))
    for low in range(0, len(order), batch):
        numbers = order[low : low + batch]
        results = model.sample_batch([todo[number] for number in numbers], settings, sample_indices=numbers)
        for number, result in zip(numbers, results, strict=True):
            texts[number] = result.predict
            computed += result.computed
    return texts, computed


def main() -> None:
    """Read the command line, measure, and print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default=str(ROOT / "saves/tiny_gpt2/full/ddm_sft_varlen"))
    parser.add_argument("--questions", type=int, default=350)
    parser.add_argument("--length", type=int, default=64, help="tokens of the canvas")
    parser.add_argument("--batch", type=int, default=16)
    parser.add_argument("--rounds", type=int, default=3)
    arguments = parser.parse_args()
    lines = (ROOT / "data" / "tiny_answers_eval.jsonl").read_text(encoding="utf-8").splitlines()
    rows = [json.loads(line) for line in lines][: arguments.questions]
    model = load(arguments.model)
    asked = canvases(model, rows, arguments.length)
    fitted = (Path(arguments.model) / LENGTHS).is_file()
    ways = {name: way for name, way in WAYS.items() if fitted or way.length_predictor in UNCALIBRATED}
    if not fitted:
        print("no length predictors: llamafactory-ddm fit-length examples/varlen_fit_length.yaml")
    seconds: dict[str, list[float]] = {name: [] for name in ways}
    right, computed = {}, {}
    for _ in range(arguments.rounds):
        for name, settings in ways.items():
            began = time.process_time()
            texts, computed[name] = answer(model, asked, settings, arguments.batch)
            seconds[name].append(time.process_time() - began)
            right[name] = sum(texts[number].strip() == row["output"] for number, row in enumerate(rows))
    print("| early_stop | right | tokens computed / full | CPU seconds / full |\n|---|---|---|---|")
    for name in ways:
        full = "none, blocks of 8" if name.endswith("8") else "none"
        ratio = statistics.median(a / b for a, b in zip(seconds[name], seconds[full], strict=True))
        share = computed[name] / computed[full]
        print(f"| {name} | {100 * right[name] / len(rows):.1f} % | {share:.2f} | {ratio:.2f} |")


if __name__ == "__main__":
    main()
