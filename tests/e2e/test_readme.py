"""README tells the truth: its commands, files, links, keys and versions."""

import dataclasses
import json
import re
import shlex
import sys

import pytest

from llamafactory_ddm.integration.hparams.diffusion import DiffusionArguments
from llamafactory_ddm.integration.patches import compatibility
from support.blocks import as_block_model
from support.cli import ROOT, run

README = (ROOT / "README.md").read_text(encoding="utf-8")
DOCS = {path.stem: path.read_text(encoding="utf-8") for path in (ROOT / "docs").glob("*.md")}


def commands(text):
    """Return the commands of a page's bash blocks, those that go on over several lines as one."""
    blocks = re.findall(r"```bash\n(.*?)```", text, re.S)
    return [line for block in blocks for line in re.sub(r" \\\n +", " ", block).splitlines() if line]


RUN, TEST, *_ = commands(README)
COMMANDS = [line for page in sorted(DOCS) for line in commands(DOCS[page])]
(EXPORT,) = (line for line in COMMANDS if line.startswith("llamafactory-cli export"))
SHELL = [line for line in COMMANDS if line.startswith("llamafactory-ddm generate")]
(PLOT,) = (line for line in COMMANDS if line.startswith("llamafactory-ddm plot-loss"))  # runs in test_text_quality.py
TASKS = commands(DOCS["evaluation_tasks"])  # run in test_evaluation_tasks.py
CORPUS = commands(DOCS["data"])  # run in test_examples.py
# Servers and what asks them; they run in test_serving_page.py.
SERVING = [
    line for line in (*commands(README), *COMMANDS) if re.match(r"curl|llamafactory-cli (chat|api|webchat) ", line)
]
RECIPES = sorted(path.name for path in (ROOT / "examples").glob("*.yaml"))


def test_readme_fits_on_a_screen():
    assert len(README.split()) <= 1500
    assert max(map(len, README.splitlines())) <= 140


def test_the_first_two_commands_of_readme_are_complete():
    """Installing and testing is what .ci/run does; the YAMLs run in test_examples.py."""
    new = "python3 -m venv v && . v/bin/activate && "
    assert (
        f"{new}pip install -e . && llamafactory-cli train examples/tiny_gpt2_full_ddm.yaml"
        " && llamafactory-cli train examples/tiny_gpt2_inference.yaml" == RUN
    )
    assert new + 'pip install -e ".[dev]" && pytest' == TEST
    check = (ROOT / ".ci" / "run").read_text().splitlines()
    steps = (
        TEST.replace("venv v ", 'venv "$venv" ').replace(". v/bin/activate", '. "$venv/bin/activate"').split(" && ")
    )
    at = [check.index(step) for step in steps]
    assert at == sorted(at)
    assert "pytest -m slow" in check  # the rest of the tests


def test_the_commands_are_those_that_are_exercised():
    """A YAML that a page names runs in test_examples.py; the others run below."""
    assert len(SHELL) == 4 and sum("ddm_block " in line for line in SHELL) == 2
    for line in (*commands(README)[2:], *COMMANDS):
        program, command, *words = shlex.split(line, comments=True)
        if line not in (EXPORT, *SHELL, PLOT, *TASKS, *CORPUS, *SERVING):
            assert len(words) == 1, line
            # They run in test_evaluation.py, test_comparisons.py and test_text_quality.py.
            if program == "llamafactory-ddm" and command in ("eval", "compare", "quality"):
                assert (ROOT / "examples" / "eval" / words[0].removeprefix("examples/eval/")).is_file(), line
                continue
            assert (program, command) in (("llamafactory-cli", "train"), ("llamafactory-ddm", "fit-length")), line
            assert words[0].removeprefix("examples/") in RECIPES, line


def test_every_recipe_is_in_a_table():
    for name in RECIPES:
        assert re.search(rf"^\|.*\(\.\./examples/{name}\)", DOCS["recipes"], re.M), name


def test_every_task_has_one_recipe():
    tasks = [line for line in README.splitlines() if "](examples/" in line]
    assert len(tasks) >= 12
    for line in tasks:
        assert line.startswith("| [") and line.count("](examples/") == 1, line


def test_every_key_is_documented_with_its_default():
    for f in dataclasses.fields(DiffusionArguments):
        rows = [line for line in DOCS["keys"].splitlines() if line.startswith(f"| `{f.name}` |")]
        assert rows, f.name
        if f.default is not None:
            text = str(f.default).lower() if isinstance(f.default, bool) else f"{f.default}"
            assert f"`{text}`" in rows[0], f.name


def test_supported_versions_agree():
    low, high = compatibility.SUPPORTED
    setup = (ROOT / "setup.py").read_text()
    assert f"llamafactory>={low},<{high}" in setup
    assert f"llamafactory >= {low}, < {high}" in README
    for name, limits in re.findall(r'"(torch|transformers)(>=[^"]+)"', setup):
        assert limits.split(",")[0].replace(">=", ">= ") in README, name


@pytest.mark.slow
def test_the_commands_for_people_run(checkpoint, tmp_path):
    """The command lines and the three lines of Python, on a model of three steps, and the same as a block model."""
    block = as_block_model(checkpoint, tmp_path / "block")
    for line in SHELL:
        line = line.replace("saves/tiny_gpt2/full/ddm_block", str(block))
        words = shlex.split(line.replace("saves/tiny_gpt2/full/ddm", str(checkpoint)))
        assert run(*words[1:], program=words[0]).stdout.strip()
    (block,) = re.findall(r"```python\n(.*?)```", DOCS["generation"], re.S)
    done = run("-c", block.replace("saves/tiny_gpt2/full/ddm", str(checkpoint)), program=sys.executable)
    assert done.stdout.strip()


@pytest.mark.slow
def test_the_export_runs(checkpoint, adapter, tmp_path):
    places = {
        "saves/tiny_gpt2/full/ddm": checkpoint,
        "saves/tiny_gpt2/lora/ddm_sft": adapter,
        "saves/tiny_gpt2/lora/merged": tmp_path / "merged",
    }
    words = [str(places.get(word, word)) for word in shlex.split(EXPORT)]
    run(*words[1:], program=words[0])
    assert (tmp_path / "merged" / "diffusion_config.json").is_file()


def test_beginnings_to_be_continued_are_those_of_stories():
    """The prefixes of the recipe are beginnings of held-out stories, none of which computes."""
    stories = [json.loads(line)["text"] for line in (ROOT / "data" / "tiny_stories_eval.jsonl").open()]
    held_out = [json.loads(line)["text"] for line in (ROOT / "data" / "tiny_corpus_eval.jsonl").open()]
    assert stories == [text for text in held_out if "=" not in text][:40]
    assert "\neval_dataset: tiny_stories_eval\n" in (ROOT / "examples/tiny_gpt2_prefix_inference.yaml").read_text()
