"""`llamafactory-ddm compare` as a user runs it: recipes, several processes, and errors, on models of a few steps."""

import json

import pytest

pytest.importorskip("lm_eval")

from support.cli import ROOT, SCRIPTS, in_processes, run

RECIPES = {path.name: path for path in (ROOT / "examples" / "eval").glob("*.yaml")}
SMALL = ("max_samples=3", "likelihood_samples=16", "batch_size=4")


@pytest.fixture(scope="module")
def words(checkpoint, finetuned):
    """The words of a small comparison for each recipe, without its folder."""
    models = f"models.finetuned.model_name_or_path={finetuned}"
    return {
        "tiny_gpt2_compare.yaml": (*SMALL, models, f"models.adapted.model_name_or_path={checkpoint}"),
        "tiny_gpt2_sweep.yaml": (*SMALL, models, f"models.step 800.model_name_or_path={finetuned}"),
    }


def test_every_recipe_of_a_comparison_is_exercised():
    compared = {name for name, path in RECIPES.items() if "llamafactory-ddm compare" in path.read_text()}
    assert compared == {"tiny_gpt2_compare.yaml", "tiny_gpt2_sweep.yaml"}


@pytest.mark.slow
@pytest.mark.parametrize("name", ["tiny_gpt2_compare.yaml", "tiny_gpt2_sweep.yaml"])
def test_the_recipe_runs_and_runs_again(name, words, tmp_path):
    command = ("compare", RECIPES[name], *words[name], f"save_dir={tmp_path}")
    done = run(*command, program="llamafactory-ddm")
    record = json.loads((tmp_path / "comparison.json").read_text())
    assert (tmp_path / "comparison.md").read_text() in done.stdout
    n_models = 3 if name == "tiny_gpt2_compare.yaml" else 2 * 4
    assert len(record["evaluations"]) == n_models and record["differences"]
    assert (tmp_path / "parallelism.png").is_file() == (name == "tiny_gpt2_sweep.yaml")
    files = {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}
    again = run(*command, program="llamafactory-ddm")
    assert done.stdout.endswith(again.stdout)  # the harness says more while it evaluates
    assert {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()} == files


@pytest.mark.slow
def test_two_processes_give_the_results_of_one(words, tmp_path):
    keys = (*words["tiny_gpt2_sweep.yaml"], "sweep.diffusion_steps=[2,1]", "max_samples=5")
    run("compare", RECIPES["tiny_gpt2_sweep.yaml"], *keys, f"save_dir={tmp_path / 'one'}", program="llamafactory-ddm")
    program = SCRIPTS / "llamafactory-ddm"
    in_processes(2, program, "compare", RECIPES["tiny_gpt2_sweep.yaml"], *keys, f"save_dir={tmp_path / 'two'}")
    one, two = (json.loads((tmp_path / name / "comparison.json").read_text()) for name in ("one", "two"))
    assert all(one[part] == two[part] for part in ("results", "differences", "parallelism"))


@pytest.mark.slow
def test_the_command_line(words, tmp_path):
    done = run("compare", program="llamafactory-ddm", check=False)
    assert done.returncode == 2 and "x.yaml" in done.stderr
    assert "docs/keys.md" in run("compare", "--help", program="llamafactory-ddm").stdout
    recipe, folder = RECIPES["tiny_gpt2_compare.yaml"], f"save_dir={tmp_path / 'out'}"
    for more, env, error in (
        (("task=absent",), {}, "models: adapted"),
        (("sweep.diffusion_stps=[1]",), {}, "sweep: diffusion_stps"),
        (
            (*words["tiny_gpt2_compare.yaml"], "task=tiny_problems"),
            {"WORLD_SIZE": "2"},
            "models: autoregressive: kind: ar",
        ),
    ):
        done = run("compare", recipe, folder, *more, program="llamafactory-ddm", check=False, env=env)
        last = done.stderr.strip().splitlines()[-1]
        assert done.returncode == 1 and last.startswith(f"llamafactory-ddm compare: {error}"), last
    assert not (tmp_path / "out").exists()
