"""Registries, and the plugins that add to them."""

import sys
from importlib import metadata

import pytest

from llamafactory_ddm.utils import plugins
from llamafactory_ddm.utils.plugins import load_installed_plugins, load_plugins
from llamafactory_ddm.utils.registry import Registry, did_you_mean


@pytest.fixture
def colours():
    registry = Registry("colour")
    for name in ("red", "green"):
        registry.register(name.upper(), name=name)
    return registry


def test_entries_by_name(colours):
    assert list(colours) == ["red", "green"] and len(colours) == 2
    assert colours.get("red") == "RED" and "red" in colours and "blue" not in colours and ["red"] not in colours


def test_a_decorated_class_is_itself(colours):
    @colours.register
    class Blue:
        name = "blue"

    assert colours.get("blue") is Blue


def test_a_taken_name_is_an_error(colours):
    with pytest.raises(ValueError, match=r"colour 'red' .*'RED'"):
        colours.register(object(), name="red")
    assert colours.get("red") == "RED"


@pytest.mark.parametrize("name", ["gren", "GREEN", None, 3])
def test_an_unknown_name_lists_the_known_names(colours, name):
    hint = "'green'" if isinstance(name, str) else ""
    with pytest.raises(ValueError, match=f"colour .*red, green.*{name}.*{hint}.*plugins"):
        colours.get(name)


def test_did_you_mean():
    assert did_you_mean("LoRa", ["lora", "full"]) == "; did you mean 'lora'?"
    assert did_you_mean("zzz", ["lora", "full"]) == ""


def write(folder, name, text):
    path = folder / name
    path.write_text(text)
    return str(path)


def test_a_file_and_a_module_are_imported_once(tmp_path, monkeypatch):
    counting = "import sys\nsys.plugin_runs = getattr(sys, 'plugin_runs', []) + [__name__]\n"
    monkeypatch.setattr(sys, "plugin_runs", [], raising=False)
    path = write(tmp_path, "a_file.py", counting)
    write(tmp_path, "a_module_of_tests.py", counting)
    monkeypatch.syspath_prepend(tmp_path)
    load_plugins([path, "a_module_of_tests"])
    load_plugins(f"{path}, a_module_of_tests")
    assert len(sys.plugin_runs) == 2 and sys.plugin_runs[1] == "a_module_of_tests"


@pytest.mark.parametrize(
    ("plugin", "pattern"),
    [
        ("no_such_module", "plugins: no_such_module "),
        ("no_such.module", r"plugins: no_such\.module "),
        ("nowhere.py", r"plugins: nowhere\.py "),
        ([3], r"plugins .*\[3\]"),
        (3, "plugins .*3"),
    ],
)
def test_a_plugin_that_does_not_exist(plugin, pattern):
    with pytest.raises(ValueError, match=pattern):
        load_plugins(plugin)


@pytest.mark.parametrize("text", ["x = 1\n1 / 0\n", "x = 1\nimport no_such_module\n"])
def test_a_plugin_that_fails_says_where(tmp_path, text):
    path = write(tmp_path, "broken.py", text)
    for _ in range(2):
        with pytest.raises(ValueError, match=r"plugins: .*broken\.py .*broken\.py, line 2\)") as caught:
            load_plugins(path)
        assert "\n" not in str(caught.value)


def test_an_installed_plugin_is_imported_when_a_name_is_not_known(colours, monkeypatch, tmp_path):
    write(tmp_path, "installed_for_tests.py", "def register(): pass\nraise ZeroDivisionError('at first')\n")
    monkeypatch.syspath_prepend(tmp_path)
    point = metadata.EntryPoint("mine", "installed_for_tests", plugins.GROUP)
    monkeypatch.setattr(metadata, "entry_points", lambda group: [point] if group == plugins.GROUP else [])
    assert "red" in colours  # a known name imports nothing
    with pytest.raises(ValueError, match=r"mine \(installed_for_tests\).*at first"):
        colours.get("blue")
    monkeypatch.setattr(sys, "colours", colours, raising=False)
    write(tmp_path, "installed_for_tests.py", "import sys\nsys.colours.register('BLUE', name='blue')\n")
    monkeypatch.setattr(plugins, "_installed", set())
    assert colours.get("blue") == "BLUE"
    load_installed_plugins()  # once
