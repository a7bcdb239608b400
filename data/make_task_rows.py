"""Make a few rows in the format of each data set of the evaluation: python data/make_task_rows.py FOLDER

Writes FOLDER/DATA_SET/CONFIGURATION/SPLIT.jsonl, for `llamafactory-ddm eval ... task_data=FOLDER`. The rows have the
columns and types of the real data sets, and their content is made up here, from fixed lists and numbers: they show
that a task runs, and measure nothing.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

NAMES = ("Anna", "Ben", "Cora", "Dan", "Eva", "Finn")
THINGS = ("apples", "books", "coins", "drums", "eggs", "forks")
Rows = list[dict[str, Any]]


def word_problems() -> list[tuple[str, int, int, int]]:
    """Return nine problems as text, two numbers and their sum."""
    told = "{0} has {1} {2} and gets {3} more. How many {2} does {0} have?"
    return [(told.format(NAMES[a % 6], a, THINGS[a % 6], a + 2), a, a + 2, 2 * a + 2) for a in range(3, 12)]


def trivia() -> Rows:
    return [
        {
            "question": f"What does {name} keep in the box?",
            "question_id": f"made_up_{row}",
            "question_source": "made up",
            "entity_pages": {"doc_source": [], "filename": [], "title": [], "wiki_context": []},
            "search_results": {
                "description": [],
                "filename": [],
                "rank": [],
                "title": [],
                "url": [],
                "search_context": [],
            },
            "answer": {
                "aliases": [thing.capitalize(), f"The {thing}"],
                "normalized_aliases": [thing],
                "matched_wiki_entity_name": "",
                "normalized_matched_wiki_entity_name": "",
                "normalized_value": thing,
                "type": "FreeForm",
                "value": thing.capitalize(),
            },
        }
        for row, (name, thing) in enumerate(zip(NAMES, THINGS, strict=True))
    ]


def stories() -> Rows:
    return [
        {
            "InputStoryid": f"made-up-{row}",
            "InputSentence1": f"{name} wanted some {thing}.",
            "InputSentence2": f"{name} went to the market.",
            "InputSentence3": f"A farmer there sold {thing}.",
            "InputSentence4": f"{name} bought three of them.",
            "RandomFifthSentenceQuiz1": f"{name} was happy." if row % 2 else "It never rained again.",
            "RandomFifthSentenceQuiz2": "It never rained again." if row % 2 else f"{name} was happy.",
            "AnswerRightEnding": 1 if row % 2 else 2,
        }
        for row, (name, thing) in enumerate(zip(NAMES[:3], THINGS, strict=False))
    ]


def programs() -> Rows:
    """Return three functions with what each data set of programs says about them."""
    return [
        {
            "name": f"add_{n}",
            "head": f'def add_{n}(a):\n    """Return a plus {n}."""\n',
            "first": f"    total = a + {n}\n",
            "rest": "    return total\n",
            "tests": [f"assert add_{n}({a}) == {a + n}" for a in (0, 4, 7)],
            "text": f"Write a function add_{n} that adds {n} to a number.",
        }
        for n in (1, 2, 3, 4)
    ]


def check_function(row: dict[str, Any]) -> str:
    lines = [line.replace(row["name"] + "(", "candidate(") for line in row["tests"]]
    return "\n\nMETADATA = {}\n\n\ndef check(candidate):\n" + "".join(f"    {line}\n" for line in lines)


def data_sets() -> dict[str, Rows]:
    """Return the rows by DATA_SET/CONFIGURATION/SPLIT."""
    problems, made = word_problems(), programs()
    gsm8k = [
        {"question": text, "answer": f"There are {a} + {b} = <<{a}+{b}={c}>>{c}.\n#### {c}"}
        for text, a, b, c in problems
    ]
    mawps = [
        {
            "id": f"mawps__made_up_{row}",
            "question": text,
            "chain": f'<gadget id="calculator">{a} + {b}</gadget>\n<output>{c}</output>\n\n<result>{c}</result>',
            "result": str(c),
            "result_float": float(c),
            "equation": f"X = {a} + {b}",
            "expression": f"{a} + {b}",
        }
        for row, (text, a, b, c) in enumerate(problems)
    ]
    sat = [
        {
            "query": f"Q: {text} Answer Choices: (A){c} (B){a} (C){b} (D){c + 1}\nA: Among A through D, the answer is",
            "choices": [f"(A){c}", f"(B){a}", f"(C){b}", f"(D){c + 1}"],
            "gold": [0],
        }
        for text, a, b, c in problems
    ]
    math = [
        {
            "problem": f"Find ${a} + {b}$.",
            "level": "Level 1",
            "type": "Algebra",
            "solution": f"We add: ${a} + {b} = \\boxed{{{c}}}$.",
        }
        for _, a, b, c in problems
    ]
    hellaswag = [
        {
            "ind": row,
            "activity_label": "Baking a cake",
            "ctx_a": f"{name} puts the {thing} on a table.",
            "ctx_b": "then she",
            "ctx": f"{name} puts the {thing} on a table. then she",
            "endings": [f"counts the {thing}.", "flies to the moon.", "sings to a wall [title] loudly.", "melts."],
            "source_id": f"activitynet~made_up_{row}",
            "split": "val",
            "split_type": "indomain",
            "label": "0",
        }
        for row, (name, thing) in enumerate(zip(NAMES[:3], THINGS, strict=False))
    ]
    winogrande = [
        {
            "sentence": f"{one} gave the {thing} to {two} because _ did not need them.",
            "option1": one,
            "option2": two,
            "answer": "1",
        }
        for one, two, thing in zip(NAMES[:3], NAMES[3:], THINGS, strict=False)
    ]
    siqa = [
        {
            "context": f"{name} lost all the {thing} on the way home.",
            "question": f"How would {name} feel?",
            "answerA": "sad",
            "answerB": "hungry",
            "answerC": "tall",
            "label": "1",
        }
        for name, thing in zip(NAMES[:3], THINGS, strict=False)
    ]
    piqa = [
        {
            "goal": f"Carry many {thing}.",
            "sol1": f"Put the {thing} in a bag.",
            "sol2": f"Throw the {thing} away.",
            "label": 0,
        }
        for thing in THINGS[:3]
    ]
    humaneval = [
        {
            "task_id": f"MadeUp/{row}",
            "prompt": each["head"],
            "canonical_solution": each["first"] + each["rest"],
            "test": check_function(each),
            "entry_point": each["name"],
        }
        for row, each in enumerate(made[:3])
    ]
    one_line = [
        {
            "task_id": f"SingleLineInfilling/MadeUp/{row}/L0",
            "entry_point": each["name"],
            "prompt": each["head"],
            "suffix": each["rest"],
            "canonical_solution": each["first"],
            "test": check_function(each),
        }
        for row, each in enumerate(made[:3])
    ]
    mbpp = [
        {
            "task_id": row,
            "text": each["text"],
            "code": each["head"] + each["first"] + each["rest"],
            "test_list": each["tests"],
            "test_setup_code": "",
            "challenge_test_list": [],
        }
        for row, each in enumerate(made)
    ]
    logic = [
        {"input": f"not ( {a} ) and {b} is", "target": str(not a and b)}
        for a, b in ((True, True), (False, True), (False, False))
    ]
    found = {
        "mandarjoshi/trivia_qa/rc.nocontext/train": trivia(),
        "mandarjoshi/trivia_qa/rc.nocontext/validation": trivia()[:3],
        "EleutherAI/lambada_openai/default/test": [
            {"text": f"{name} had many {thing}. Every day {name} counted the {thing}"}
            for name, thing in zip(NAMES[:3], THINGS, strict=False)
        ],
        "rocstories/validation": stories(),
        "SaylorTwift/bbh/boolean_expressions/test": logic,
        "google-research-datasets/mbpp/full/prompt": mbpp,
        "google-research-datasets/mbpp/full/test": mbpp[:3],
        "openai/openai_humaneval/test": humaneval,
        "loubnabnl/humaneval_infilling/HumanEval-SingleLineInfilling/test": one_line,
        "hails/agieval-sat-math/test": sat,
    }
    for name, rows in {"openai/gsm8k/main": gsm8k, "MU-NLPC/Calc-mawps": mawps}.items():
        found |= {f"{name}/train": rows[3:], f"{name}/test": rows[:3]}
    subjects = ("algebra", "counting_and_probability", "geometry", "intermediate_algebra")
    for subject in (*subjects, "number_theory", "prealgebra", "precalculus"):
        name = f"EleutherAI/hendrycks_math/{subject}"
        found |= {f"{name}/train": math[3:], f"{name}/test": math[:3]}
    choices = {"Rowan/hellaswag": hellaswag, "lighteval/siqa": siqa, "baber/piqa": piqa}
    for name, rows in {**choices, "allenai/winogrande/winogrande_xl": winogrande}.items():
        found |= {f"{name}/{split}": rows for split in ("train", "validation")}
    return found


def write(folder: Path) -> None:
    """Write all rows into a folder."""
    for name, rows in data_sets().items():
        path = folder / f"{name}.jsonl"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")


if __name__ == "__main__":
    if len(sys.argv) != 2:
        sys.exit("usage: python data/make_task_rows.py FOLDER")
    write(Path(sys.argv[1]))
