"""The scripts that make tables and plots for README and docs/ run, on models of a few steps."""

import json
import re

import pytest

from support.browser import CHROMIUM
from support.cli import run


@pytest.mark.slow
def test_the_comparisons_of_docs_are_made(checkpoint, finetuned, tmp_path):
    models = ("--adapted", checkpoint, "--finetuned", finetuned, "--earlier", finetuned, "--samples", "2")
    run(*models, "--work", tmp_path / "work", "--out", tmp_path / "docs", program="docs/make_comparison.py")
    page = (tmp_path / "docs" / "comparison_table.md").read_text()
    assert page.count("### Differences on the same documents") == 2 and "| AUP |" in page
    assert (tmp_path / "docs" / "parallelism.png").stat().st_size > 5000


# Runs scripts in one process, which starts a single fork server for their trainings.
DRIVER = """
import json, runpy, sys
sys.path.insert(0, "docs")
for words in json.loads(sys.argv[1]):
    sys.argv = words
    runpy.run_path(words[0], run_name="__main__")
"""


@pytest.mark.slow
def test_the_scripts_of_docs_run(checkpoint, tmp_path):
    one = ("--steps", "1", "--seeds", "1")
    calls = {
        "make_trace": (checkpoint, "--length", "8", "--steps", "4", "--show", "2"),
        "make_adaptation_table": (
            *one,
            "--variants",
            "1",
            "--out",
            tmp_path / "page.md",
            "--override",
            "cutoff_len=16",
        ),
        "make_ends_table": (
            *("--steps", "2", "--questions", "2", "--only", "none", "rainbow-annealed-window", "--model", checkpoint),
            *("--out", tmp_path),
        ),
        "make_finetuning_plot": (
            *("--steps", "1", "--every", "1", "--problems", "2", "--starts", "1", "--model", checkpoint),
            *("--out", tmp_path / "docs"),
        ),
        "make_mixed_table": (
            *("--continue-steps", "1", "--seeds", "1", "--denoising-steps", "2", "--questions", "2", "--texts", "2"),
            *("--model", checkpoint, "--out", tmp_path / "docs"),
        ),
        "make_block_table": (
            *(*one, "--rows", "16", "--blocks", "4", "--questions", "2", "--texts", "8", "--out", tmp_path),
        ),
    }
    words = [[f"docs/{name}.py", *map(str, rest)] for name, rest in calls.items()]
    for line in words[1:]:
        line += ["--work", str(tmp_path / line[0])]
    driver = tmp_path / "driver.py"
    driver.write_text(DRIVER)
    done = run(json.dumps(words), program=driver)

    assert re.findall("^step  +[0-9]+", done.stdout, re.M) == ["step   1", "step   4"]
    assert "| autoregressive | yes | yes |" in (tmp_path / "page.md").read_text()
    assert (tmp_path / "ends_table.md").read_text().count("| rainbow | yes | yes |") == 1
    assert "| adapted weights, full | " in (tmp_path / "docs" / "finetuning_table.md").read_text()
    assert (tmp_path / "docs" / "finetuning.png").stat().st_size > 5000
    assert (tmp_path / "docs" / "mixed_table.md").read_text().count("| mixed, with edits | ") == 3
    assert (tmp_path / "docs" / "mixed.png").stat().st_size > 5000
    lines = (tmp_path / "block_table.md").read_text().splitlines()
    names = ["autoregressive", "blocks of 4", "full attention, kv_cache: none", "full attention, kv_cache: dual"]
    assert [line.split(" | ")[0] for line in lines[2:]] == [f"| {name}" for name in names]
    assert all(line.count("|") == 8 and "nan" not in line for line in lines)


@pytest.mark.slow
def test_the_figures_of_readme_are_measured(tmp_path):
    """One step of each recipe, and a second call that repeats nothing and writes the same page."""
    words = ("--threads", "1", "--seeds", "7", "--steps", "1", "--samples", "2", "--work", tmp_path / "work")
    pages = []
    for name in ("first.md", "again.md"):
        run(*words, "--out", tmp_path / name, program="docs/make_readme_figures.py")
        pages.append((tmp_path / name).read_text())
    (row,) = re.findall(r"^\| 1 \| 7 \| (.*) \|$", pages[0], re.M)
    cells = row.split(" | ")
    assert len(cells) == 7 and 4 < float(cells[0]) < 20
    assert all(0 <= float(cell.removesuffix(" %")) <= 100 for cell in cells[1:4])
    assert pages[0] == pages[1]


@pytest.mark.slow
@pytest.mark.skipif(CHROMIUM is None, reason="neither chromium nor google-chrome is on this machine")
def test_the_picture_of_the_web_chat_is_made(checkpoint, tmp_path):
    pytest.importorskip("playwright", reason="pip install playwright to make the picture")
    run(checkpoint, "--output", tmp_path / "page.png", program="docs/make_serving_picture.py", fresh=True)
    assert (tmp_path / "page.png").stat().st_size > 5000
