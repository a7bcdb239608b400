"""Make prompts and gaps to try generation with, from the held-out split: python data/make_prompts.py

tiny_stories_eval.jsonl: whole stories, to be continued from their beginnings.
tiny_prompts_eval.jsonl: stories, the first two sentences as instruction and the rest as output.
tiny_infill_eval.jsonl: texts with one gap of two to five words, marked <|infill|>, and the removed words as label.
"""

from __future__ import annotations

import json
import random
import re
from pathlib import Path

HERE = Path(__file__).parent
COUNT = 40


def prompts(texts: list[str]) -> list[dict[str, str]]:
    """Return stories, split after the second sentence."""
    rows = []
    for text in texts:
        match = re.match(r"([^.]*\.[^.\"]*\.)( .*)", text)
        if match:
            rows.append({"instruction": match.group(1), "output": match.group(2)})
    return rows[:COUNT]


def gaps(texts: list[str], rng: random.Random) -> list[dict[str, str]]:
    """Return texts with two to five words removed, each with the space before it, as in its tokens."""
    rows = []
    for text in texts:
        words = re.findall(r" ?[^ ]+", text)
        size = rng.randint(2, 5)
        if len(words) < size + 8:
            continue
        begin = rng.randint(4, len(words) - size - 3)
        label = "".join(words[begin : begin + size])
        marked = "".join(words[:begin]) + "<|infill|>" + "".join(words[begin + size :])
        rows.append({"instruction": marked, "output": label})
    return rows[:COUNT]


def write(name: str, rows: list[dict[str, str]]) -> None:
    """Write one object a line."""
    text = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
    (HERE / name).write_text(text, encoding="utf-8")
    print(f"{name}: {len(rows)} rows")


def main() -> None:
    """Write the three files."""
    lines = (HERE / "tiny_corpus_eval.jsonl").read_text(encoding="utf-8").splitlines()
    texts = [json.loads(line)["text"] for line in lines]
    stories = [text for text in texts if "=" not in text]
    write("tiny_stories_eval.jsonl", [{"text": story} for story in stories[:COUNT]])
    write("tiny_prompts_eval.jsonl", prompts(stories))
    write("tiny_infill_eval.jsonl", gaps(stories, random.Random(0)))


if __name__ == "__main__":
    main()
