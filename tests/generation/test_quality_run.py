"""`llamafactory-ddm quality` on tiny models: results, keys, resuming, and what a user can get wrong."""

import json
import math
import shutil
from pathlib import Path

import pytest
from transformers import AutoTokenizer

from llamafactory_ddm.cli.quality import main
from llamafactory_ddm.evaluation.quality import Estimate
from llamafactory_ddm.generation import quality_run
from llamafactory_ddm.generation.quality_keys import read_keys
from llamafactory_ddm.generation.quality_report import figure, grouped, page, spread, table
from support.tiny import save_pair


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    return save_pair(tmp_path_factory.mktemp("models"))


@pytest.fixture
def base(folders, tmp_path):
    ar, ddm = map(str, folders)
    return {
        "models": {"ddm": ddm, "ar": {"model_name_or_path": ar, "kind": "ar"}},
        "judge_model": ar,
        "n_texts": 3,
        "length": 8,
        "diffusion_steps": [1, 4],
        "denoising_strategy": ["random", "low_confidence"],
        "temperature": 1,
        "top_p": 1,
        "save_dir": str(tmp_path / "out"),
    }


def outcomes_of(values, **changes):
    values = {**values, **changes}
    return quality_run.compare(*read_keys({name: value for name, value in values.items() if value is not None}))[0]


def texts_of(outcomes):
    return {(o.model, o.strategy, o.steps, o.seed): [text.text for text in o.texts] for o in outcomes}


def numbers_of(outcomes):
    return [each and each.value for outcome in outcomes for each in outcome.numbers.values()]


def check_figure(outcomes):
    """Each curve shows its numbers."""
    drawn = figure(outcomes)
    assert [axes.get_xscale() for axes in drawn.axes] == ["log"] * 3 and drawn.axes[0].get_yscale() == "log"
    for axes, name in zip(drawn.axes, ("perplexity", "distinct_2", "entropy"), strict=True):
        labels = {container.get_label(): container.lines[0] for container in axes.containers}
        assert set(labels) == {"random", "low_confidence"}
        expected = [o.numbers[name].value for o in outcomes if o.strategy == "random"]
        assert labels["random"].get_xdata().tolist() == [1, 4]
        assert labels["random"].get_ydata().tolist() == pytest.approx(expected)
        (line,) = (line for line in axes.lines if line.get_label() == "ar")
        assert line.get_ydata()[0] == pytest.approx(outcomes[-1].numbers[name].value)


def test_every_setting_has_its_texts_and_numbers(base, tmp_path):
    outcomes, record = quality_run.compare(*read_keys(base))
    settings = [(outcome.model, outcome.strategy, outcome.steps) for outcome in outcomes]
    pairs = [(strategy, steps) for strategy in ("random", "low_confidence") for steps in (1, 4)]
    assert settings == [*(("ddm", *pair) for pair in pairs), ("ar", None, None)]
    assert [outcome.forwards for outcome in outcomes if outcome.steps == 1] == [1.0, 1.0]
    quality_run.save(outcomes, record, tmp_path / "out")
    rows = [json.loads(line) for line in (tmp_path / "out" / "texts.jsonl").read_text().splitlines()]
    assert len(rows) == 15 and [row["index"] for row in rows[:3]] == [0, 1, 2]
    saved = json.loads((tmp_path / "out" / "quality.json").read_text())
    assert saved["judge"]["shares_tokenizer_with"] == ["ddm", "ar"]  # but for the mask token
    assert saved["models"]["ddm"]["weights"] != saved["models"]["ar"]["weights"] == saved["judge"]["weights"]
    for result in saved["results"]:
        own = [row for row in rows if all(row[name] == result[name] for name in ("model", "strategy", "steps"))]
        nats, tokens = sum(row["nll"] for row in own), sum(row["scored_tokens"] for row in own)
        assert result["perplexity"]["value"] == pytest.approx(math.exp(nats / tokens))
    assert (tmp_path / "out" / "quality.png").read_bytes()[1:4] == b"PNG"
    check_figure(outcomes)
    written = (tmp_path / "out" / "quality.md").read_text()
    assert written.count("\n| ddm | ") == 4 and written.count("\n- ") == 5
    assert next(line for line in rows if line["strategy"] == "random")["text"].split("\n")[0] in written


def test_texts_are_the_same_for_any_batch_and_after_an_interruption(base, monkeypatch, tmp_path):
    whole = outcomes_of(base, save_dir=str(tmp_path / "whole"))
    one = outcomes_of(base, save_dir=str(tmp_path / "one"), batch_size=1)
    assert texts_of(whole) == texts_of(one)
    assert numbers_of(one) == pytest.approx(numbers_of(whole), rel=1e-4)
    sample, calls = quality_run._DiffusionWriter.write, []

    def interrupted(self, settings, indices):
        calls.append(list(indices))
        if len(calls) == 3:
            raise KeyboardInterrupt
        return sample(self, settings, indices)

    monkeypatch.setattr(quality_run._DiffusionWriter, "write", interrupted)
    with pytest.raises(KeyboardInterrupt):
        outcomes_of(base, batch_size=2)
    assert calls == [[0, 1], [2], [0, 1]]
    again = outcomes_of(base, batch_size=2)
    assert calls[3:5] == [[0, 1], [2]] and len(calls) == 9
    assert texts_of(again) == texts_of(whole)
    more = outcomes_of(base, n_texts=4)
    assert all(part == [3] for part in calls[9:]) and len(more[0].texts) == 4
    outcomes_of(base, batch_size=2, length=7)
    assert len(calls) == 21


@pytest.mark.slow
@pytest.mark.parametrize(
    "change",
    [
        {"temperature": 0.3},
        {"top_p": 0.5},
        {"top_k": 2},
        {"length": 5},
        {"seed": 1},
        {"infer_dtype": "bfloat16"},
        {"repetition_penalty": 2},
        {"suppress_tokens": "cat,a"},
        {"eos_penalty": -20},
    ],
    ids=lambda change: next(iter(change)),
)
def test_a_key_changes_the_texts_of_every_model(base, change):
    base["diffusion_steps"], base["denoising_strategy"] = 4, "low_confidence"
    before, after = texts_of(outcomes_of(base)), texts_of(outcomes_of(base, **change))
    for (one, old), (other, new) in zip(before.items(), after.items(), strict=True):
        assert one[:3] == other[:3] and old != new


@pytest.mark.slow
def test_a_key_of_one_strategy_is_for_that_strategy(base):
    base |= {"models": {"ddm": base["models"]["ddm"]}, "diffusion_steps": 4}
    base["denoising_strategy"] = ["random", "confidence_threshold"]
    few, many = (outcomes_of(base, confidence_threshold=value) for value in (0.01, 1))
    assert few[0].texts == many[0].texts and few[1].forwards < many[1].forwards
    blocks = outcomes_of(base, block_length=2)
    assert texts_of(blocks) != texts_of(many)


@pytest.mark.slow
def test_a_single_model_and_a_plugin(base, folders, tmp_path):
    base |= {"models": None, "denoising_strategy": None, "diffusion_steps": None}
    (ar,) = outcomes_of(base, model_name_or_path=str(folders[0]), kind="ar")
    assert (ar.model, ar.kind, ar.steps) == ("ar", "ar", None)
    (ddm,) = outcomes_of(base, model_name_or_path=str(folders[1]))
    assert (ddm.strategy, ddm.steps) == ("low_confidence", 64)
    (tmp_path / "mine.py").write_text("raise ValueError('the plugin ran')")
    with pytest.raises(ValueError, match="the plugin ran"):
        outcomes_of(base, model_name_or_path=str(folders[1]), plugins=str(tmp_path / "mine.py"))


@pytest.mark.slow
def test_another_judge_gives_other_numbers(base, folders, tmp_path):
    save_pair(tmp_path / "others", positions=16)
    one, other = (outcomes_of(base, judge_model=str(path / "ar")) for path in (folders[0].parent, tmp_path / "others"))
    assert texts_of(one) == texts_of(other)
    assert one[0].numbers["perplexity"] != other[0].numbers["perplexity"]
    assert one[0].numbers["distinct_2"] == other[0].numbers["distinct_2"]


def test_several_seeds_are_shown_as_a_range(base):
    outcomes = outcomes_of(base, seed=[0, 1], diffusion_steps=2, denoising_strategy="random")
    (ddm, ar) = grouped(outcomes)
    assert [outcome.seed for outcome in ddm] == [0, 1] and len(ar) == 2
    assert [text.text for text in ddm[0].texts] != [text.text for text in ddm[1].texts]
    values = [outcome.numbers["entropy"].value for outcome in ddm]
    found = spread(ddm, "entropy")
    assert (found.low, found.high, found.is_range) == (min(values), max(values), True)
    assert found.value == pytest.approx(sum(values) / 2)
    assert f" {found.low:.2f} to {found.high:.2f} " in table(outcomes)
    record = {"keys": {"n_texts": 3, "length": 8}, "judge": {"judge_model": "judge"}}
    assert "2 seeds" in page(outcomes, record)


@pytest.mark.parametrize("value", [0.1, 1 / 3, 0.7, 1.1, 4.9, 123.4])
def test_seeds_of_equal_numbers_are_drawn(value):
    """Their mean may differ from them by a rounding error, but a bar has no negative length."""
    numbers = {name: Estimate(value, None) for name in ("perplexity", "distinct_2", "entropy")}
    outcomes = [quality_run.Outcome("a", "diffusion", "random", 4, seed, (), (), numbers) for seed in range(3)]
    assert spread(outcomes, "entropy").value == value
    figure(outcomes)


def test_names_with_signs_of_their_own_in_tables_and_plots():
    numbers = {name: Estimate(1.0, None) for name in ("perplexity", "distinct_2", "entropy")}
    numbers |= dict.fromkeys(("nats_per_byte", "distinct_1", "repetition_4", "tokens"))
    text = (quality_run.Text("a", 1),)
    names = ("_x", "a|b\nc", "$x{$")
    outcomes = [quality_run.Outcome(name, "ar", None, None, 0, text, (), numbers) for name in names]
    drawn = figure(outcomes)
    drawn.draw_without_rendering()
    assert [label.get_text() for label in drawn.legends[0].get_texts()] == [" _x", "a|b\nc", r"\$x{\$"]
    rows = table(outcomes).splitlines()
    assert len(rows) == 5 and rows[3].startswith(r"| a\|b c | ")


def test_texts_of_another_config_or_end_are_not_used_again(base, folders, tmp_path):
    keys = {**base, "models": None, "kind": "ar", "diffusion_steps": None, "denoising_strategy": None}
    whole = outcomes_of(keys, model_name_or_path=str(folders[0]))[0]
    shutil.copytree(folders[0], tmp_path / "heads")
    config = json.loads((tmp_path / "heads" / "config.json").read_text())
    (tmp_path / "heads" / "config.json").write_text(json.dumps({**config, "n_head": 4}))
    assert outcomes_of(keys, model_name_or_path=str(tmp_path / "heads"))[0].texts != whole.texts
    shutil.copytree(folders[0], tmp_path / "end")
    tokenizer = AutoTokenizer.from_pretrained(folders[0])
    letter = next(letter for text in whole.texts for letter in text.text if letter.isascii() and letter.isprintable())
    tokenizer.eos_token = tokenizer.tokenize(letter)[0]
    tokenizer.save_pretrained(tmp_path / "end")
    ended = outcomes_of(keys, model_name_or_path=str(tmp_path / "end"))[0]
    assert ended.texts != whole.texts and not any(letter in text.text for text in ended.texts)
    shutil.copytree(folders[0], tmp_path / "copy")
    size = (Path(base["save_dir"]) / "requests-0.jsonl").stat().st_size
    assert outcomes_of(keys, model_name_or_path=str(tmp_path / "copy"))[0].texts == whole.texts
    assert (Path(base["save_dir"]) / "requests-0.jsonl").stat().st_size == size


def test_a_number_with_its_error():
    numbers = {"entropy": Estimate(2.0, 0.25), "perplexity": None, "tokens": Estimate(4.0, None)}
    one = quality_run.Outcome("ar", "ar", None, None, 0, (), (), numbers)
    assert f"{spread([one], 'entropy'):.2f}" == "2.00 ± 0.25"
    assert f"{spread([one], 'tokens'):.3g}" == "4"
    assert spread([one], "perplexity") is None


@pytest.mark.parametrize(
    ("change", "error"),
    [
        ({"judge_model": None}, "judge_model is missing"),
        ({"judge_model": "DDM"}, "judge_model: .*diffusion model"),
        ({"judge_model": "./absent"}, "judge_model: ./absent is not a folder"),
        ({"judge_model": "EMPTY"}, "judge_model: the config of .* cannot be read"),
        ({"save_dir": None}, "save_dir is missing"),
        ({"save_dir": "FILE"}, "save_dir: .* is not a folder"),
        ({"models": None}, "model_name_or_path is missing.*models"),
        ({"models": {"x": "AR"}}, r"models\.x: .*kind: ar"),
        (
            {"models": {"x": {"model_name_or_path": "DDM", "kind": "ar"}, "y": "DDM"}},
            r"models\.x: .*diffusion model.*kind",
        ),
        ({"models": {"x": {"model_name_or_path": "DDM", "kind": "arr"}}}, r"models\.x\.kind .*diffusion, ar"),
        ({"models": {"x": {"model_name": "DDM"}}}, r"models\.x\.model_name .*'model_name_or_path'"),
        ({"models": {"x": {"kind": "ar"}}}, r"models\.x lacks model_name_or_path"),
        ({"models": {"x": 3}}, r"models\.x: 3"),
        ({"models": ["DDM"]}, "models must be a mapping"),
        ({"models": {"x": "./absent"}}, r"models\.x: ./absent is not a folder"),
        ({"models": {"x": {"adapter_name_or_path": "DDM"}}}, r"models\.x: .*adapter_config\.json"),
        ({"model_name_or_path": "DDM"}, "models and model_name_or_path"),
        ({"kind": "ar"}, "models and kind"),
        ({"n_text": 3}, "n_text .*'n_texts'"),
        ({"n_texts": 0}, "n_texts"),
        ({"length": 48}, r"length: 48 needs 49 positions.*models\.ddm has 48"),
        ({"length": 48, "models": {"x": {"model_name_or_path": "AR", "kind": "ar"}}}, None),
        ({"diffusion_steps": []}, "diffusion_steps is an empty list"),
        ({"diffusion_steps": [4, "4"]}, "diffusion_steps: .*twice"),
        ({"diffusion_steps": [4, 0]}, "diffusion_steps must be at least 1.*0"),
        ({"denoising_strategy": ["random", "randm"]}, "denoising_strategy.*'random'"),
        ({"temperature": [0, 1]}, "logits_temp: .*is a list"),
        ({"logits_temp": 1}, "logits_temp"),
        ({"temperature": -1}, "logits_temp"),
        ({"entropy_bound": 0.3}, "entropy_bound .*denoising_strategy: entropy_bound"),
        ({"grow_length": 3}, "grow_length.*early_stop"),
        ({"suppress_tokens": "zebra"}, "zebra"),
        ({"suppress_tokens": 9999}, r"models\.ddm: suppress_tokens: 9999"),
        ({"suppress_tokens": {"a": 1}}, r"models\.ddm: suppress_tokens: .*no token"),
        ({"models": {"": "DDM"}}, "models: a name is empty"),
        ({"block_length": 1, "diffusion_steps": 4}, r"models\.ddm: .*block"),
        ({"infer_dtype": "int8"}, "infer_dtype"),
    ],
    ids=str,
)
def test_what_a_user_can_get_wrong(base, change, error, folders, tmp_path, monkeypatch):
    def given(value):
        if isinstance(value, dict):
            return {name: given(entry) for name, entry in value.items()}
        (tmp_path / "FILE").touch()
        (tmp_path / "EMPTY").mkdir(exist_ok=True)
        places = {
            "EMPTY": str(tmp_path / "EMPTY"),
            "AR": str(folders[0]),
            "DDM": str(folders[1]),
            "FILE": str(tmp_path / "FILE"),
        }
        return places.get(value, value) if isinstance(value, str) else value

    values = {**base, **given(change)}
    if error is None:
        values = {
            name: value for name, value in values.items() if name not in ("diffusion_steps", "denoising_strategy")
        }
        assert outcomes_of(values)
        return
    if not {"suppress_tokens", "block_length"} & {*change}:  # these need the tokenizer
        monkeypatch.setattr(quality_run, "load", lambda *_, **__: pytest.fail("the model was loaded"))
    with pytest.raises(ValueError, match=error) as caught:
        outcomes_of(values)
    assert "\n" not in str(caught.value)


def test_keys_without_effect_on_an_autoregressive_model(folders, tmp_path):
    keys = {"model_name_or_path": str(folders[0]), "kind": "ar", "judge_model": "x", "save_dir": str(tmp_path / "o")}
    for name, value in (("diffusion_steps", 4), ("denoising_strategy", "random"), ("block_length", 4)):
        with pytest.raises(ValueError, match=f"{name} .*diffusion models"):
            read_keys({**keys, name: value})


def test_the_command(base, tmp_path, capsys):
    path = tmp_path / "x.yaml"
    path.write_text(json.dumps(base))
    assert main([str(path), "n_texts=2", "diffusion_steps=[2]"]) == 0
    out = capsys.readouterr().out
    assert "| ddm | random | 2 |" in out and "quality.png" in out
    assert {file.name for file in Path(base["save_dir"]).iterdir()} == {
        "quality.json",
        "quality.md",
        "quality.png",
        "requests-0.jsonl",
        "texts.jsonl",
    }
    first = [(Path(base["save_dir"]) / name).read_bytes() for name in ("quality.md", "texts.jsonl", "quality.json")]
    assert main([str(path), "n_texts=2", "diffusion_steps=[2]"]) == 0
    again = [(Path(base["save_dir"]) / name).read_bytes() for name in ("quality.md", "texts.jsonl", "quality.json")]
    assert first == again
    assert main([str(path), "lenght=3"]) == 1
    assert capsys.readouterr().err.strip().splitlines()[-1].startswith("llamafactory-ddm quality: lenght is not a key")
    path.write_bytes(b"judge_model: \xff\n")
    assert main([str(path)]) == 1 and f"{path} cannot be read" in capsys.readouterr().err
    assert main([]) == 2 and main(["--help"]) == 0


def test_texts_with_a_cache(base):
    values = {**base, "length": 12, "diffusion_steps": 12, "block_length": 4, "denoising_strategy": "low_confidence"}
    plain = texts_of(outcomes_of(values, save_dir=base["save_dir"] + "/plain"))
    exact = outcomes_of(values, kv_cache="prefix", cache_refresh=1, save_dir=base["save_dir"] + "/exact")
    reused = outcomes_of(values, kv_cache="dual", save_dir=base["save_dir"] + "/reused")
    assert texts_of(exact) == plain and texts_of(reused).keys() == plain.keys()
    with pytest.raises(ValueError, match=r"cache_refresh: 2 .*kv_cache"):
        outcomes_of(values, cache_refresh=2)
