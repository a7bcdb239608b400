"""Make questions whose answers are from 3 to 36 tokens long: python data/make_answers.py

tiny_answers_train.jsonl and tiny_answers_eval.jsonl: numbers to compare, to count between, and words to repeat. How
long an answer is follows from its question. A question is in one split only.
"""

from __future__ import annotations

from random import Random

from make_corpus import COUNTED
from make_problems import is_held_out, write

SEED = 20250302
N_TRAIN, N_EVAL = 300, 30  # of each kind
LARGEST, MOST = 50, 12
ASKED = ("Write", "Say", "Sing", "Repeat")


def compare(random: Random) -> tuple[str, str]:
    """Return a question of yes or no."""
    first, second = random.sample(range(1, LARGEST), 2)
    return f"Is {first} more than {second}?", "Yes." if first > second else "No."


def count(random: Random) -> tuple[str, str]:
    """Return a question whose answer is a row of numbers."""
    first = random.randint(1, LARGEST - MOST)
    last = first + random.randint(1, MOST - 1)
    return f"Count from {first} to {last}.", " ".join(map(str, range(first, last + 1)))


def repeat(random: Random) -> tuple[str, str]:
    """Return a question whose answer is a word several times."""
    noun, times = random.choice(COUNTED), random.randint(2, MOST)
    return f"{random.choice(ASKED)} {noun} {times} times.", " ".join([noun] * times)


def answers() -> tuple[list[dict[str, str]], list[dict[str, str]]]:
    """Return distinct questions with their answers for training and for evaluation, in a fixed order."""
    random = Random(SEED)
    seen: set[str] = set()
    train: list[dict[str, str]] = []
    held_out: list[dict[str, str]] = []
    for kind in (compare, count, repeat):
        room = {False: N_TRAIN, True: N_EVAL}
        while any(room.values()):
            question, answer = kind(random)
            split = is_held_out(question)
            if question not in seen and room[split]:
                seen.add(question)
                room[split] -= 1
                (held_out if split else train).append({"instruction": question, "output": answer})
    random.shuffle(train)
    random.shuffle(held_out)
    return train, held_out


if __name__ == "__main__":
    write("tiny_answers", answers())
