"""The patch table, applied to upstream's modules in this process and undone again."""

import ast
import importlib
import inspect
import multiprocessing
import os
import re
import shutil
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


def snapshot():
    """Return the identity of everything that the table could change, and the content of lists and dicts."""
    names = {}
    for path in MODULES:
        for name, value in vars(importlib.import_module(path)).items():
            if not name.startswith("__"):
                names[path, name] = (id(value), repr(value) if isinstance(value, (list, dict)) else None)
    from llamafactory.hparams import FinetuningArguments

    return {**names, "post_init": id(FinetuningArguments.__post_init__)}


def apply_all(parser, patches):
    patches.after_parser(parser)
    for name in {patch.module for patch in patches.PATCHES}:
        importlib.import_module(name)
        patches.apply(name)


def test_the_table_is_applied_once_and_undone_completely(upstream):
    parser, _, patches = upstream
    for name in MODULES:
        importlib.import_module(name)
    patches.undo()
    plain = snapshot()
    apply_all(parser, patches)
    active = snapshot()
    lists = {name for name, value in vars(parser).items() if name.endswith("_ARGS") and value}
    assert lists >= {"_TRAIN_ARGS", "_INFER_ARGS", "_EVAL_ARGS"}
    # 0.9.4's v1 launcher has imported print_env by name.
    changed = {key for key in plain if plain[key] != active[key]} - {("llamafactory.v1.launcher", "print_env")}
    assert changed == {
        *{("llamafactory.hparams.parser", name) for name in ("_parse_args", "_parse_train_args", *lists)},
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
    assert len(in_place) == len(lists) + 1 and all(plain[key][0] == active[key][0] for key in in_place)
    apply_all(parser, patches)
    assert snapshot() == active
    patches.undo()
    assert snapshot() == plain
    assert not patches.is_active()


def test_every_row_has_a_reason_and_versions_and_is_documented(upstream):
    patches = upstream[2]
    table = (Path(__file__).parents[3] / "docs" / "patches.md").read_text(encoding="utf-8")
    for patch in patches.PATCHES:
        assert patch.why and patch.checked
        name = patch.target.removeprefix("llamafactory.").replace(":", ".")
        assert f"| `{name}` |" in table


def test_names_that_other_modules_imported_are_replaced_too(upstream):
    """Also outside of upstream, as in a script that imported them before the plugin was active."""
    parser, _, patches = upstream
    patches.undo()
    script = ModuleType("script_of_a_user")
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


def test_after_a_failure_nothing_is_changed_but_the_refusal_of_our_stages(upstream, monkeypatch):
    parser, _, patches = upstream
    patches.undo()
    plain = snapshot()

    def fail(original):
        raise OSError("broken\nhalfway")

    failing = [
        patches.Patch(patch.target, fail, patch.why) if patch.target.endswith("TRAINING_STAGES") else patch
        for patch in patches.PATCHES
    ]
    monkeypatch.setattr(patches, "PATCHES", tuple(failing))
    with pytest.raises(OSError, match="broken"):
        patches.after_parser(parser)
    assert (patches.is_active(), patches.status()) == (False, "broken halfway")
    assert {key for key, value in snapshot().items() if value != plain[key]} == {"post_init"}
    monkeypatch.undo()
    patches.after_parser(parser)
    assert patches.is_active()


def test_an_unsupported_upstream_refuses_our_stage_and_no_other(upstream, basic, monkeypatch):
    """Also in chat, serving and export, where upstream does not read the stage."""
    parser, _, patches = upstream
    patches.undo()
    monkeypatch.setattr("importlib.metadata.version", lambda name: "9.9.9")
    with pytest.raises(patches.IncompatibleUpstream, match=r"llamafactory 9\.9\.9 "):
        patches.after_parser(parser)
    pattern = r"^stage: ddm .*llamafactory 9\.9\.9 "
    inference = {"model_name_or_path": "nowhere", "finetuning_type": "full"}
    with pytest.raises(ValueError, match=pattern):
        parser.get_infer_args({**inference, "stage": "ddm"})
    with pytest.raises(ValueError, match=pattern):
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


def test_run_exp_passes_upstreams_callbacks_to_our_runner(upstream, basic, monkeypatch):
    _, tuner, _ = upstream
    from llamafactory_ddm.integration.hparams import stages

    calls = []
    monkeypatch.setattr(stages.Stage, "load_runner", lambda self: lambda *args: calls.append(args))
    tuner.run_exp(basic(temperature=0.3))
    ((*_, finetuning_args, generating_args, callbacks),) = calls
    assert (finetuning_args.diffusion_stage, generating_args.temperature) == ("ddm", 0.3)
    assert [type(callback).__name__ for callback in callbacks] == ["LogCallback", "ReporterCallback"]


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
    (problem,) = patches.incompatibilities(parser)
    assert f"llamafactory {version} " in problem and ">=0.9.4,<0.9.7" in problem


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
    """A function as if upstream had moved the parsing into it, so that it no longer calls what is replaced."""
    return args


@pytest.mark.parametrize(
    ("name", "value", "pattern"),
    [
        ("_parse_args", lambda args: None, r"\._parse_args "),
        ("get_train_args", inlined, r"\.get_train_args "),
        ("_parse_train_args", inlined, r"\._parse_train_args "),
        ("read_args", None, "parser .*read_args"),
        ("_TRAIN_ARGS", [], r"\._TRAIN_ARGS "),
        ("FinetuningArguments", make_dataclass("FinetuningArguments", [("stage", str)]), "stage.*FinetuningArguments"),
        ("_INFER_ARGS", [make_dataclass("Rival", [("shift", bool)])], "Rival .*: shift$"),
        ("_NEW_ARGS", [make_dataclass("Rival", [("shift", bool)])], "Rival .*: shift$"),
    ],
)
def test_a_changed_parser_is_noticed(upstream, monkeypatch, name, value, pattern):
    parser, _, patches = upstream
    patches.undo()
    monkeypatch.setattr(parser, name, value, raising=False)
    (problem,) = patches.incompatibilities(parser)
    assert re.search(pattern, problem)
    with pytest.raises(patches.IncompatibleUpstream):
        patches.after_parser(parser)
    assert patches.status() == problem


@pytest.mark.parametrize(
    ("old", "new", "pattern"),
    [
        ("run_pt(", "run_pretraining(", "_training_function .*not call run_pt$"),
        ("get_train_args(", "parse(", "_training_function .*not call get_train_args$"),
        ("def _training_function", "def train", "_training_function .*not call run_pt$"),
        ("run_sft(model_args, data_args", "run_sft(data_args, model_args", "_training_function .*run_sft .*arguments"),
        ("import os", "import os os", r"tuner\.py .*invalid syntax"),
        (None, None, r"tuner\.py .*No such file"),
    ],
)
def test_a_changed_dispatch_is_noticed(upstream, monkeypatch, tmp_path, old, new, pattern):
    parser, tuner, patches = upstream
    patches.undo()
    for folder in ("hparams", "train"):
        (tmp_path / folder).mkdir()
    if old is not None:
        source = inspect.getsource(tuner)
        assert old in source and ast.parse(source)
        (tmp_path / "train" / "tuner.py").write_text(source.replace(old, new), encoding="utf-8")
    monkeypatch.setattr(parser, "__file__", str(tmp_path / "hparams" / "parser.py"))
    assert re.search(pattern, patches.incompatibilities(parser)[0])


@pytest.mark.parametrize(
    ("file", "old", "new", "pattern"),
    [
        ("chat/hf_engine.py", "class HuggingfaceEngine(", "class TransformersEngine(", "HuggingfaceEngine"),
        ("chat/hf_engine.py", "finetuning_args:", "tuning_args:", r"HuggingfaceEngine\(.*finetuning_args"),
        ("chat/chat_model.py", "import HuggingfaceEngine", "import Engine", "chat_model.* HuggingfaceEngine"),
        ("chat/chat_model.py", "import get_infer_args", "import get_args", "chat_model.* get_infer_args"),
        ("chat/chat_model.py", "def run_chat", "def chat", r"chat_model\.py has no run_chat"),
        ("api/app.py", "def create_app(chat_model", "def create_app(model", "create_app"),
        ("api/app.py", "def run_api(", "def main(", "run_api"),
        ("api/chat.py", "def _process_request(", "def _convert(", "_process_request"),
        ("api/chat.py", "import os", "import os os", r"chat\.py .*invalid syntax"),
    ],
)
def test_changed_serving_is_noticed(upstream, monkeypatch, tmp_path, file, old, new, pattern):
    parser, _, patches = upstream
    patches.undo()
    root = Path(parser.__file__).parents[1]
    for folder in ("train", "chat", "api"):
        shutil.copytree(
            root / folder, tmp_path / folder, ignore=lambda _, names: {n for n in names if n[-3:] != ".py"}
        )
    shutil.copy(root / "train" / "tuner.py", tmp_path / "train")
    source = (tmp_path / file).read_text(encoding="utf-8")
    assert old in source
    (tmp_path / file).write_text(source.replace(old, new), encoding="utf-8")
    (tmp_path / "hparams").mkdir()
    monkeypatch.setattr(parser, "__file__", str(tmp_path / "hparams" / "parser.py"))
    (problem,) = patches.incompatibilities(parser)
    assert re.search(pattern, problem)


@pytest.mark.parametrize("is_ours", [True, False])
def test_run_chat_is_ours_for_a_diffusion_model(upstream, monkeypatch, is_ours):
    from types import SimpleNamespace

    from llamafactory_ddm.integration.chat import terminal
    from llamafactory_ddm.integration.resolve import serving_stage

    patches, calls = upstream[2], []
    chat_model = importlib.import_module("llamafactory.chat.chat_model")
    patches.undo("llamafactory.chat.chat_model")
    monkeypatch.setattr(chat_model, "run_chat", lambda: calls.append("upstream's"))
    patches.apply("llamafactory.chat.chat_model")
    monkeypatch.setattr(sys, "argv", ["llamafactory-cli", "--model_name_or_path", "nowhere"])
    monkeypatch.setattr(serving_stage, "serves_diffusion", lambda args: is_ours)
    monkeypatch.setattr(chat_model, "ChatModel", lambda: SimpleNamespace(engine="engine"))
    monkeypatch.setattr(terminal, "TerminalChat", lambda engine: SimpleNamespace(run=lambda: calls.append(engine)))
    chat_model.run_chat()
    assert calls == ["engine" if is_ours else "upstream's"]
    patches.undo("llamafactory.chat.chat_model")


@pytest.mark.parametrize(
    ("argv", "is_refused"),
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
def test_the_v1_launcher_refuses_our_stage(upstream, monkeypatch, tmp_path, argv, is_refused):
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
    monkeypatch.setattr(sys, "argv", ["llamafactory-cli", *argv])
    if is_refused:
        with pytest.raises(ValueError, match=r"^USE_V1=1 .*unset USE_V1"):
            launcher.launch()
    else:
        assert launcher.launch() == "v1"
    patches.undo("llamafactory.v1.launcher")


def put_name_of_arguments_class(queue):
    import llamafactory.hparams.parser as parser

    from llamafactory_ddm._autoload import activate

    activate()
    queue.put(parser._TRAIN_ARGS[3].__name__)


def test_a_spawned_process_is_patched_even_when_the_parser_is_loaded_already():
    context = multiprocessing.get_context("spawn")
    queue = context.Queue()
    child = context.Process(target=put_name_of_arguments_class, args=(queue,))
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


def test_importing_the_package_patches_nothing():
    done = subprocess.run(
        [sys.executable, "-c", IMPORT],
        env={**os.environ, "TORCH_DEVICE_BACKEND_AUTOLOAD": "0"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0 and done.stdout.strip(), done.stderr
