import json

import pytest

from llamafactory_ddm.modeling.diffusion_config import FILE_NAME, DiffusionConfig

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


def test_no_file_is_none(tmp_path):
    assert DiffusionConfig.find(tmp_path) is None
    assert DiffusionConfig.find(None) is None
    assert DiffusionConfig.find("gpt2-medium") is None


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"shift": ...}, "lacks shift"),
        ({"colour": 1}, "has unknown colour"),
        ({"shift": "yes"}, "shift must be bool, found 'yes'"),
        ({"mask_token_id": True}, "mask_token_id must be int"),
        ({"mask_token_id": "40"}, "mask_token_id must be int"),
        ({"attention_ratio": 1.5}, r"attention_ratio must lie in \[0, 1\]"),
        ({"format_version": 2}, "upgrade llamafactory-ddm"),
        ({"noise_process": "mixed"}, "not supported by"),
        ({"uniform_ratio": 0.1}, "not supported by"),
    ],
)
def test_a_tampered_file_is_an_error_that_names_it(tmp_path, changes, words):
    write(tmp_path, **changes)
    with pytest.raises(ValueError, match=words) as error:
        DiffusionConfig.load(tmp_path)
    assert FILE_NAME in str(error.value)


@pytest.mark.parametrize("text", ["", "{", "[1]", "\x00"])
def test_a_truncated_file_is_an_error(tmp_path, text):
    (tmp_path / FILE_NAME).write_text(text)
    with pytest.raises(ValueError, match=FILE_NAME):
        DiffusionConfig.find(tmp_path)


def test_a_yaml_key_may_repeat_but_not_contradict():
    CONFIG.check_against(shift=True, noise_schedule=None, uniform_ratio=0)
    with pytest.raises(ValueError, match=r"shift: False contradicts.*says shift: True; remove shift"):
        CONFIG.check_against(shift=False)
    with pytest.raises(ValueError, match=r"noise_schedule: cosine.*linear"):
        CONFIG.check_against(noise_schedule="cosine")
