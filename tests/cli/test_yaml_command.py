"""How commands that take a YAML end."""

import re

import pytest

from llamafactory_ddm.cli.yaml_command import run_command


def ending(error):
    def body(values):
        raise error

    return body


@pytest.mark.parametrize(
    ("error", "status", "line"),
    [
        (ValueError("key: 3 is\n   wrong"), 1, "llamafactory-ddm mine: key: 3 is wrong"),
        (KeyboardInterrupt(), 130, "llamafactory-ddm mine: interrupted; .*same command"),
        (ModuleNotFoundError(name="lm_eval"), 1, r"llamafactory-ddm mine: lm-eval is not installed: .*\[eval\]"),
    ],
)
def test_an_error_is_one_line(error, status, line, tmp_path, capsys):
    path = tmp_path / "x.yaml"
    path.write_text("a: 1\n")
    assert run_command("mine", "usage", [str(path)], ending(error)) == status
    (found,) = capsys.readouterr().err.splitlines()
    assert re.fullmatch(f"{line}.*", found)


def test_it_gets_the_keys(tmp_path, capsys):
    path, found = tmp_path / "x.yaml", {}
    path.write_text("a: 1\nb: {c: 2}\n")
    assert run_command("mine", "usage", [str(path), "b.c=3"], found.update) == 0
    assert found == {"a": 1, "b": {"c": 3}}
    assert run_command("mine", "the usage", [], found.update) == 2 and capsys.readouterr().err == "the usage"
    with pytest.raises(ModuleNotFoundError):
        run_command("mine", "usage", [str(path)], ending(ModuleNotFoundError(name="other")))
