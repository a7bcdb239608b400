"""What a multiple-choice question costs, against a plain loop with the same standard error.

    python benchmarks/evaluation.py [--model saves/tiny_gpt2/full/ddm] [--questions 8] [--rounds 2]

The plain loop computes one forward pass for each mask and choice, with logits at every position. Its masks are those
of `scoring: llada`. A few of its passes are timed. How many it needs for the standard error of `scoring: bound`
follows from the real errors of both: the spread over repeated draws for the same answers. A question is a held-out
story; its choices are the last 12 tokens, and three copies with one token changed. Seconds are CPU time, measured in
turn. `small` is a GPT-2 small with random weights; it is charged the passes that the trained model needs.
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
from llamafactory_ddm.harness.scoring import SAMPLES, Answer, AnswerScorer
from llamafactory_ddm.modeling.bidirectional import full_attention_mask, make_bidirectional
from llamafactory_ddm.modeling.model_info import dtype_of

ROOT = Path(__file__).resolve().parents[1]
LENGTH, CHOICES = 12, 4
CLAIMED = 0.25


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
        mask = full_attention_mask(
            model.model,
            batch=1,
            length=z.shape[1],
            is_padding=None,
            visible=None,
            dtype=dtype_of(model.model),
            device=z.device,
        )
        logits = model.model(input_ids=z, attention_mask=mask, use_cache=False).logits[0].float()
        log_probs = logits.log_softmax(dim=1)[is_masked.nonzero()[:, 0] - int(model.config.shift)]
        log_probs.gather(1, targets[:, None]).sum().item()
    return (time.process_time() - begin) / passes


def small(model: TextGenerator) -> TextGenerator:
    """Return a GPT-2 small with random weights and the tokenizer of `model`."""
    torch.manual_seed(0)
    network = GPT2LMHeadModel(GPT2Config(vocab_size=50258)).eval()
    make_bidirectional(network)
    return TextGenerator(network, model.tokenizer, model.config)


def main() -> int:
    """Measure and print; return 1 if a ratio exceeds its claim."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="saves/tiny_gpt2/full/ddm")
    parser.add_argument("--questions", type=int, default=8)
    parser.add_argument("--draws", type=int, default=16, help="repeated draws that measure the errors")
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--only", choices=("built-in", "small"), help="measure one model")
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
    return 0 if held else 1


if __name__ == "__main__":
    raise SystemExit(main())
