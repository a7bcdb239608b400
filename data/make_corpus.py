"""Write the built-in corpus: simple stories and worked arithmetic, the same bytes on every machine.

    python data/make_corpus.py             writes tiny_corpus_train.jsonl and tiny_corpus_eval.jsonl beside this file
    python data/make_corpus.py --out DIR   writes them to DIR

A text combines people, places, things and events. Its beginning constrains its end (names and pronouns, who has what,
running totals) and its end the beginning, so context on both sides is informative. A hash of its words decides which
split a text is in.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import re
from collections.abc import Mapping
from pathlib import Path
from random import Random

TRAIN_BYTES, EVAL_BYTES = 3_000_000, 120_000
SEED = 20240817

GIRLS = ("Anna", "Mia", "Lily", "Rosa", "Nora", "Ella", "Tara", "Zoe")
BOYS = ("Tom", "Ben", "Max", "Leo", "Sam", "Finn", "Omar", "Jack")
PLACES = ("park", "garden", "kitchen", "forest", "beach", "school", "market", "farm")
# Written in place of the names that "in the" does not fit. Splits and token ids are those of the names in PLACES, so
# everything that was measured before these places were renamed still holds.
RENAMED = {"beach": "meadow", "school": "field", "farm": "cave"}
THINGS = ("ball", "kite", "book", "hat", "drum", "boat", "lamp", "cup", "key", "bell")
COLOURS = ("red", "blue", "green", "yellow", "white", "black")
ANIMALS = ("dog", "cat", "bird", "rabbit", "duck", "frog", "pony")
COUNTED = ("apple", "shell", "stone", "coin", "cake", "flower", "egg", "button")
WEATHER = (
    ("sunny", "the sun was warm"),
    ("windy", "the wind was strong"),
    ("rainy", "the rain fell"),
    ("cold", "snow lay on the ground"),
)
HIDING = (
    ("under", "bench"),
    ("behind", "tree"),
    ("in", "box"),
    ("on", "wall"),
    ("near", "gate"),
    ("inside", "basket"),
)
FEELINGS = (("sad", "happy"), ("scared", "brave"), ("bored", "busy"), ("tired", "rested"), ("angry", "calm"))


class Person:
    """A name with its pronouns."""

    def __init__(self, random: Random) -> None:
        girl = random.random() < 0.5
        self.name = random.choice(GIRLS if girl else BOYS)
        self.he, self.him, self.his = ("she", "her", "her") if girl else ("he", "him", "his")
        self.He = self.he.capitalize()
        self.kind = "girl" if girl else "boy"


def two_people(random: Random) -> tuple[Person, Person]:
    """Return two people with different names."""
    first, second = Person(random), Person(random)
    while second.name == first.name:
        second = Person(random)
    return first, second


def lost_and_found(random: Random) -> str:
    """Somebody loses a thing; somebody else, or an animal, finds it."""
    a, b = two_people(random)
    place, thing, colour = random.choice(PLACES), random.choice(THINGS), random.choice(COLOURS)
    where, spot = random.choice(HIDING)
    sky, detail = random.choice(WEATHER)
    opening = random.choice(
        (
            f"{a.name} was a little {a.kind}. {a.He} had a {colour} {thing}.",
            f"One {sky} day, {a.name} took {a.his} {colour} {thing} to the {place}.",
            f"{a.name} loved {a.his} {colour} {thing} very much.",
        )
    )
    middle = random.choice(
        (
            f"In the {place}, {detail}. {a.name} played for a long time. Then {a.he} could not find the {thing}.",
            f"{a.He} went to the {place} to play, but {detail} and {a.he} lost the {colour} {thing}.",
        )
    )
    helper = random.choice(
        (
            f'{b.name} came by. "Why are you sad?" {b.he} asked. "I lost my {thing}," said {a.name}.',
            f'"I lost my {colour} {thing}," {a.name} told {b.name}. "I will help you," said {b.name}.',
        )
    )
    search = random.choice(
        (
            f"They looked everywhere in the {place}. At last {b.name} looked {where} the {spot}. The {colour} "
            f"{thing} was there!",
            f"{b.name} looked {where} the {spot}, and there was the {colour} {thing}.",
        )
    )
    close = random.choice(
        (
            f'"Thank you, {b.name}!" said {a.name}. Now {a.he} was happy again.',
            f"{a.name} was so happy that {a.he} let {b.name} play with the {thing} too.",
            f"From that day on, {a.name} and {b.name} were good friends.",
        )
    )
    return " ".join((opening, middle, helper, search, close))


def animal_friend(random: Random) -> str:
    """Somebody meets an animal that wants something."""
    a = Person(random)
    animal, place, colour = random.choice(ANIMALS), random.choice(PLACES), random.choice(COLOURS)
    before, after = random.choice(FEELINGS)
    food = random.choice(("bread", "milk", "corn", "soup", "fruit"))
    opening = random.choice(
        (
            f"Once there was a {colour} {animal} who lived near the {place}. The {animal} was {before}.",
            f"{a.name} saw a small {colour} {animal} in the {place}. It looked {before}.",
        )
    )
    meeting = random.choice(
        (
            f'"Hello, little {animal}," said {a.name}. "Do you want some {food}?"',
            f'{a.name} sat down next to the {animal}. "Are you hungry?" {a.he} asked. {a.He} had some {food}.',
        )
    )
    turn = random.choice(
        (
            f"The {animal} ate all the {food}. It was not {before} any more. It was {after}.",
            f"{a.name} gave the {food} to the {animal}, and soon it was {after}.",
        )
    )
    close = random.choice(
        (
            f"Every day {a.name} came back to the {place} with {food} for the {colour} {animal}.",
            f'"You are my friend," said {a.name}, and the {animal} followed {a.him} home.',
            f"{a.name} told {a.his} mother about the {colour} {animal}, and she smiled.",
        )
    )
    return " ".join((opening, meeting, turn, close))


def trade(random: Random) -> str:
    """Two people exchange things and are glad."""
    a, b = two_people(random)
    first, second = random.sample(THINGS, 2)
    one, two = random.sample(COLOURS, 2)
    place = random.choice(PLACES)
    text = [f"{a.name} had a {one} {first} and {b.name} had a {two} {second}."]
    text.append(random.choice((f"They met at the {place}.", f"One day they both went to the {place}.")))
    text.append(
        random.choice(
            (
                f'"I like your {second}," said {a.name}. "I like your {first}," said {b.name}.',
                f'"Can I have your {two} {second}?" asked {a.name}. '
                f'"Only if you give me your {one} {first}," said {b.name}.',
            )
        )
    )
    text.append(f"So {a.name} gave the {first} to {b.name}, and {b.name} gave the {second} to {a.name}.")
    text.append(
        random.choice(
            (
                f"Now {a.name} has the {two} {second} and {b.name} has the {one} {first}.",
                f"{a.name} went home with a {two} {second}, and {b.name} went home with a {one} {first}.",
            )
        )
    )
    return " ".join(text)


def counting(random: Random) -> str:
    """A sum in words, with its working."""
    a = Person(random)
    noun = random.choice(COUNTED)
    total = random.randint(2, 40)
    text = [f"{a.name} has {total} {noun}s."]
    for _ in range(random.randint(1, 3)):
        step = random.randint(1, 19)
        if total > step + 1 and random.random() < 0.5:
            verb = random.choice(("gives away", "loses", "sells"))
            text.append(f"{a.He} {verb} {step}. {total} - {step} = {total - step}.")
            total -= step
        else:
            verb = random.choice(("buys", "finds", "gets"))
            text.append(f"{a.He} {verb} {step} more. {total} + {step} = {total + step}.")
            total += step
    text.append(random.choice((f"Now {a.he} has {total} {noun}s.", f"How many {noun}s does {a.he} have? {total}.")))
    return " ".join(text)


def sharing(random: Random) -> str:
    """Two people add what they have."""
    a, b = two_people(random)
    noun = random.choice(COUNTED)
    x, y = random.randint(2, 30), random.randint(2, 30)
    more, less = (a, b) if x >= y else (b, a)
    text = f"{a.name} has {x} {noun}s and {b.name} has {y} {noun}s. Together they have {x} + {y} = {x + y} {noun}s."
    if x != y:
        text += f" {more.name} has {max(x, y)} - {min(x, y)} = {abs(x - y)} more than {less.name}."
    else:
        text += " They have the same number."
    return text


KINDS = ((lost_and_found, 30), (animal_friend, 25), (trade, 20), (counting, 15), (sharing, 10))


def texts() -> list[str]:
    """Return distinct texts, more than both splits need, in a fixed order."""
    random = Random(SEED)
    makers, weights = zip(*KINDS, strict=True)
    seen: dict[str, None] = {}
    size = 0
    while size < (TRAIN_BYTES + EVAL_BYTES) * 1.15:
        text = random.choices(makers, weights)[0](random)
        if text not in seen:
            seen[text] = None
            size += len(text) + 1
    return list(seen)


def rename(text: str, names: Mapping[str, str] = RENAMED) -> str:
    """Return a text with the words in `names` replaced."""
    return re.sub(r"\w+", lambda word: names.get(word[0], word[0]), text)


def is_held_out(text: str) -> bool:
    """Tell which split a text is in; about one in twenty is held out."""
    return hashlib.sha256(text.encode()).digest()[0] < 13


def write(folder: Path) -> None:
    """Write both splits to `folder`, one {"text": ...} a line."""
    left = {"train": TRAIN_BYTES, "eval": EVAL_BYTES}
    lines: dict[str, list[str]] = {"train": [], "eval": []}
    for text in texts():
        split = "eval" if is_held_out(text) else "train"
        if left[split] > 0:
            lines[split].append(json.dumps({"text": rename(text)}))
            left[split] -= len(text)
    for split, rows in lines.items():
        (folder / f"tiny_corpus_{split}.jsonl").write_text("\n".join(rows) + "\n", encoding="utf-8", newline="\n")


def main() -> None:
    """Read the command line and write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path(__file__).parent)
    write(parser.parse_args().out)


if __name__ == "__main__":
    main()
