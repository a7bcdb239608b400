"""Make arithmetic word problems to try finetuning with: python data/make_problems.py

Writes tiny_problems_train.jsonl and tiny_problems_eval.jsonl: a word problem as instruction; its working and, after
####, the answer as output. A problem is in one split only, but its sum or difference of small numbers may be in both.
"""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from random import Random

from make_corpus import COUNTED, Person, two_people

HERE = Path(__file__).parent
SEED = 20250301
N_TRAIN, N_EVAL = 6000, 200
LARGEST = 9


def one_person(random: Random, first: int, step: int) -> tuple[str, str]:
    """Return a problem about a person who has `first` and gets or gives away `step`, and its solution."""
    a, noun = Person(random), random.choice(COUNTED)
    sign, total = ("-", first - step) if first > step and random.random() < 0.7 else ("+", first + step)
    does = random.choice(("gives away", "loses", "sells") if sign == "-" else ("buys", "finds", "gets"))
    told = f"{a.name} has {first} {noun}s. {a.He} {does} {step}{' more' if sign == '+' else ''}."
    return f"{told} How many {noun}s does {a.he} have?", f"{first} {sign} {step} = {total}. #### {total}"


def two_persons(random: Random, first: int, step: int) -> tuple[str, str]:
    """Return a problem about the numbers of two people, and its solution."""
    a, b = two_people(random)
    noun = random.choice(COUNTED)
    told = f"{a.name} has {first} {noun}s and {b.name} has {step} {noun}s."
    if random.random() < 0.5 or first == step:
        return (
            f"{told} How many {noun}s do they have together?",
            f"{first} + {step} = {first + step}. #### {first + step}",
        )
    more, most, least = (a, first, step) if first > step else (b, step, first)
    other = b if more is a else a
    return (
        f"{told} How many more does {more.name} have than {other.name}?",
        f"{most} - {least} = {most - least}. #### {most - least}",
    )


def is_held_out(question: str) -> bool:
    """Tell which split a problem is in; about one in ten is held out."""
    return hashlib.sha256(question.encode()).digest()[0] < 26


def problems() -> tuple[list[dict[str, str]], list[dict[str, str]]]:
    """Return distinct problems for training and for evaluation, in a fixed order."""
    random = Random(SEED)
    seen: set[str] = set()
    train: list[dict[str, str]] = []
    held_out: list[dict[str, str]] = []
    while len(train) < N_TRAIN or len(held_out) < N_EVAL:
        first, step = random.randint(2, LARGEST), random.randint(2, LARGEST)
        maker = random.choice((one_person, two_persons))
        question, answer = maker(random, first, step)
        split, size = (held_out, N_EVAL) if is_held_out(question) else (train, N_TRAIN)
        if question not in seen and len(split) < size:
            seen.add(question)
            split.append({"instruction": question, "output": answer})
    return train, held_out


def write(name: str, splits: tuple[list[dict[str, str]], list[dict[str, str]]]) -> None:
    """Write the training and the held-out rows, one JSON object a line."""
    for split, rows in zip(("train", "eval"), splits, strict=True):
        text = "".join(json.dumps(row) + "\n" for row in rows)
        (HERE / f"{name}_{split}.jsonl").write_text(text, encoding="utf-8", newline="\n")
        print(f"{name}_{split}.jsonl: {len(rows)} rows")


if __name__ == "__main__":
    write("tiny_problems", problems())
