"""What evaluation costs, against plain loops: a multiple-choice question, and texts of `generate_until`.

    python benchmarks/evaluation.py [--model saves/tiny_gpt2/full/ddm] [--questions 8] [--rounds 2]

For a question the standard error is the same in both ways. The plain loop computes a forward pass for each mask and
choice, with logits at every position. Its masks are those of `scoring: llada`. A few of its passes are timed. How many
it needs for the error of `scoring: bound` follows from the real errors of both: the spread over repeated draws
for the same answers. A question is a held-out story; its choices are the last 12 tokens, and three copies with one
token changed. Seconds are CPU time, measured in turn. `small` is a GPT-2 small with random weights; it is charged the
passes that the trained model needs.

Texts are greedy `low_confidence` continuations of held-out stories, with the same number of steps in both ways: one
text at a time with logits at every position, against batches. A last word in the style of LAMBADA has 3 tokens in 3
steps; a solution in the style of GSM8K 64 tokens in 32. On a GPU wall time is measured.
"""

from __future__ import annotations

import argparse
import json
import random
import statistics
import time
from pathlib import Path

import torch
from transformers import GPT2Config, GPT2LMHeadModel

from llamafactory_ddm import TextGenerator, load
from llamafactory_ddm.data.canvas import Canvas
from llamafactory_ddm.harness.scoring import SAMPLES, Answer, AnswerScorer
from llamafactory_ddm.modeling.activations import fuse_gelu
from llamafactory_ddm.modeling.bidirectional import full_attention_mask, make_bidirectional
from llamafactory_ddm.modeling.model_info import dtype_of
from llamafactory_ddm.sampling import SamplingSettings

ROOT = Path(__file__).resolve().parents[1]
LENGTH, CHOICES = 12, 4
CLAIMED = 0.25
TEXTS = {"last word": (3, 3, 0.9), "solution": (64, 32, 1.0)}  # tokens, steps, claimed ratio
BATCH = 32


def questions(model: TextGenerator, count: int) -> list[Answer]:
    """Return the choices of `count` questions."""
    rng = random.Random(0)
    texts = [json.loads(line)["text"] for line in (ROOT / "data" / "tiny_stories_eval.jsonl").open(encoding="utf-8")]
    encoded = [model.codec.encode(text) for text in texts]
    words = sorted({token for ids in encoded for token in ids})
    start = () if model.start_id is None else (model.start_id,)
    answers = []
    for number, ids in enumerate(ids for ids in encoded if len(ids) > 2 * LENGTH + 8):
        if number == count:
            break
        context, answer = (*start, *ids[: len(ids) - LENGTH]), ids[-LENGTH:]
        choices = [answer]
        while len(choices) < CHOICES:
            changed = list(answer)
            changed[rng.randrange(LENGTH)] = rng.choice(words)
            if changed not in choices:
                choices.append(changed)
        answers += [Answer(tuple(context), tuple(choice), number) for choice in choices]
    return answers


def attention(model: TextGenerator, z: torch.Tensor) -> torch.Tensor | None:
    """Return the full attention mask of one row, [1, length]."""
    network = model.model
    rest = {"is_padding": None, "visible": None, "dtype": dtype_of(network), "device": z.device}
    return full_attention_mask(network, batch=1, length=z.shape[1], **rest)


@torch.inference_mode()
def plain_seconds(model: TextGenerator, answers: list[Answer], passes: int) -> float:
    """Return the CPU seconds of one pass of the plain loop."""
    begin = time.process_time()
    for number in range(passes):
        answer = answers[number % len(answers)]
        z = torch.tensor([answer.context + answer.ids])
        is_masked = torch.zeros(z.shape[1], dtype=torch.bool)
        is_masked[len(answer.context) + torch.randperm(LENGTH)[: number % LENGTH + 1]] = True
        targets = z[0, is_masked]
        z[0, is_masked] = model.config.mask_token_id
        mask = attention(model, z)
        logits = model.model(input_ids=z, attention_mask=mask, use_cache=False).logits[0].float()
        log_probs = logits.log_softmax(dim=1)[is_masked.nonzero()[:, 0] - int(model.config.shift)]
        log_probs.gather(1, targets[:, None]).sum().item()
    return (time.process_time() - begin) / passes


def now(model: TextGenerator) -> float:
    """Return CPU seconds, or on a GPU the time when all kernels have finished."""
    if model.model.device.type == "cuda":
        torch.cuda.synchronize()
        return time.perf_counter()
    return time.process_time()


@torch.inference_mode()
def plain_text(model: TextGenerator, canvas: Canvas, steps: int) -> list[int]:
    """Return the ids of one text, a forward pass with logits at every position for each step."""
    z = torch.tensor([canvas.ids], device=model.model.device)
    is_masked = torch.tensor(canvas.editable, device=z.device)
    z[0, is_masked] = model.config.mask_token_id
    mask = attention(model, z)
    n = int(is_masked.sum())
    for step in range(1, steps + 1):
        logits = model.model(input_ids=z, attention_mask=mask, use_cache=False).logits[0].float()
        if model.config.shift:
            logits = torch.cat([logits[:1], logits[:-1]])
        logits[:, model.config.mask_token_id] = -torch.inf
        confidence, tokens = logits.softmax(dim=1).max(dim=1)
        k = int(is_masked.sum()) - n * (steps - step) // steps
        chosen = confidence.masked_fill(~is_masked, -1.0).topk(k).indices
        z[0, chosen] = tokens[chosen]
        is_masked[chosen] = False
    return [int(token) for token in z[0]]


def text_ratios(model: TextGenerator, prompts: list[list[int]], tokens: int, steps: int, rounds: int) -> list[float]:
    """Return, for each round, the time of batches over the time of the plain loop; its time is that of 4 texts."""
    keys = {"diffusion_steps": steps, "denoising_strategy": "low_confidence", "temperature": 0.0, "early_stop": "none"}
    settings = model.settings(SamplingSettings(), **keys)
    canvases = [model.from_prompt(prompt, tokens) for prompt in prompts]
    ratios = []
    for _ in range(rounds):
        begin = now(model)
        for canvas in canvases[:4]:
            plain_text(model, canvas, steps)
        plain = (now(model) - begin) / len(canvases[:4])
        begin = now(model)
        model.writer.write(canvases, settings, sample_indices=list(range(len(canvases))))
        ratios.append((now(model) - begin) / len(canvases) / plain)
    return ratios


def small(model: TextGenerator) -> TextGenerator:
    """Return a GPT-2 small with random weights and the tokenizer of `model`."""
    torch.manual_seed(0)
    network = GPT2LMHeadModel(GPT2Config(vocab_size=50258)).eval()
    make_bidirectional(network)
    fuse_gelu(network)
    return TextGenerator(network, model.tokenizer, model.config)


def story_prompts(model: TextGenerator, count: int) -> list[list[int]]:
    """Return the first 60 tokens of `count` held-out stories."""
    texts = [json.loads(line)["text"] for line in (ROOT / "data" / "tiny_stories_eval.jsonl").open(encoding="utf-8")]
    ids = [model.codec.encode(text)[:60] for text in texts]
    return [ids[number % len(ids)] for number in range(count)]


def main() -> int:
    """Measure and print; return 1 if a ratio exceeds its claim."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="saves/tiny_gpt2/full/ddm")
    parser.add_argument("--questions", type=int, default=8)
    parser.add_argument("--draws", type=int, default=16, help="repeated draws that measure the errors")
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--only", choices=("built-in", "small"), help="measure one model")
    parser.add_argument("--texts", type=int, default=BATCH, help="generated texts, in one batch")
    parser.add_argument("--passes", type=int, default=16, help="timed passes of the plain loop in a round")
    arguments = parser.parse_args()
    trained = load(arguments.model)
    answers = questions(trained, arguments.questions)
    errors = {}
    for way in ("bound", "llada"):
        draws = [
            [score.log_likelihood for score in AnswerScorer(trained, scoring=way, seed=seed).score(answers)]
            for seed in range(arguments.draws)
        ]
        errors[way] = statistics.fmean(statistics.variance(values) for values in zip(*draws, strict=True)) ** 0.5
        print(f"{way}: {SAMPLES[way]} masks a choice, error {errors[way]:.3f} nats over {arguments.draws} draws")
    passes = SAMPLES["llada"] * (errors["llada"] / errors["bound"]) ** 2
    print(f"LLaDA's masks need {passes:.0f} passes a choice for the error of {SAMPLES['bound']} balanced ones")
    held = True
    for name in ("built-in", "small") if arguments.only is None else (arguments.only,):
        model, ratios = trained if name == "built-in" else small(trained), []
        for _ in range(arguments.rounds):
            plain = plain_seconds(model, answers, arguments.passes) * passes * len(answers)
            begin = time.process_time()
            list(AnswerScorer(model, samples=SAMPLES["bound"]).score(answers))
            ratios.append((time.process_time() - begin) / plain)
        ratio = statistics.median(ratios)
        held &= ratio <= CLAIMED
        verdict = "held" if ratio <= CLAIMED else "NOT HELD"
        print(f"{name}: CPU seconds, bound / plain loop  {ratio:.3f}  claimed <= {CLAIMED}  {verdict}")
        prompts = story_prompts(model, arguments.texts)
        for kind, (tokens, steps, claimed) in TEXTS.items():
            ratio = statistics.median(text_ratios(model, prompts, tokens, steps, arguments.rounds))
            held &= ratio <= claimed
            verdict = "held" if ratio <= claimed else "NOT HELD"
            print(f"{name}, {kind}: batches / plain loop  {ratio:.3f}  claimed <= {claimed}  {verdict}")
    return 0 if held else 1


if __name__ == "__main__":
    raise SystemExit(main())
