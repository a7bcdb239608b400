"""The command's own surface; what its commands do is tried where they are tested."""

import pytest

from llamafactory_ddm.cli.main import main


def test_without_a_command_the_help_is_shown(capsys):
    assert main([]) == 2
    assert "usage: llamafactory-ddm" in capsys.readouterr().err
    assert main(["help"]) == 0
    assert "usage: llamafactory-ddm" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["trian", "x.yaml"], "unknown command 'trian'; did you mean 'train'? there are doctor, generate"),
        (["fit_length"], "did you mean 'fit-length'?"),
        (["x.yaml"], "unknown command 'x.yaml'; there are doctor"),
        (["doctor", "now"], "unrecognized arguments: now"),
        (["--verbose"], "the following arguments are required: command"),
    ],
)
def test_a_wrong_command_is_told_in_one_line(capsys, words, said):
    with pytest.raises(SystemExit) as ended:
        main(words)
    assert ended.value.code == 2
    assert said in capsys.readouterr().err.strip().splitlines()[-1]
