"""The patch table, in this process: applied to upstream's real modules and undone again."""

import ast
import importlib
import inspect
import multiprocessing
import os
import subprocess
import sys
from dataclasses import make_dataclass
from pathlib import Path
from types import ModuleType

import pytest

from support.limits import LIMIT

MODULES = (
    "llamafactory.hparams.parser",
    "llamafactory.hparams",
    "llamafactory.train.tuner",
    "llamafactory.train.pt",
    "llamafactory.train.sft",
    "llamafactory.extras.constants",
    "llamafactory.extras.env",
    "llamafactory.v1.launcher",
    "llamafactory.hparams.finetuning_args",
    "llamafactory.model.loader",
    "llamafactory.model.adapter",
)


def picture():
    """Every name of upstream that the table could touch, by identity, and the content of lists and dicts."""
    seen = {}
    for path in MODULES:
        for name, value in vars(importlib.import_module(path)).items():
            if not name.startswith("__"):
                seen[path, name] = (id(value), repr(value) if isinstance(value, (list, dict)) else None)
    from llamafactory.hparams import FinetuningArguments

    return {**seen, "post_init": id(FinetuningArguments.__post_init__)}


def apply_all(parser, patches):
    patches.after_parser(parser)
    for name in {patch.module for patch in patches.PATCHES}:
        importlib.import_module(name)
        patches.apply(name)


def test_undone_to_the_last_name_and_applied_once(upstream):
    parser, _, patches = upstream
    for name in MODULES:
        importlib.import_module(name)
    patches.undo()
    plain = picture()
    apply_all(parser, patches)
    active = picture()
    # 0.9.4's v1 launcher has imported print_env by name.
    changed = {key for key in plain if plain[key] != active[key]} - {("llamafactory.v1.launcher", "print_env")}
    assert changed == {
        *{("llamafactory.hparams.parser", f"_{kind}_ARGS") for kind in ("TRAIN", "INFER", "EVAL")},
        *{("llamafactory.hparams.parser", name) for name in ("_parse_args", "_parse_train_args")},
        *{(m, f"get_{kind}_args") for m in MODULES[:3] for kind in ("train", "infer")},
        *{(m, "get_eval_args") for m in MODULES[:2]},
        *{("llamafactory.train.tuner", name) for name in ("run_pt", "run_sft", "load_model", "load_tokenizer")},
        ("llamafactory.train.tuner", "export_model"),
        *{("llamafactory.model.loader", f"AutoModelFor{kind}") for kind in ("CausalLM", "ImageTextToText")},
        ("llamafactory.model.loader", "init_adapter"),
        ("llamafactory.model.adapter", "PeftModel"),
        ("llamafactory.extras.constants", "TRAINING_STAGES"),
        ("llamafactory.extras.env", "print_env"),
        ("llamafactory.v1.launcher", "launch"),
    }
    in_place = {key for key in changed if plain[key][1] is not None}
    assert len(in_place) == 4 and all(plain[key][0] == active[key][0] for key in in_place)
    apply_all(parser, patches)
    assert picture() == active
    patches.undo()
    assert picture() == plain
    assert not patches.is_active()


def test_every_row_says_why_and_on_what_it_was_tried(upstream):
    patches = upstream[2]
    table = (Path(__file__).parents[3] / "docs" / "patches.md").read_text(encoding="utf-8")
    for patch in patches.PATCHES:
        assert patch.why and patch.checked
        name = patch.target.removeprefix("llamafactory.").replace(":", ".")
        assert f"| `{name}` |" in table


def test_names_bound_by_other_modules_follow(upstream):
    """Also those outside of upstream, such as a script that was there before the plugin."""
    parser, _, patches = upstream
    patches.undo()
    script = ModuleType("a_script_of_the_user")
    script.get_train_args = parser.get_train_args
    sys.modules[script.__name__] = script
    try:
        patches.after_parser(parser)
        assert script.get_train_args is parser.get_train_args
        patches.undo()
        assert script.get_train_args is parser.get_train_args
        assert not hasattr(script.get_train_args, "__wrapped__")
    finally:
        del sys.modules[script.__name__]


def test_a_failure_halfway_leaves_nothing_behind_but_the_refusal(upstream, monkeypatch):
    parser, _, patches = upstream
    patches.undo()
    plain = picture()

    def fail(original):
        raise OSError("broken\nhalfway")

    rows = [
        patches.Patch(row.target, fail, row.why) if row.target.endswith("TRAINING_STAGES") else row
        for row in patches.PATCHES
    ]
    monkeypatch.setattr(patches, "PATCHES", tuple(rows))
    with pytest.raises(OSError, match="broken"):
        patches.after_parser(parser)
    assert (patches.is_active(), patches.status()) == (False, "broken halfway")
    assert {key for key, value in picture().items() if value != plain[key]} == {"post_init"}
    monkeypatch.undo()
    patches.after_parser(parser)
    assert patches.is_active()


def test_an_upstream_that_does_not_fit_refuses_our_stage_and_no_other(upstream, basic, monkeypatch):
    """Upstream itself never looks at the stage when it chats, serves or exports."""
    parser, _, patches = upstream
    patches.undo()
    monkeypatch.setattr("importlib.metadata.version", lambda name: "9.9.9")
    with pytest.raises(patches.IncompatibleUpstream, match=r"llamafactory 9\.9\.9 is not supported"):
        patches.after_parser(parser)
    words = r"stage: ddm needs llamafactory-ddm, which is not active: llamafactory 9\.9\.9 is not supported"
    inference = {"model_name_or_path": "nowhere", "finetuning_type": "full"}
    with pytest.raises(ValueError, match=words):
        parser.get_infer_args({**inference, "stage": "ddm"})
    with pytest.raises(ValueError, match=words):
        parser.get_train_args(basic(anneal_steps=3))
    assert parser.get_infer_args(inference)[2].stage == "sft"
    assert parser.get_train_args(basic(stage="pt"))[3].stage == "pt"


def test_run_pt_dispatches_by_stage(upstream, basic, monkeypatch):
    parser, tuner, _ = upstream
    from llamafactory.train import pt

    from llamafactory_ddm.integration.hparams import stages

    calls, parsed = [], parser.get_train_args(basic())
    monkeypatch.setattr(stages.Stage, "load_runner", lambda self: lambda *args: calls.append((self.name, args)))
    model_args, data_args, training_args, finetuning_args, generating_args = parsed
    tuner.run_pt(model_args, data_args, training_args, finetuning_args, ["callback"])
    assert calls == [("ddm", (model_args, data_args, training_args, finetuning_args, generating_args, ["callback"]))]
    assert pt.run_pt is inspect.unwrap(tuner.run_pt)


def test_run_exp_keeps_upstreams_prelude_for_our_runner(upstream, basic, monkeypatch):
    _, tuner, _ = upstream
    from llamafactory_ddm.integration.hparams import stages

    calls = []
    monkeypatch.setattr(stages.Stage, "load_runner", lambda self: lambda *args: calls.append(args))
    tuner.run_exp(basic(temperature=0.3))
    ((*_, finetuning_args, generating_args, callbacks),) = calls
    assert (finetuning_args.diffusion_stage, generating_args.temperature) == ("ddm", 0.3)
    assert [type(c).__name__ for c in callbacks] == ["LogCallback", "ReporterCallback"]


def test_other_stages_reach_their_own_runner(upstream, basic, monkeypatch):
    parser, tuner, patches = upstream
    patches.undo()
    calls = []
    monkeypatch.setattr(tuner, "run_pt", lambda *args: calls.append(args))
    patches.after_parser(parser)
    tuner.run_exp(basic(stage="pt"))
    assert [(len(args), args[3].stage, args[3].diffusion_stage) for args in calls] == [(5, "pt", None)]
    patches.undo()


@pytest.mark.parametrize("version", ["0.9.3", "0.9.7", "1.0.0", "0.9.7.dev0"])
def test_an_unsupported_version_is_named(upstream, monkeypatch, version):
    parser, _, patches = upstream
    patches.undo()
    monkeypatch.setattr("importlib.metadata.version", lambda name: version)
    assert f"llamafactory {version} is not supported" in patches.incompatibilities(parser)[0]


@pytest.mark.parametrize("version", ["0.9.4", "0.9.5", "0.9.6.dev0", None])
def test_supported_versions(upstream, monkeypatch, version):
    """None: a source tree, which has no metadata."""
    from importlib.metadata import PackageNotFoundError

    def answer(name):
        if version is None:
            raise PackageNotFoundError(name)
        return version

    parser, _, patches = upstream
    patches.undo()
    monkeypatch.setattr("importlib.metadata.version", answer)
    assert patches.incompatibilities(parser) == []


def inlined(args=None):
    """As if upstream had moved the parsing into the function, which then never calls what is replaced."""
    return args


@pytest.mark.parametrize(
    ("name", "value", "problem"),
    [
        ("_parse_args", lambda words: None, "llamafactory.hparams.parser._parse_args has changed"),
        ("get_train_args", inlined, "llamafactory.hparams.parser.get_train_args has changed"),
        ("_parse_train_args", inlined, "llamafactory.hparams.parser._parse_train_args has changed"),
        ("read_args", None, "llamafactory.hparams.parser has no function read_args"),
        ("_TRAIN_ARGS", [], "llamafactory.hparams.parser._TRAIN_ARGS has changed"),
        (
            "FinetuningArguments",
            make_dataclass("FinetuningArguments", [("stage", str)]),
            "the stages of llamafactory's FinetuningArguments have changed",
        ),
        ("_INFER_ARGS", [make_dataclass("Rival", [("shift", bool)])], "llamafactory's Rival has keys of ours: shift"),
        ("_NEW_ARGS", [make_dataclass("Rival", [("shift", bool)])], "llamafactory's Rival has keys of ours: shift"),
    ],
)
def test_a_changed_parser_is_noticed(upstream, monkeypatch, name, value, problem):
    parser, _, patches = upstream
    patches.undo()
    monkeypatch.setattr(parser, name, value, raising=False)
    assert patches.incompatibilities(parser) == [problem]
    with pytest.raises(patches.IncompatibleUpstream):
        patches.after_parser(parser)
    assert patches.status() == problem


@pytest.mark.parametrize(
    ("old", "new", "problem"),
    [
        ("run_pt(", "run_pretraining(", "llamafactory's _training_function does not call run_pt"),
        ("get_train_args(", "parse(", "llamafactory's _training_function does not call get_train_args"),
        ("def _training_function", "def train", "llamafactory's _training_function does not call run_pt"),
        ("run_sft(model_args, data_args", "run_sft(data_args, model_args", "calls run_sft with other arguments"),
        ("import os", "import os os", "tuner.py cannot be read"),
        (None, None, "tuner.py cannot be read"),
    ],
)
def test_a_changed_dispatch_is_noticed(upstream, monkeypatch, tmp_path, old, new, problem):
    parser, tuner, patches = upstream
    patches.undo()
    for folder in ("hparams", "train"):
        (tmp_path / folder).mkdir()
    if old is not None:
        source = inspect.getsource(tuner)
        assert old in source and ast.parse(source)
        (tmp_path / "train" / "tuner.py").write_text(source.replace(old, new), encoding="utf-8")
    monkeypatch.setattr(parser, "__file__", str(tmp_path / "hparams" / "parser.py"))
    assert problem in patches.incompatibilities(parser)[0]


@pytest.mark.parametrize(
    ("words", "refused"),
    [
        (["train", "ours.yaml"], True),
        (["train", "theirs.yaml"], False),
        (["train", "theirs.yaml", "stage=ddm"], True),
        (["train", "--stage", "ddm"], True),
        (["train", "--output_dir", "ddm"], False),
        (["train", "ours.json"], True),
        (["train", "missing.yaml"], False),
    ],
)
def test_the_v1_launcher_is_kept_from_our_stage(upstream, monkeypatch, tmp_path, words, refused):
    patches = upstream[2]
    launcher = importlib.import_module("llamafactory.v1.launcher")
    patches.undo("llamafactory.v1.launcher")
    monkeypatch.setattr(launcher, "launch", lambda: "v1")
    patches.after_v1_launcher(launcher)
    (tmp_path / "ours.yaml").write_text("model: x\nstage: 'ddm'  # diffusion\n")
    (tmp_path / "theirs.yaml").write_text("model: x\n# stage: ddm\nname: 'stage: ddm'\n")
    (tmp_path / "ours.json").write_text('{"model": "x",\n "stage": "ddm"}')
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("USE_V1", "1")
    monkeypatch.setattr(sys, "argv", ["llamafactory-cli", *words])
    if refused:
        with pytest.raises(ValueError, match="USE_V1=1 selects LLaMA-Factory's v1 trainer"):
            launcher.launch()
    else:
        assert launcher.launch() == "v1"
    patches.undo("llamafactory.v1.launcher")


def in_a_child(queue):
    import llamafactory.hparams.parser as parser

    from llamafactory_ddm._autoload import activate

    activate()
    queue.put(parser._TRAIN_ARGS[3].__name__)


def test_a_spawned_process_is_patched_even_when_the_parser_is_loaded_already():
    context = multiprocessing.get_context("spawn")
    queue = context.Queue()
    child = context.Process(target=in_a_child, args=(queue,))
    child.start()
    assert queue.get(timeout=LIMIT) == "DiffusionFinetuningArguments"
    child.join()


IMPORT = """
import sys
before = list(sys.meta_path)
import llamafactory_ddm, llamafactory_ddm.cli.main, llamafactory_ddm._autoload, llamafactory_ddm._launcher
assert sys.meta_path == before
assert not {"llamafactory", "torch", "transformers"} & set(sys.modules), "an import that should not be"
import llamafactory_ddm.diffusion
assert sys.meta_path == before and "llamafactory" not in sys.modules
print(llamafactory_ddm.__version__)
"""


def test_importing_the_package_changes_nothing():
    done = subprocess.run(
        [sys.executable, "-c", IMPORT],
        env={**os.environ, "TORCH_DEVICE_BACKEND_AUTOLOAD": "0"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0 and done.stdout.strip(), done.stderr
