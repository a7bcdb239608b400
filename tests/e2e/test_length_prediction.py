"""`llamafactory-ddm fit-length`, and every key of the ways to stop early, through the real command line."""

import json
import re
import shutil
import sys

import pytest

from llamafactory_ddm import SamplingSettings, load
from llamafactory_ddm.generation.canvas_size import CanvasSizer
from llamafactory_ddm.integration.predict.fit_length import fit_from_command_line
from llamafactory_ddm.modeling.diffusion_config import DiffusionConfig
from llamafactory_ddm.modeling.length_heads import FILE_NAME, REPORT_NAME, LengthPredictors
from llamafactory_ddm.sampling.length_predictors import PREDICTORS
from llamafactory_ddm.utils.run_lock import run_lock
from support.cli import ROOT, predictions, run, train_here

RECIPE = "examples/varlen_fit_length.yaml"


@pytest.fixture(scope="module")
def words(small_data):
    """Return a function that gives the overrides of a small run on the built-in problems."""
    names = {"dataset": "tiny_problems_train", "eval_dataset": "tiny_problems_eval"}
    names |= {"dataset_dir": small_data, "overwrite_cache": True, "num_train_epochs": 3}
    names |= {"per_device_eval_batch_size": 4, "length_coverage": 0.6}

    def overrides(model, **keys):
        return [f"{key}={value}" for key, value in {**names, "model_name_or_path": model, **keys}.items()]

    return overrides


def fit(*words):
    return run("fit-length", *words, program="llamafactory-ddm", check=False)


@pytest.fixture(scope="module")
def fitted(trained, words, tmp_path_factory):
    """A copy of the trained model with length predictors, and what the command printed."""
    folder = tmp_path_factory.mktemp("fitted") / "model"
    shutil.copytree(trained, folder)
    done = fit(RECIPE, *words(folder))
    assert done.returncode == 0, done.stderr[-3000:]
    return folder, done.stdout


@pytest.fixture
def answers(small_data, tmp_path):
    """Return a function that answers the problems; gives texts and metrics."""

    def answer(model, **keys):
        out = tmp_path / str(len(list(tmp_path.iterdir())))
        small = {"max_samples": 6, "diffusion_steps": 12, "cutoff_len": 64, "overwrite_cache": True}
        small |= {"dataset_dir": small_data, "per_device_eval_batch_size": 4, "logits_temp": 0}
        train_here("tiny_gpt2_sft_inference.yaml", output_dir=out, model_name_or_path=model, **{**small, **keys})
        return predictions(out), json.loads((out / "predict_results.json").read_text())

    return answer


def test_a_model_in_the_hubs_cache_is_refused(trained, words, tmp_path, monkeypatch):
    """Its folder is replaced with the next commit."""
    folder = tmp_path / "models--owner--ours" / "snapshots" / "abc"
    shutil.copytree(trained, folder)
    monkeypatch.setattr(sys, "argv", sys.argv)  # which the command replaces
    with pytest.raises(ValueError, match=r"owner/ours .*model_name_or_path"):
        fit_from_command_line([RECIPE, *words(folder)])
    assert not (folder / FILE_NAME).exists()


def test_a_folder_in_use_is_refused(trained, words, tmp_path, monkeypatch):
    folder = shutil.copytree(trained, tmp_path / "model")
    monkeypatch.setattr(sys, "argv", sys.argv)  # which the command replaces
    with run_lock(folder), pytest.raises(ValueError, match=re.escape(str(folder))):
        fit_from_command_line([RECIPE, *words(folder)])
    assert not (folder / FILE_NAME).exists()


def test_the_predictors_lie_beside_the_model_with_a_report(fitted, trained):
    folder, printed = fitted
    report = json.loads((folder / REPORT_NAME).read_text())
    assert report["length_coverage"] == 0.6 and report["held_out"] == 6
    assert set(PREDICTORS) < set(report)
    for name in PREDICTORS:
        assert f"\n{name} " in printed
        assert 0.0 <= report[name]["not_too_short"] <= 1.0 and report[name]["tokens_saved"] <= report[name]["canvas"]
    assert str(folder / FILE_NAME) in printed
    predictors = LengthPredictors.find(folder)
    assert {name: len(value) for name, value in predictors.min_thresholds.items()} == dict.fromkeys(PREDICTORS, 6)
    assert predictors.heads.width == load(folder).model.config.n_embd
    # The model itself is as it was.
    assert all((folder / path.name).read_bytes() == path.read_bytes() for path in trained.glob("*.safetensors"))


@pytest.mark.slow
def test_fitting_again_gives_the_same_and_its_keys_count(fitted, trained, words, tmp_path):
    """Whatever the batch; and the seed, the learning rate and the epochs make a difference."""
    folder, _ = fitted

    def thresholds(name, **keys):
        shutil.copytree(trained, tmp_path / name)
        done = fit(RECIPE, *words(tmp_path / name, **keys))
        assert done.returncode == 0, done.stderr[-3000:]
        return LengthPredictors.find(tmp_path / name).min_thresholds

    first, again = LengthPredictors.find(folder).min_thresholds, thresholds("again", per_device_eval_batch_size=3)
    for name in PREDICTORS:
        assert again[name].tolist() == pytest.approx(first[name].tolist(), abs=1e-4)
    for key, value in (("seed", 7), ("learning_rate", 0.01), ("num_train_epochs", 1)):
        other = thresholds(key, **{key: value})
        assert other["eos_cdf"].tolist() == pytest.approx(first["eos_cdf"].tolist(), abs=1e-5)
        assert other["regressor"].tolist() != first["regressor"].tolist()


@pytest.mark.slow
def test_each_predictor_changes_the_length_of_the_canvas(fitted, trained, answers):
    folder, _ = fitted
    computed = {}
    for name in PREDICTORS:
        for coverage in (0.3, 0.8):
            keys = {"early_stop": "predict", "length_predictor": name, "length_coverage": coverage}
            computed[name, coverage] = answers(folder, **keys)[1]["predict_computed_tokens"]
        assert computed[name, 0.3] <= computed[name, 0.8]
    assert len({computed[name, 0.3] for name in PREDICTORS}) >= 3
    assert any(computed[name, 0.3] < computed[name, 0.8] for name in PREDICTORS)
    generator = load(folder)  # finds them too
    settings = SamplingSettings(early_stop="predict", length_predictor="regressor", length_coverage=0.5)
    whole = 64 - len(generator.from_prompt("Tom has", 1)) + 1
    assert len(generator.generate("Tom has", max_new_tokens=whole, settings=settings, raw=True)) == 1
    with pytest.raises(ValueError, match=r"length_predictor: regressor .*cutoff_len: 64"):
        generator.generate("Tom has", max_new_tokens=whole - 1, settings=settings, raw=True)
    with pytest.raises(ValueError, match=r"cutoff_len: 64.* 80 tokens"):
        answers(folder, early_stop="predict", length_predictor="regressor", cutoff_len=80)
    with pytest.raises(ValueError, match=r"length_predictor: regressor .*fit-length"):
        answers(trained, early_stop="predict", length_predictor="regressor")


@pytest.mark.slow
def test_eos_cdf_reports_where_it_is_not_calibrated(fitted, answers, caplog):
    folder, _ = fitted
    answers(folder, early_stop="predict", cutoff_len=80)
    (line,) = (record.getMessage() for record in caplog.records if "length_predictor: eos_cdf" in record.getMessage())
    assert "cutoff_len: 64" in line and "length_coverage" in line
    caplog.clear()
    answers(folder, early_stop="predict")
    assert "length_predictor: eos_cdf" not in caplog.text


@pytest.mark.slow
def test_the_blocks_of_a_checkpoint_are_those_of_generation(finetune, answers, tmp_path):
    """No key of the YAML repeats pad_block_length, and a run that does not train changes nothing of the checkpoint."""
    keys = {"variable_length": "eos_pad", "pad_block_length": 16, "pad_extra_blocks": 1}
    model = finetune(tmp_path / "model", **keys)
    before = (model / "diffusion_config.json").read_text()
    stored = DiffusionConfig.load(model).variable_length
    assert (stored.block, stored.extra, stored.canvas) == (16, 1, 64)
    seen = []
    rounded = CanvasSizer.rounded

    def watched(self, canvas, n):
        result = rounded(self, canvas, n)
        seen.append(len(result))
        return result

    CanvasSizer.rounded = watched
    try:
        answers(model, early_stop="predict", length_coverage=0.001)
        assert seen and all(length % 16 == 0 for length in seen)
        seen.clear()
        answers(model, early_stop="grow", length_coverage=0.001)
        assert seen and all(length % 16 == 0 for length in seen)
    finally:
        CanvasSizer.rounded = rounded
    assert (model / "diffusion_config.json").read_text() == before
    more = finetune(tmp_path / "more", model_name_or_path=model)
    assert DiffusionConfig.load(more).variable_length == stored
    other = finetune(tmp_path / "other", model_name_or_path=model, pad_block_length=8)
    assert DiffusionConfig.load(other).variable_length.extra is None


@pytest.mark.slow
def test_predictors_of_old_weights_are_removed(fitted, small_data, tmp_path, caplog):
    folder = tmp_path / "model"
    shutil.copytree(fitted[0], folder)
    keys = {"max_steps": 1, "per_device_train_batch_size": 2, "cutoff_len": 64, "overwrite_cache": True}
    keys |= {"dataset_dir": small_data, "eval_strategy": "no", "plot_loss": False, "warmup_steps": 0}
    train_here("tiny_gpt2_full_ddm_sft.yaml", model_name_or_path=fitted[0], output_dir=folder, **keys)
    assert not (folder / FILE_NAME).exists() and not (folder / REPORT_NAME).exists()
    assert re.search(f"{FILE_NAME} .*fit-length", caplog.text)
    assert (fitted[0] / FILE_NAME).is_file()


@pytest.mark.slow
def test_an_adapter_and_documents(checkpoint, finetune, train_small, words, tmp_path):
    """Predictors of an adapter lie beside the adapter; those of documents are fitted after random positions."""
    adapter = finetune(tmp_path / "adapter", recipe="tiny_gpt2_lora_ddm_sft.yaml", variable_length="eos_eos")
    done = fit(RECIPE, *words(checkpoint, adapter_name_or_path=adapter, finetuning_type="lora"))
    assert done.returncode == 0, done.stderr[-3000:]
    assert (adapter / FILE_NAME).is_file() and not (checkpoint / FILE_NAME).exists()
    assert load(adapter).sizer.lengths.canvas == 64
    documents = train_small(tmp_path / "documents", packing=False, cutoff_len=64, variable_length="eos_pad")
    keys = {"stage": "ddm", "dataset": "tiny_corpus_train", "val_size": 30, "cutoff_len": 64}
    overrides = [word for word in words(documents, **keys) if not word.startswith("eval_dataset")]
    recipe = tmp_path / "documents.yaml"
    lines = (ROOT / RECIPE).read_text().splitlines()
    recipe.write_text("\n".join(line for line in lines if not line.startswith(("template", "eval_dataset"))))
    done = fit(recipe, *overrides)
    assert done.returncode == 0, done.stderr[-3000:]
    assert json.loads((documents / REPORT_NAME).read_text())["held_out"] > 1


@pytest.mark.slow
@pytest.mark.parametrize(
    ("keys", "fragment"),
    [
        ({"do_train": True}, ": do_train: true"),
        ({"eval_dataset": "null"}, ": eval_dataset: "),
        ({"dataset": "null"}, ": dataset: "),
        ({"model_name_or_path": "data/tiny_gpt2"}, "diffusion_config.json"),
        ({"model_name_or_path": "nowhere/at/all"}, "nowhere/at/all"),
        ({"stage": "sft"}, "stage is sft"),
        ({"length_predictr": "eos_cdf"}, "length_predictr"),
        ({"eval_dataset": "tiny_nothing"}, "tiny_nothing"),
        ({"max_samples": 3}, ": eval_dataset: 3 "),
        ({"variable_length": "none"}, ": variable_length: "),
        ({"streaming": True, "max_steps": 5}, ": streaming: true"),
    ],
    ids=str,
)
def test_mistakes_are_explained(keys, fragment, trained, finetuned, words, tmp_path):
    model = finetuned if "variable_length" in keys else trained
    done = fit(RECIPE, *words(**{"model": model, **keys}))
    assert done.returncode == 1
    last = [line for line in done.stderr.splitlines() if line.startswith("llamafactory-ddm fit-length: ")]
    assert len(last) == 1 and fragment in last[0], done.stderr[-2000:]
    assert "Traceback" not in done.stderr
    assert not (trained / FILE_NAME).exists()


@pytest.mark.slow
def test_the_prompt_is_never_part_of_the_answer(fitted, trained, words, tmp_path):
    """train_on_prompt and keys of training change nothing; those of training are logged."""
    shutil.copytree(trained, tmp_path / "model")
    done = fit(RECIPE, *words(tmp_path / "model", train_on_prompt=True, warmup_steps=3))
    assert done.returncode == 0, done.stderr[-3000:]
    assert any(
        "warmup_steps" in line and "length_coverage" in line for line in (done.stdout + done.stderr).splitlines()
    )
    one, two = (LengthPredictors.find(folder).min_thresholds for folder in (fitted[0], tmp_path / "model"))
    assert one["regressor"].tolist() == pytest.approx(two["regressor"].tolist(), abs=1e-4)


def test_usage_and_a_missing_yaml():
    assert fit("--help").returncode == 0 and "usage: llamafactory-ddm fit-length" in fit("--help").stdout
    assert fit().returncode == 2 and fit("--model_name_or_path", "x").returncode == 2
    missing = fit("nowhere.yaml")
    assert missing.returncode == 1 and "nowhere.yaml" in missing.stderr and "Traceback" not in missing.stderr


def test_growing(trained, answers):
    """The model predicts padding everywhere, so few positions are enough; grow_length decides how many."""
    grow = {"early_stop": "grow", "grow_length": 8, "length_coverage": 0.05}
    _, whole = answers(trained, early_stop="none")
    _, small = answers(trained, **grow, eos_penalty=-50.0)
    assert small["predict_computed_tokens"] < whole["predict_computed_tokens"]
    texts, grown = answers(trained, **grow)
    again, _ = answers(trained, **grow, per_device_eval_batch_size=1)
    assert again == texts  # whatever the batch
    _, larger = answers(trained, **{**grow, "grow_length": 30})
    assert larger["predict_computed_tokens"] != grown["predict_computed_tokens"]
    _, sure = answers(trained, **{**grow, "length_coverage": 1.0})
    assert sure["predict_computed_tokens"] > grown["predict_computed_tokens"]  # nothing is ever certain


@pytest.mark.slow
def test_eos_penalty_and_eos_last(trained, answers):
    """Greedily and most confident first, the model ends its texts at once; not with eos_penalty or eos_last."""
    keys = {"denoising_strategy": "low_confidence", "diffusion_steps": 24}
    texts, _ = answers(trained, **keys)
    penalised, _ = answers(trained, **keys, eos_penalty=50.0)
    assert sum(map(len, penalised)) > sum(map(len, texts))
    assert all(len(text) > 20 for text in penalised)
    early, _ = answers(trained, **keys, eos_penalty=-50.0)
    assert early == [""] * 6
    drawn = {**keys, "logits_temp": 1.0, "topp_temp": 1.0}
    (soon, _), (late, _) = answers(trained, **drawn), answers(trained, **drawn, eos_last=True)
    assert sum(map(len, late)) > sum(map(len, soon))


@pytest.mark.slow
@pytest.mark.parametrize(
    ("keys", "pattern"),
    [
        ({"early_stop": "gow"}, "^early_stop .*'gow'.*'grow'"),
        ({"length_predictor": "eos_cdff"}, "^length_predictor .*'eos_cdff'.*'eos_cdf'"),
        ({"length_predictor": "belief"}, "^length_predictor: belief .*length_predictor: eos_cdf"),
        ({"length_predictor": "expected"}, "length_predictor: expected .*early_stop: predict"),
        ({"grow_length": 8}, "grow_length: 8 .*early_stop: grow"),
        ({"length_coverage": 0.5}, "length_coverage: 0.5 .*early_stop: predict"),
        ({"early_stop": "grow", "grow_length": 0}, "^grow_length .*0"),
        ({"eos_last": True, "denoising_strategy": "random"}, "eos_last: true .*denoising_strategy"),
        ({"early_stop": "grow", "guidance_scale": 2.0}, "early_stop: grow .*guidance_scale: 2.0"),
        ({"early_stop": "predict", "guidance_scale": 2.0}, "early_stop: predict .*guidance_scale: 2.0"),
        ({"eos_penalty": "much"}, "^eos_penalty .*'much'"),
    ],
    ids=str,
)
def test_keys_that_do_not_fit(keys, pattern, trained, answers):
    with pytest.raises(ValueError, match=pattern):
        answers(trained, **keys)
