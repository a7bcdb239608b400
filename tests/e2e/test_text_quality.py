"""`llamafactory-ddm quality` and `llamafactory-ddm plot-loss` by their real command line, on models of a few steps."""

import json
import re
import shlex

import pytest
from omegaconf import OmegaConf

from support.cli import ROOT, run

RECIPE = ROOT / "examples" / "eval" / "tiny_gpt2_quality.yaml"
PAGE = (ROOT / "docs" / "generation_quality.md").read_text(encoding="utf-8")


@pytest.mark.slow
def test_the_recipe_runs(checkpoint, tmp_path):
    small = (f"models.diffusion={checkpoint}", "n_texts=2", "length=8", "seed=[0,1]", "diffusion_steps=[2,4]")
    done = run("quality", RECIPE, *small, f"save_dir={tmp_path}", program="llamafactory-ddm")
    assert done.stdout.count("\n| diffusion | ") == 6 and done.stdout.count("\n| autoregressive | ") == 1
    assert len((tmp_path / "texts.jsonl").read_text().splitlines()) == 28
    record = json.loads((tmp_path / "quality.json").read_text())
    assert record["keys"]["logits_temp"] == 1 and len(record["results"]) == 14
    again = run("quality", RECIPE, *small, f"save_dir={tmp_path}", program="llamafactory-ddm")
    assert again.stdout == done.stdout


@pytest.mark.slow
def test_an_adapter_is_a_model(adapter, tmp_path):
    small = ("n_texts=2", "length=8", "seed=0", "diffusion_steps=2", "denoising_strategy=random")
    places = (f"models.diffusion={{adapter_name_or_path: {adapter}}}", f"save_dir={tmp_path}")
    done = run("quality", RECIPE, *small, *places, program="llamafactory-ddm")
    assert done.stdout.count("\n| diffusion | ") == 1
    assert json.loads((tmp_path / "quality.json").read_text())["models"]["diffusion"]["adapter"] == str(adapter)


@pytest.mark.slow
def test_the_plot_of_the_page_is_drawn(checkpoint, finetuned, tmp_path):
    (command,) = re.findall(r"^llamafactory-ddm plot-loss .*$", PAGE, re.M)
    out = tmp_path / "loss.png"
    places = {"ddm_sft": finetuned, "ddm": checkpoint}
    words = [re.sub(r"saves/tiny_gpt2/full/(\w+)", lambda m: str(places[m[1]]), word) for word in shlex.split(command)]
    words = [str(out) if word.endswith(".png") else word for word in words]
    assert "loss,eval_loss" in words
    words[words.index("loss,eval_loss")] = "loss,nll"  # these runs have no evaluation
    assert "saved" in run(*words[1:], program="llamafactory-ddm").stdout
    assert out.stat().st_size > 5000


def test_the_table_of_the_page_is_that_of_the_recipe():
    """A row for each strategy and number of steps, and one of the autoregressive model."""
    keys = OmegaConf.load(RECIPE)
    rows = re.findall(r"^\| diffusion \| (\w+) \| (\d+) \| ", PAGE, re.M)
    expected = [(name, str(steps)) for name in keys.denoising_strategy for steps in keys.diffusion_steps]
    assert rows == expected and PAGE.count("\n| autoregressive | ") >= 1
    assert f"{keys.n_texts} texts of up to {keys.length} tokens" in PAGE
    for name in re.findall(r"\]\((\w+\.png)\)", PAGE):
        assert (ROOT / "docs" / name).stat().st_size <= 60_000, name


@pytest.mark.parametrize("word", [f"examples/eval/{RECIPE.name}", "Hardware:", "Time:", "Result:", "Before:"])
def test_the_header_says_what_a_user_wants_to_know(word):
    assert word in RECIPE.read_text().split("\n\n")[0]
