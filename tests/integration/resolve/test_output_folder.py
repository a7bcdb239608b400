"""Checks of output_dir before anything is loaded."""

from types import SimpleNamespace

import pytest

from llamafactory_ddm.integration.resolve.output_folder import check_output_folder


def check(folder, *, kind="full", base="some/model", overwrite=False, trains=True):
    check_output_folder(
        SimpleNamespace(model_name_or_path=str(base)),
        SimpleNamespace(output_dir=str(folder), do_train=trains, overwrite_output_dir=overwrite),
        SimpleNamespace(finetuning_type=kind),
    )


@pytest.fixture
def model(tmp_path):
    folder = tmp_path / "model"
    folder.mkdir()
    (folder / "model-00001-of-00002.safetensors").write_text("")
    return folder


@pytest.fixture
def adapter(tmp_path):
    folder = tmp_path / "adapter"
    folder.mkdir()
    (folder / "adapter_config.json").write_text("{}")
    return folder


def test_a_new_folder_is_not_made_by_the_check(tmp_path):
    check(tmp_path / "a" / "b")
    assert not list(tmp_path.iterdir())


def test_a_file_of_that_name(tmp_path):
    (tmp_path / "out").write_text("")
    for folder in (tmp_path / "out", tmp_path / "out" / "deeper"):
        with pytest.raises(ValueError, match=r"output_dir: .*out is a file"):
            check(folder, trains=False)


def test_a_folder_that_cannot_be_written(tmp_path, monkeypatch):
    def refuse(**where):
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr("tempfile.TemporaryFile", refuse)
    with pytest.raises(ValueError, match=rf"output_dir: .*new .*Permission denied.*{tmp_path} "):
        check(tmp_path / "new", trains=False)


def test_a_model_and_an_adapter_do_not_mix(model, adapter):
    with pytest.raises(ValueError, match=r"output_dir: .*an adapter, .*finetuning_type: full "):
        check(adapter)
    with pytest.raises(ValueError, match=r"output_dir: .*a model, .*finetuning_type: lora "):
        check(model, kind="lora")
    check(adapter, overwrite=True)
    check(model, kind="lora", overwrite=True)
    check(adapter, kind="lora")
    check(model)
    check(adapter, trains=False)  # generated texts may lie beside either


def test_an_adapter_is_not_saved_over_its_base(model):
    with pytest.raises(ValueError, match=r"output_dir: .*model_name_or_path"):
        check(model, kind="lora", base=model, overwrite=True)
