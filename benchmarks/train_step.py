"""The cost of a training step of `stage: ddm`, relative to baselines timed interleaved in the same process.

    python benchmarks/train_step.py            times, a minute or two
    python benchmarks/train_step.py --memory   also peak resident memory, each kind of step in a process of its own
    python benchmarks/train_step.py --kinds full block
                                               these kinds of step alone
    python benchmarks/train_step.py --data     only what is done before the model: collating rows, and noise

Kinds of step, all on the same Hugging Face GPT-2 with random weights, run by the trainers that users run:
    ar        upstream's pre-training step, labels = input_ids
    dense     a DiffuLLaMA-style step: a 4-D mask built every step, logits at every position, cross-entropy without
              reduction
    full      `stage: ddm` with full attention
    annealed  `stage: ddm` while attention is annealed
    mixed     `stage: ddm` under mixed noise, which scores all tokens instead of the masked ones only
    block     `stage: ddm` with attention: block, whose rows have two streams of tokens
Figures are CPU seconds (process time) of forward, backward and optimiser: the median over rounds of the ratio within a
round.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from llamafactory.hparams import FinetuningArguments, TrainingArguments
from llamafactory.train.pt.trainer import CustomTrainer
from peak import peak_kib
from torch.nn import functional
from transformers import AutoTokenizer, DataCollatorWithPadding, GPT2Config, GPT2LMHeadModel

from llamafactory_ddm.data.collators import ResponseCollator, StartTokenCollator, VariableLengthCollator
from llamafactory_ddm.diffusion.schedules import get_schedule
from llamafactory_ddm.integration.train.trainer import DiffusionTrainer
from llamafactory_ddm.modeling.activations import fuse_gelu
from llamafactory_ddm.modeling.bidirectional import make_bidirectional
from llamafactory_ddm.modeling.diffusion_config import DiffusionConfig
from llamafactory_ddm.modeling.model_flops import StepCounts
from llamafactory_ddm.modeling.tiled_attention import TILED, takes_tiles
from llamafactory_ddm.objectives.base import Objective
from llamafactory_ddm.objectives.block import BlockObjective
from llamafactory_ddm.objectives.masked import MaskedObjective
from llamafactory_ddm.objectives.mixed import MixedObjective
from llamafactory_ddm.utils.host_memory import keep_freed_memory

KINDS = ("ar", "dense", "full", "annealed", "mixed", "block")
BLOCK_LENGTH = 32
# (kind, baseline, upper bound on the ratio)
TIME_CLAIMS = (
    ("full", "ar", 0.80),
    ("full", "dense", 0.80),
    ("annealed", "full", 1.20),
    ("mixed", "ar", 1.05),
    ("block", "full", 1.90),
)
MEMORY_CLAIMS = (("full", "ar", 0.75), ("full", "dense", 0.75), ("mixed", "ar", 0.75), ("block", "full", 1.70))
OVERHEAD_CLAIM = 0.02


class DenseTrainer(CustomTrainer):
    """The baseline with a dense attention mask, and with logits and losses of all positions."""

    def compute_loss(self, model: Any, inputs: dict[str, Any], *args: Any, **kwargs: Any) -> Any:
        """Return the 1/t-weighted loss over masked tokens, divided by their number."""
        x_0, mask_id = inputs["input_ids"], model.config.vocab_size - 1
        batch, length = x_0.shape
        t = torch.rand(batch, 1) * (1 - 1e-3) + 1e-3
        is_masked = torch.rand(batch, length) < t
        visible = torch.rand(length, length) < 1.0
        visible |= torch.ones(length, length, dtype=torch.bool).tril()
        mask = torch.zeros(batch, 1, length, length).masked_fill(~visible, torch.finfo(torch.float32).min)
        z_t = x_0.masked_fill(is_masked, mask_id)
        logits = model(input_ids=z_t, attention_mask=mask, use_cache=False).logits[:, :-1]
        nll = functional.cross_entropy(logits.reshape(-1, logits.shape[-1]), x_0[:, 1:].reshape(-1), reduction="none")
        kept = is_masked[:, 1:].reshape(-1).float()
        weight = (1 / t).expand(batch, length - 1).reshape(-1)
        return (nll * kept * weight).sum() / kept.sum()


def make_model(shape: argparse.Namespace) -> GPT2LMHeadModel:
    """Return a GPT-2 with the vocabulary padded by one row for [MASK], with a fixed seed."""
    torch.manual_seed(0)
    config = GPT2Config(
        vocab_size=50258,
        n_layer=shape.layers,
        n_embd=shape.width,
        n_head=shape.width // 64,
        n_positions=max(1024, shape.length),
        resid_pdrop=0.0,
        embd_pdrop=0.0,
        attn_pdrop=0.0,
    )
    return GPT2LMHeadModel(config)


def make_step(kind: str, shape: argparse.Namespace, folder: str) -> Callable[[], tuple[float, float]]:
    """Return a function that takes one optimiser step and returns its CPU seconds and those spent before the model."""
    model = make_model(shape)
    rows = [
        {"input_ids": ids, "labels": ids, "attention_mask": torch.ones_like(ids)}
        for ids in torch.randint(0, 50257, (8 * shape.batch, shape.length))
    ]
    args = TrainingArguments(
        output_dir=folder,
        per_device_train_batch_size=shape.batch,
        max_steps=10**6,
        report_to="none",
        use_cpu=True,
        remove_unused_columns=False,
        disable_tqdm=True,
    )
    trainer = make_trainer(kind, model, rows, args)
    loader = trainer.get_train_dataloader()
    trainer.create_optimizer_and_scheduler(num_training_steps=10**6)
    trainer.state.max_steps = 10**6

    def batches() -> Any:
        while True:
            yield from loader

    iterator = batches()

    def step() -> tuple[float, float]:
        start = time.process_time()
        samples, count = trainer.get_batch_samples(iterator, 1, trainer.args.device)
        prepared = time.process_time()
        trainer.training_step(model, samples[0], count)
        trainer.optimizer.step()
        model.zero_grad()
        trainer.state.global_step += 1
        return time.process_time() - start, prepared - start

    return step


def make_objective(kind: str, mask_id: int = 50257) -> Objective:
    """Return the objective of a kind of step."""
    process: dict[str, Any] = {"mask_id": mask_id, "shift": True, "schedule": get_schedule("linear")}
    if kind == "mixed":
        return MixedObjective(uniform_ratio=0.1, n_ids=mask_id + 1, **process)
    if kind == "block":
        return BlockObjective(block_length=BLOCK_LENGTH, **process)
    return MaskedObjective(**process)


def make_trainer(
    kind: str,
    model: Any,
    rows: Any,
    args: TrainingArguments,
    *,
    mask_id: int = 50257,
    finetuning_type: str = "full",
    anneal_steps: int = 10**6,
    **rest: Any,
) -> Any:
    """Return the trainer of a kind of step, with its model switched to the attention that it needs.

    Args:
        kind: one of `KINDS`.
        model: causal, as it is loaded.
        rows: the training data.
        args: of the trainer.
        mask_id: the last id of the model's vocabulary.
        finetuning_type: as in YAML; adapters are in the model already.
        anneal_steps: of the kind `annealed`.
        rest: further arguments of the trainer.
    """
    common: dict[str, Any] = {
        "model": model,
        "args": args,
        "finetuning_args": FinetuningArguments(stage="pt", finetuning_type=finetuning_type),
        "processor": None,
        "tokenizer": None,
        "train_dataset": rows,
        **rest,
    }
    if kind == "ar":
        return CustomTrainer(**common)
    make_bidirectional(model)
    if kind == "dense":
        return DenseTrainer(**common)
    fuse_gelu(model)
    trainer = DiffusionTrainer(
        objective=make_objective(kind, mask_id),
        diffusion_config=DiffusionConfig(
            mask_token="<|mask|>",
            mask_token_id=mask_id,
            shift=True,
            noise_process="mixed" if kind == "mixed" else "masked",
            uniform_ratio=0.1 if kind == "mixed" else 0.0,
            noise_schedule="linear",
            attention_ratio=1.0 if kind == "block" else 0.0,
            attention="block" if kind == "block" else "full",
            train_block_length=BLOCK_LENGTH if kind == "block" else None,
        ),
        anneal_steps=anneal_steps if kind == "annealed" else 0,
        eval_time_samples=1,
        **common,
    )
    keep_freed_memory()  # trainer.train() does this, and selects the tiles
    if takes_tiles(model, args.device):
        model.set_attn_implementation(TILED)
    return trainer


def time_steps(shape: argparse.Namespace) -> bool:
    """Print the ratios of CPU seconds; return whether all claims hold."""
    with tempfile.TemporaryDirectory() as folder:
        steps = {kind: make_step(kind, shape, folder) for kind in shape.kinds}
        for step in steps.values():
            step()
        seconds: dict[str, list[float]] = {kind: [] for kind in steps}
        before: list[float] = []
        for _ in range(shape.rounds):
            for kind, step in steps.items():
                total, prepared = step()
                seconds[kind].append(total)
                if kind == "full":
                    before.append(prepared / total)
    good = True
    for kind, baseline, limit in TIME_CLAIMS:
        if not {kind, baseline} <= set(steps):
            continue
        ratios = [a / b for a, b in zip(seconds[kind], seconds[baseline], strict=True)]
        good &= _report(f"CPU seconds, {kind} / {baseline}", statistics.median(ratios), limit, ratios)
    if before:
        what = "CPU seconds before the model (data, noise), share of full"
        good &= _report(what, statistics.median(before), OVERHEAD_CLAIM)
    return good


def time_data(shape: argparse.Namespace) -> None:
    """Print the CPU time of collating rows, which workers can do, and of noise, which the main process draws."""
    folder = Path(__file__).parents[1] / "data" / "tiny_gpt2"
    length, ids = shape.length, torch.randint(0, 50257, (shape.batch, shape.length)).tolist()
    texts = [{"input_ids": row, "attention_mask": [1] * length} for row in ids]
    answers = [{**row, "labels": row["input_ids"]} for row in texts]
    packed = [{**row, "position_ids": [i % 300 for i in range(length)]} for row in answers]
    short = [{name: value[: length * 3 // 4] for name, value in row.items()} for row in answers]
    tokenizer = AutoTokenizer.from_pretrained(folder, pad_token="<|endoftext|>")
    text = StartTokenCollator(DataCollatorWithPadding(tokenizer), 1, length)
    collators: dict[str, tuple[Any, Any]] = {
        "texts": (text, texts),
        "answers": (ResponseCollator(pad_id=0, shift=True), answers),
        "packed answers": (ResponseCollator(pad_id=0, shift=True), packed),
        "variable length": (VariableLengthCollator(eos_id=2, pad_ids=(3,), canvas=length), short),
    }

    def milliseconds(function: Callable[[], Any]) -> float:
        seconds = []
        for _ in range(shape.rounds):
            start = time.process_time()
            function()
            seconds.append(time.process_time() - start)
        return statistics.median(seconds) * 1e6 / (shape.batch * length)

    print("CPU milliseconds for 1,000 tokens")
    for name, (collator, rows) in collators.items():
        print(f"collating {name:<25} {milliseconds(lambda c=collator, r=rows: c(r)):7.3f}", flush=True)
    sample_index = torch.arange(shape.batch)
    for name in ("texts", "packed answers"):
        collator, rows = collators[name]
        for kind in ("full", "mixed", "block"):
            objective, batch = make_objective(kind), collator(rows)

            def noise(objective: Objective = objective, batch: Any = batch) -> None:
                clean = objective.clean(batch)
                noised = objective.noise(clean, sample_index=sample_index, group_size=shape.batch)
                StepCounts.of(clean, noised, None)

            print(f"noise of {name}, {kind:<{24 - len(name)}} {milliseconds(noise):7.3f}", flush=True)


def three_steps(kind: str, shape: argparse.Namespace) -> None:
    """Take the three steps whose peak memory is measured."""
    with tempfile.TemporaryDirectory() as folder:
        step = make_step(kind, shape, folder)
        for _ in range(3):
            step()


def main() -> int:
    """Run the benchmark; return 1 if a claim does not hold."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--memory", action="store_true", help="measure peak resident memory as well")
    parser.add_argument("--data", action="store_true", help="measure only what is done before the model")
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--batch", type=int, default=4)
    parser.add_argument("--length", type=int, default=512)
    parser.add_argument("--layers", type=int, default=12)
    parser.add_argument("--width", type=int, default=768)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--kinds", nargs="+", choices=KINDS, default=KINDS, help="kinds of step that are timed")
    shape = parser.parse_args()
    if not any({kind, baseline} <= set(shape.kinds) for kind, baseline, _ in TIME_CLAIMS):
        parser.error(f"--kinds: compare two of {', '.join(f'{kind} {base}' for kind, base, _ in TIME_CLAIMS)}")
    torch.set_num_threads(shape.threads)
    if shape.data:
        time_data(shape)
        return 0
    kinds = [kind for kind in shape.kinds if kind != "annealed"] if shape.memory else []
    # Before the timing: a child starts with the memory of this process, which is now little more than imports.
    peak = {kind: peak_kib(three_steps, kind, shape) for kind in kinds}
    good = time_steps(shape)
    if shape.memory:
        for kind, baseline, limit in MEMORY_CLAIMS:
            if not {kind, baseline} <= set(peak):
                continue
            good &= _report(f"peak resident memory, {kind} / {baseline}", peak[kind] / peak[baseline], limit)
    return 0 if good else 1


def _report(what: str, value: float, limit: float, rounds: Sequence[float] = ()) -> bool:
    held = value <= limit
    line = f"{what:<57} {value:7.4f}   claimed <= {limit:<5} {'held' if held else 'NOT HELD'}"
    spread = f"   {min(rounds):.2f} to {max(rounds):.2f} in {len(rounds)} rounds" if rounds else ""
    print(line + spread, flush=True)
    return held


if __name__ == "__main__":
    sys.exit(main())
