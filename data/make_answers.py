"""Make questions whose answers are from 3 to 36 tokens long: python data/make_answers.py

Writes tiny_answers_train.jsonl and tiny_answers_eval.jsonl. The questions ask whether something is an animal, what
somebody has, and to repeat a word. The length of an answer follows from its question. A question is in one split only.
"""

from __future__ import annotations

from random import Random

from make_corpus import ANIMALS, BOYS, COLOURS, GIRLS, THINGS
from make_problems import is_held_out, write

SEED = 20250302
NAMES, OWNED = GIRLS + BOYS, THINGS + ANIMALS
MOST_OWNED, MOST_TIMES = 5, 12
ASKED = ("Write", "Say", "Sing", "Repeat")


def is_animal(random: Random) -> tuple[str, str]:
    """Return a yes-or-no question with its answer."""
    name, colour, thing = random.choice(NAMES), random.choice(COLOURS), random.choice(OWNED)
    return f"{name} has a {colour} {thing}. Is it an animal?", "Yes." if thing in ANIMALS else "No."


def what(random: Random) -> tuple[str, str]:
    """Return a question with its answer, a list."""
    name, owned = random.choice(NAMES), random.sample(OWNED, random.randint(1, MOST_OWNED))
    said = f"{name} has {', '.join(f'a {thing}' for thing in owned)}."
    return f"{said} What does {name} have?", "A " + ", a ".join(owned) + "."


def repeat(random: Random) -> tuple[str, str]:
    """Return a request to repeat a thing, with its answer."""
    thing, times = random.choice(OWNED), random.randint(1, MOST_TIMES)
    return f"{random.choice(ASKED)} a {thing} {times} times.", _repeated(thing, times)


def repeat_sum(random: Random) -> tuple[str, str]:
    """Return a request to repeat a thing, with its answer; the number of times is a sum."""
    thing, times = random.choice(OWNED), random.randint(2, MOST_TIMES)
    first = random.randint(1, times - 1)
    return f"{random.choice(ASKED)} a {thing} {first} + {times - first} times.", _repeated(thing, times)


def _repeated(thing: str, times: int) -> str:
    return "A " + ", a ".join([thing] * times) + "."


# Kind -> rows for training and for evaluation. There are few distinct questions of `repeat`.
KINDS = {is_animal: (800, 100), what: (800, 100), repeat: (500, 50), repeat_sum: (900, 100)}


def answers() -> tuple[list[dict[str, str]], list[dict[str, str]]]:
    """Return distinct questions with their answers for training and for evaluation, in a fixed order."""
    random = Random(SEED)
    seen: set[str] = set()
    train: list[dict[str, str]] = []
    held_out: list[dict[str, str]] = []
    for kind, (n_train, n_eval) in KINDS.items():
        room = {False: n_train, True: n_eval}
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
