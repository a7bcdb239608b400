"""Fields of the diffusion keys: made from their definitions, and turned back into values of a YAML."""

import pytest

from llamafactory_ddm.integration.hparams.diffusion import KEYS, DiffusionArguments
from llamafactory_ddm.integration.webui.fields import (
    CHAT_KEYS,
    ONE_STAGE,
    PREDICT_KEYS,
    PREFIX,
    TRAINING_KEYS,
    UNSET,
    changed_keys,
    chat_keys,
    effective_keys,
    make_field,
    spec_of,
)
from llamafactory_ddm.integration.webui.texts import CHINESE, english_label, failed_caption, step_caption

gr = pytest.importorskip("gradio")
pytestmark = pytest.mark.usefixtures("patched_pages")
ALL_KEYS = tuple(dict.fromkeys((*TRAINING_KEYS, *PREDICT_KEYS, *CHAT_KEYS)))


def other_value(name):
    """A value that the field of a key can take, other than its default."""
    spec, field = spec_of(name), make_field(name)
    if isinstance(field, gr.Dropdown):
        return next(value for _, value in reversed(field.choices) if value not in (UNSET, spec.default))
    if isinstance(field, gr.Checkbox):
        return not spec.default
    if spec.kind not in ("integer", "number"):
        return "<|mask|>"
    low = 0 if spec.low is None else spec.low
    number = low + 1 if spec.kind == "integer" else low + 0.25
    return str(number) if isinstance(field, gr.Textbox) else number


@pytest.mark.parametrize("name", ALL_KEYS)
def test_a_field_shows_the_default_of_its_key_and_keeps_to_its_bounds(name):
    spec, field = spec_of(name), make_field(name)
    assert field.value in ((spec.default,) if spec.default is not None else (None, "", UNSET))
    assert effective_keys({name: field.value}) in ({}, {name: spec.default})
    if isinstance(field, gr.Slider | gr.Number):
        assert field.minimum is None or field.minimum >= spec.low
        assert field.maximum is None or spec.high is None or field.maximum <= spec.high
    if spec.choices is not None:
        assert set(spec.choices) == {value for _, value in field.choices} - {UNSET}


@pytest.mark.parametrize("name", TRAINING_KEYS)
def test_a_changed_field_is_a_key_that_our_parser_takes(name):
    import llamafactory.hparams.parser  # noqa: F401  ours is imported after upstream's

    from llamafactory_ddm.integration.hparams.parser import DiffusionFinetuningArguments

    stage, value = ONE_STAGE.get(name, "ddm"), other_value(name)
    defaults = {key: make_field(key).value for key in TRAINING_KEYS}
    assert changed_keys(defaults, stage=stage) == {}
    changed = changed_keys({**defaults, name: value}, stage=stage)
    assert list(changed) == [name] and changed[name] is not False
    assert not isinstance(changed[name], str) or KEYS[name].kind not in ("integer", "number")
    assert KEYS[name].checked(name, changed[name]) == KEYS[name].checked(name, value)
    needed = {"sample_steps": 1} if name in ("sample_count", "sample_length") else {}
    parsed = DiffusionFinetuningArguments(stage=stage, **needed, **changed)
    assert getattr(parsed, name) != getattr(DiffusionArguments, name)


def test_false_survives_upstreams_removal_of_false():
    assert changed_keys({"drop_overlong": False, "shift": "false"}, stage="ddm") == {
        "drop_overlong": "false",
        "shift": "false",
    }


def test_no_steps_are_asked_for_where_the_chat_chooses_them():
    assert chat_keys({"chat_steps": 0, "seed": "", "block_length": "8"}) == {"block_length": 8}
    assert chat_keys({"chat_steps": 16, "seed": "3"}) == {"diffusion_steps": 16, "seed": 3}


def test_a_text_that_is_no_number_is_left_to_the_run_to_refuse():
    assert changed_keys({"uniform_ratio": "a tenth"}, stage="ddm") == {"uniform_ratio": "a tenth"}


def test_keys_of_another_stage_or_without_effect_are_left_out():
    values = {"sep_token": "x", "random_truncate_ratio": 0.5}
    assert changed_keys(values, stage="ddm") == {"random_truncate_ratio": 0.5}
    assert changed_keys(values, stage="ddm-sft") == {"sep_token": "x"}
    threshold = {"confidence_threshold": 0.5}
    assert effective_keys({**threshold, "denoising_strategy": "random"}) == {"denoising_strategy": "random"}
    chosen = {**threshold, "denoising_strategy": "confidence_threshold"}
    assert effective_keys(chosen) == chosen


def test_every_field_has_a_label_and_an_explanation_in_each_language():
    from llamafactory.webui import interface  # noqa: F401  has the texts of the pages
    from llamafactory.webui.locales import LOCALES

    languages = set(LOCALES["lang"])
    assert set(CHINESE) == set(ALL_KEYS)
    for name in ALL_KEYS:
        texts = LOCALES[f"{PREFIX}{name}"]
        assert set(texts) == languages >= {"en", "zh"}
        assert texts["en"]["label"] == english_label(name) and texts["ru"] == texts["en"]
        assert texts["zh"]["label"] != texts["en"]["label"] and texts["zh"]["info"]
        assert "<" not in texts["en"]["info"]  # gradio reads it as HTML
    assert english_label("kv_cache") == "KV cache" and english_label("eval_eos") == "Eval EOS"
    # A text without a language that upstream offers would crash its change of language.
    assert {language for texts in LOCALES.values() for language in texts} == languages


@pytest.mark.parametrize("lang", ["en", "zh", "ru", "?"])
def test_captions_exist_in_every_language(lang):
    assert "3" in step_caption(lang, 3, 4, 5) and failed_caption(lang)
