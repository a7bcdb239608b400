"""`llamafactory-ddm plot-loss`: curves of several runs, from the files that a run writes."""

import json
import re

import pytest

from llamafactory_ddm.cli.plot_loss import main
from llamafactory_ddm.integration.train import loss_curves
from llamafactory_ddm.integration.train.loss_curves import moving_average, read_curves


def write_log(folder, *rows, more=""):
    folder.mkdir(parents=True, exist_ok=True)
    lines = [json.dumps({"current_steps": step, "total_steps": 9, **values}) for step, values in rows]
    (folder / "trainer_log.jsonl").write_text("\n".join([*lines, more]))
    return folder


def write_state(folder, *rows):
    folder.mkdir(parents=True, exist_ok=True)
    history = [{"step": step, "epoch": 0.5, **values} for step, values in rows]
    (folder / "trainer_state.json").write_text(json.dumps({"log_history": history}))
    return folder


def test_both_files_are_read(tmp_path):
    write_state(tmp_path, (1, {"loss": 9.0, "grad_norm": 2}), (2, {"eval_nll": 3.0}))
    write_log(tmp_path, (1, {"loss": 4.0, "lr": 0.1}), (2, {"loss": 3.0, "elapsed_time": "0:01"}))
    expected = {"loss": {1: 4.0, 2: 3.0}, "grad_norm": {1: 2.0}, "eval_nll": {2: 3.0}, "learning_rate": {1: 0.1}}
    assert read_curves(tmp_path) == expected


def test_a_resumed_run_counts_from_its_later_line(tmp_path):
    old = [(step, {"loss": float(step)}) for step in (2, 4, 6, 8)]
    new = [(5, {"loss": 50.0}), (5, {"eval_loss": 5.0}), (10, {"loss": 100.0})]
    write_log(tmp_path, *old, (8, {"eval_loss": 8.0}), *new)
    assert read_curves(tmp_path) == {"loss": {2: 2.0, 4: 4.0, 5: 50.0, 10: 100.0}, "eval_loss": {5: 5.0}}


def test_a_line_that_is_being_written_is_left_out(tmp_path):
    write_log(tmp_path, (1, {"loss": 4.0}), more='{"current_steps": 2, "lo')
    assert read_curves(tmp_path) == {"loss": {1: 4.0}}


def test_the_newest_checkpoint_stands_in(tmp_path):
    for step in (9, 10):
        write_state(tmp_path / f"checkpoint-{step}", (step, {"loss": 1.0}))
    assert read_curves(tmp_path) == {"loss": {10: 1.0}}


def test_a_state_of_an_earlier_run_is_left_out(tmp_path):
    """A run that started again in the folder appends to a new log, and writes its state at its end."""
    write_state(tmp_path, (1, {"loss": 9.0}), (2, {"loss": 8.0}), (3, {"loss": 7.0, "nll": 3.0}))
    write_log(tmp_path, (1, {"loss": 4.0}), (2, {"loss": 3.0}))
    assert read_curves(tmp_path) == {"loss": {1: 4.0, 2: 3.0}}
    write_log(tmp_path, (1, {"loss": 4.0}), (2, {"loss": 3.0}), (3, {"elapsed_time": "0:01"}))
    assert read_curves(tmp_path) == {"loss": {1: 4.0, 2: 3.0, 3: 7.0}, "nll": {3: 3.0}}


def test_names_with_signs_that_matplotlib_reads(tmp_path, monkeypatch):
    from matplotlib.figure import Figure

    drawn, save = [], Figure.savefig
    monkeypatch.setattr(Figure, "savefig", lambda self, *a, **k: drawn.append(self) or save(self, *a, **k))
    run = write_log(tmp_path / "a", (1, {"loss": 1.0}), more="")
    assert main([f"_x={run}", f"$x{{$={run}", "--out", str(tmp_path / "x.png")]) == 0
    labels = [text.get_text() for text in drawn[0].axes[0].get_legend().get_texts()]
    assert labels == [" _x", r"\$x{\$"]


def test_the_moving_average():
    assert moving_average([1.0, 2.0, 6.0], 1) == [1.0, 2.0, 6.0]
    assert moving_average([1.0, 2.0, 6.0, 9.0], 3) == [1.5, 3.0, 17 / 3, 7.5]
    assert moving_average([1.0, 3.0], 2) == [2.0, 3.0]


def test_each_run_is_a_curve_and_each_key_a_panel(tmp_path, monkeypatch, capsys):
    drawn = []
    from matplotlib.figure import Figure

    save = Figure.savefig
    monkeypatch.setattr(Figure, "savefig", lambda self, *a, **k: drawn.append(self) or save(self, *a, **k))
    long = [(step, {"loss": float(step % 2)}) for step in range(30)]
    a = write_log(tmp_path / "a", *long, (29, {"eval_loss": 2.0}))
    b = write_state(tmp_path / "b", (0, {"loss": 3.0}), (5, {"loss": 2.0}))
    words = [f"first run={a}", f"b={b}", "--out", str(tmp_path / "new" / "x.png"), "--keys", "loss,eval_loss"]
    assert main(words) == 0
    assert (tmp_path / "new" / "x.png").read_bytes()[1:4] == b"PNG"
    assert "b logged no eval_loss" in capsys.readouterr().err
    left, right = drawn[0].axes
    assert [(line.get_label(), list(line.get_ydata())) for line in left.lines] == [
        ("first run", [float(step % 2) for step in range(30)]),
        ("b", [3.0, 2.0]),
    ]
    assert [line.get_label() for line in right.lines] == ["first run"] and right.get_ylabel() == "eval_loss"
    assert main([*words[:-1], "loss", "--smooth", "3"]) == 0
    faint, smooth, short = drawn[1].axes[0].lines
    assert list(faint.get_ydata()) != list(smooth.get_ydata()) and smooth.get_ydata()[2] == pytest.approx(2 / 3)
    assert list(short.get_ydata()) == [3.0, 2.0] and len(long) >= loss_curves.MIN_SMOOTHED


@pytest.mark.parametrize(
    ("words", "error"),
    [
        (["a"], "'a'.*NAME=FOLDER"),
        (["=RUN"], "NAME=FOLDER"),
        (["a=RUN", "a=RUN"], "'a' is given twice"),
        (["a=absent"], "absent is not a folder"),
        (["a=EMPTY"], "trainer_state.json nor trainer_log.jsonl"),
        (["a=BROKEN"], "line 2 of .*trainer_log.jsonl is not valid JSON"),
        (["a=BINARY"], "trainer_log.jsonl is not UTF-8"),
        (["a=STATE"], "log_history"),
        (["a=RUN", "--keys", "loss,eval_los"], "eval_los;.*'eval_loss'"),
        (["a=RUN", "--keys", "zebra"], "zebra; logged: eval_loss, loss"),
        (["a=RUN", "--keys", ","], "--keys is empty"),
        (["a=RUN", "--smooth", "0"], "--smooth.*0"),
        (["a=RUN", "--out", "x.jpeg"], "--out: x.jpeg .*png"),
    ],
    ids=str,
)
def test_what_a_user_can_get_wrong(words, error, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    write_log(tmp_path / "RUN", (1, {"loss": 1.0, "eval_loss": 1.0}), more="")
    write_log(tmp_path / "BROKEN", (1, {"loss": 1.0}), more="{\n")
    (tmp_path / "EMPTY").mkdir()
    (tmp_path / "BINARY").mkdir()
    (tmp_path / "BINARY" / "trainer_log.jsonl").write_bytes(b"\xff\n")
    write_state(tmp_path / "STATE")
    (tmp_path / "STATE" / "trainer_state.json").write_text("[]")
    assert main(["--out", "x.png", *words]) == 1
    (line,) = capsys.readouterr().err.strip().splitlines()
    assert line.startswith("llamafactory-ddm plot-loss: ") and re.search(error, line)
    assert not (tmp_path / "x.png").exists()
