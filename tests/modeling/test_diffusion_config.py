import json
from dataclasses import FrozenInstanceError, replace

import pytest

from llamafactory_ddm.modeling.diffusion_config import FILE_NAME, DiffusionConfig
from llamafactory_ddm.modeling.prompt_template import Part, PromptTemplate

CONFIG = DiffusionConfig(
    mask_token="<|mask|>",
    mask_token_id=40,
    shift=True,
    noise_process="masked",
    uniform_ratio=0.0,
    noise_schedule="linear",
    attention_ratio=0.25,
)


def write(folder, **changes):
    CONFIG.save(folder)
    raw = json.loads((folder / FILE_NAME).read_text())
    for key, value in changes.items():
        if value is ...:
            del raw[key]
        else:
            raw[key] = value
    (folder / FILE_NAME).write_text(json.dumps(raw))


def test_what_is_saved_is_loaded(tmp_path):
    CONFIG.save(tmp_path)
    assert DiffusionConfig.load(tmp_path) == DiffusionConfig.find(tmp_path) == CONFIG
    assert [p.name for p in tmp_path.iterdir()] == [FILE_NAME]


def test_start_token_end_tokens_and_template_are_optional(tmp_path):
    parts = (Part("<s>"), Part(None, ("Q: ", "\nA: ")))
    config = replace(
        CONFIG,
        start_token="<s>",
        start_token_id=1,
        end_tokens=("</s>", "<|im_end|>"),
        end_token_ids=(2, 3),
        template=PromptTemplate("x", parts),
    )
    config.save(tmp_path)
    assert DiffusionConfig.load(tmp_path) == config
    write(tmp_path, **dict.fromkeys(("start_token", "start_token_id", "end_tokens", "end_token_ids", "template"), ...))
    assert DiffusionConfig.load(tmp_path) == CONFIG


def test_the_canvas_is_optional(tmp_path):
    config = replace(CONFIG, canvas=64)
    config.save(tmp_path)
    assert DiffusionConfig.load(tmp_path) == config
    write(tmp_path, canvas=...)
    assert DiffusionConfig.load(tmp_path) == CONFIG


def test_a_block_model(tmp_path):
    config = replace(CONFIG, attention_ratio=1.0, attention="block", train_block_length=8)
    config.save(tmp_path)
    assert DiffusionConfig.load(tmp_path) == config
    write(tmp_path, attention=..., train_block_length=...)  # as older files have it
    assert DiffusionConfig.load(tmp_path) == CONFIG


def test_no_file_is_none(tmp_path):
    assert DiffusionConfig.find(tmp_path) is None
    assert DiffusionConfig.find(None) is None
    assert DiffusionConfig.find("gpt2-medium") is None


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"shift": ...}, "lacks shift"),
        ({"colour": 1}, "has unknown colour"),
        ({"shift": "yes"}, "shift .*bool.*'yes'"),
        ({"mask_token_id": True}, "mask_token_id .*int"),
        ({"mask_token_id": "40"}, "mask_token_id .*int"),
        ({"attention_ratio": 1.5}, "attention_ratio"),
        ({"attention": "causal"}, "attention"),
        ({"canvas": 0}, "canvas"),
        ({"canvas": "x"}, "canvas"),
        ({"attention": "block"}, "train_block_length"),
        ({"attention": "block", "train_block_length": 0}, "train_block_length"),
        ({"train_block_length": 4}, "train_block_length"),
        ({"attention_ratio": float("nan")}, "attention_ratio"),
        ({"format_version": 2}, "upgrade llamafactory-ddm"),
        ({"format_version": 2, "colour": 1}, "upgrade llamafactory-ddm"),
        ({"format_version": 0}, "format_version .*0"),
        ({"format_version": "1"}, "format_version .*int"),
        ({"mask_token_id": -1}, "mask_token_id -1"),
        ({"mask_token": ""}, "mask_token ''"),
        ({"mask_token": None}, "mask_token .*str.*None"),
        ({"variable_length": []}, "variable_length .*dict"),
        ({"noise_process": "absorbing"}, "noise_process .*masked, mixed.*plugins"),
        ({"noise_schedule": "sqrt"}, "noise_schedule .*linear, cosine.*plugins"),
        ({"uniform_ratio": 0.1}, r"noise_process masked .*uniform_ratio 0\.1"),
        ({"train_on_padding": "yes"}, "train_on_padding .*bool"),
        ({"sep_token": "x"}, "sep_token 'x' .*sep_token_id None"),
        ({"sep_token": "x", "sep_token_id": -1}, "sep_token_id -1"),
        ({"start_token": "x"}, "start_token 'x' .*start_token_id None"),
        ({"end_tokens": ["x"]}, r"end_tokens \['x'\] .*end_token_ids None"),
        ({"end_tokens": ["x"], "end_token_ids": [1, 2]}, r"end_token_ids \[1, 2\]"),
        ({"end_tokens": ["x"], "end_token_ids": ["1"]}, r"end_token_ids \['1'\]"),
        ({"end_tokens": "x"}, "end_tokens .*list"),
        ({"template": {"name": "x"}}, "template: .*template"),
        ({"template": {"name": "x", "parts": [{"token": None, "text": []}]}}, "template: .*part"),
        ({"template": {"name": "x", "parts": [{"token": "a", "text": ["b"]}]}}, "template: .*part"),
    ],
)
def test_a_tampered_file_is_an_error_that_names_it(tmp_path, changes, words):
    write(tmp_path, **changes)
    with pytest.raises(ValueError, match=words) as error:
        DiffusionConfig.load(tmp_path)
    assert FILE_NAME in str(error.value)


@pytest.mark.parametrize("text", [b"", b"{", b"[1]", b"\x00", b"\xff\xfe", b"[" * 100_000])
def test_a_truncated_file_is_an_error(tmp_path, text):
    (tmp_path / FILE_NAME).write_bytes(text)
    with pytest.raises(ValueError, match=FILE_NAME):
        DiffusionConfig.find(tmp_path)


def test_a_yaml_key_may_not_contradict_the_checkpoint():
    CONFIG.check_against(shift=True, noise_schedule=None, uniform_ratio=0)
    with pytest.raises(ValueError, match=r"shift: False .*shift: True"):
        CONFIG.check_against(shift=False)
    with pytest.raises(ValueError, match=r"noise_schedule: cosine.*linear"):
        CONFIG.check_against(noise_schedule="cosine")


@pytest.mark.parametrize("share", [0.1, 0.5, 0.95])
def test_every_cut_of_the_file_is_an_error(tmp_path, share):
    CONFIG.save(tmp_path)
    raw = (tmp_path / FILE_NAME).read_bytes()
    (tmp_path / FILE_NAME).write_bytes(raw[: int(len(raw) * share)])
    with pytest.raises(ValueError, match=FILE_NAME):
        DiffusionConfig.load(tmp_path)


def test_without_a_file_load_raises_and_find_returns_none(tmp_path):
    with pytest.raises(FileNotFoundError, match=FILE_NAME):
        DiffusionConfig.load(tmp_path)
    assert DiffusionConfig.find(tmp_path / "nowhere") is None


def test_a_token_outside_ascii_survives(tmp_path):
    config = replace(CONFIG, mask_token="\u2581\u63a9")
    config.save(tmp_path)
    assert DiffusionConfig.load(tmp_path) == config


def test_the_config_cannot_be_changed():
    with pytest.raises(FrozenInstanceError):
        CONFIG.shift = False
