"""`llamafactory-ddm` itself: help and wrong commands."""

import re

import pytest

from llamafactory_ddm.cli.main import main


def test_without_a_command_the_help_is_shown(capsys):
    assert main([]) == 2
    assert "usage: llamafactory-ddm" in capsys.readouterr().err
    assert main(["help"]) == 0
    assert "usage: llamafactory-ddm" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("argv", "pattern"),
    [
        (["trian", "x.yaml"], "'trian'.*'train'.*doctor, generate"),
        (["fit_length"], "'fit_length'.*'fit-length'"),
        (["x.yaml"], "'x.yaml'.*doctor"),
        (["doctor", "now"], "arguments: now"),
        (["--verbose"], "required: command"),
    ],
)
def test_a_wrong_command_is_an_error_of_one_line(capsys, argv, pattern):
    with pytest.raises(SystemExit) as exited:
        main(argv)
    assert exited.value.code == 2
    assert re.search(pattern, capsys.readouterr().err.strip().splitlines()[-1])
