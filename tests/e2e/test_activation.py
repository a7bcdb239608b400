"""Every way to start or install LLaMA-Factory activates the plugin; an unsupported upstream does not."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from llamafactory_ddm import __version__
from support.cli import QUIET, ROOT, SCRIPTS, run
from support.limits import LIMIT

ACTIVE = f"`llamafactory-ddm` version: {__version__} (active)"
OFF = {"TORCH_DEVICE_BACKEND_AUTOLOAD": "0"}


def site_packages():
    import torch

    return Path(torch.__file__).parents[1]


def link_environment(folder, *, without=("llamafactory_ddm", "__editable__")):
    """Link everything that is installed here, except for what `without` names, into another environment."""
    folder.mkdir()
    for entry in site_packages().iterdir():
        if not entry.name.startswith(without) and entry.suffix != ".pth":
            (folder / entry.name).symlink_to(entry)
    return folder


def python(*words, path, env=None, check=True):
    """Run this Python with `path` in place of its own site-packages."""
    done = subprocess.run(
        [sys.executable, "-S", *words],
        env={**os.environ, **QUIET, **(env or {}), "PYTHONPATH": str(path)},
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=LIMIT,
        check=False,
    )
    assert not check or done.returncode == 0, done.stderr[-3000:]
    return done


def test_env_prints_that_the_plugin_is_active():
    assert ACTIVE in run("env", fresh=True).stdout
    assert (SCRIPTS / "lmf").read_bytes() == (SCRIPTS / "llamafactory-cli").read_bytes()  # the other name for it


@pytest.mark.slow
def test_help():
    text = " ".join(run("train", "-h", check=False).stdout.split())
    assert "--anneal_steps" in text
    assert "Diffusion: " in text and "ddm-sft" in text


@pytest.mark.slow
def test_the_explicit_launcher_needs_no_autoload():
    """The others do, as `test_doctor` shows."""
    assert ACTIVE in run("env", program="llamafactory-ddm", env=OFF, fresh=True).stdout


@pytest.mark.slow
def test_an_autoregressive_model_is_not_served_under_our_stage():
    words = ("model_name_or_path=data/tiny_gpt2", "template=empty", "stage=ddm", "finetuning_type=full")
    done = run("chat", "examples/tiny_gpt2_inference.yaml", *words, env={"ALLOW_EXTRA_ARGS": "1"}, check=False)
    assert done.returncode != 0
    assert re.search(r"data/tiny_gpt2.*set mask_token and shift", done.stderr)


@pytest.mark.slow
def test_the_v1_trainer_is_refused():
    done = run("train", "examples/tiny_gpt2_full_ddm.yaml", env={"USE_V1": "1"}, check=False)
    assert done.returncode != 0
    assert re.search("USE_V1=1 .*unset USE_V1", done.stderr)


@pytest.fixture(scope="module")
def wheel(tmp_path_factory):
    """The package as a wheel installs it."""
    target = tmp_path_factory.mktemp("wheel") / "site"
    source = tmp_path_factory.mktemp("source") / "tree"
    source.mkdir()
    for name in ("src", "setup.py", "pyproject.toml", "README.md", "LICENSE"):
        (source / name).symlink_to(ROOT / name)
    words = [sys.executable, "-m", "pip", "install", "-q", "--no-deps", "--target", str(target), "."]
    copy = source.parent / "copy"
    subprocess.run(["cp", "-rL", str(source), str(copy)], check=True)
    subprocess.run(words, cwd=copy, check=True, capture_output=True, timeout=LIMIT)
    return target


@pytest.mark.slow
def test_a_wheel_install_is_active(tmp_path, wheel):
    """Started as a module, too."""
    environment = link_environment(tmp_path / "site")
    assert ACTIVE in python("-m", "llamafactory.cli", "env", path=f"{environment}{os.pathsep}{wheel}").stdout


WITHOUT = """
import llamafactory.hparams.parser as parser, llamafactory.train.tuner as tuner
from llamafactory.extras.constants import TRAINING_STAGES
assert "ddm" not in TRAINING_STAGES.values()
assert parser._TRAIN_ARGS[3].__module__ == "llamafactory.hparams.finetuning_args"
assert tuner.run_pt.__module__ == "llamafactory.train.pt.workflow"
try:
    tuner.run_exp({"stage": "ddm", "anneal_steps": 3, "model_name_or_path": "x", "output_dir": "x"})
except ValueError as error:
    print("refused:", error)
import sys
from llamafactory.cli import main
sys.argv[:] = ["llamafactory-cli", "env"]
main()
"""


@pytest.mark.slow
def test_without_the_plugin_upstream_is_unchanged(tmp_path):
    environment = link_environment(tmp_path / "site")
    written = python("-c", WITHOUT, path=environment).stdout
    assert "refused: Some keys are not used" in written
    assert "`llamafactory` version: " in written and "llamafactory-ddm" not in written


UNFIT = """
import torch, llamafactory.hparams.parser as parser
from llamafactory.hparams import get_infer_args, get_train_args
words = {"model_name_or_path": "x", "output_dir": "x", "dataset": "x", "do_train": True, "report_to": "none"}
assert get_train_args({**words, "stage": "pt"})[3].stage == "pt"
for call, keys in ((get_train_args, {**words, "anneal_steps": 3}), (get_infer_args, {"model_name_or_path": "x"})):
    try:
        call({**keys, "stage": "ddm"})
    except ValueError as error:
        print("refused:", error)
from llamafactory_ddm.cli.main import doctor
print("doctor:", doctor())
"""


@pytest.mark.slow
def test_an_unsupported_upstream_leaves_every_other_stage_working(tmp_path, wheel):
    """The installed LLaMA-Factory with the metadata of another version."""
    from importlib import metadata

    version = metadata.version("llamafactory")
    environment = link_environment(tmp_path / "site", without=("llamafactory_ddm", "__editable__", "llamafactory-"))
    info = environment / "llamafactory-9.9.9.dist-info"
    info.mkdir()
    real = next(
        path
        for path in (Path(entry) / f"llamafactory-{version}.dist-info" / "METADATA" for entry in sys.path)
        if path.is_file()
    )
    (info / "METADATA").write_text(
        real.read_text(encoding="utf-8").replace(f"Version: {version}", "Version: 9.9.9", 1)
    )
    # -S does not pass on to the process that doctor starts; PYTHONPATH does.
    done = python("-c", UNFIT, path=f"{environment}{os.pathsep}{wheel}")
    reason = r"llamafactory 9\.9\.9 .*>=0\.9\.4,<0\.9\.7"
    assert len(re.findall(rf"\[llamafactory_ddm\] NOT ACTIVE: {reason}", done.stderr)) == 1
    assert len(re.findall(f"refused: stage: ddm .*{reason}", done.stdout)) == 2
    assert re.search(f"^NOT ACTIVE: {reason}", done.stdout, re.MULTILINE)
    assert "doctor: 1" in done.stdout


STUB = {
    "__init__": "",
    "hparams/__init__": "",
    "hparams/parser": "import torch\nFinetuningArguments = object\nprint('parsed by', torch.__name__)",
    "train/__init__": "",
    "train/tuner": "import importlib.util, sys\ndef run_exp():\n"
    "    print([importlib.util.find_spec(n) for n in ('diffusion', 'integration', 'cli')], sys.argv[1:])",
}


@pytest.fixture
def stub(tmp_path):
    """The folder of a package called llamafactory that has another structure than upstream."""
    for name, text in STUB.items():
        path = tmp_path / "stub" / "llamafactory" / f"{name}.py"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    return tmp_path / "stub"


def test_an_upstream_of_another_structure(stub):
    """With torch imported first, as upstream does, and with torch imported by the parser."""
    package = ROOT / "src"
    path = {"PYTHONPATH": f"{stub}{os.pathsep}{package}"}
    done = run("-c", "import torch, llamafactory.hparams.parser", program=sys.executable, env=path)
    assert "parsed by torch" in done.stdout
    (line,) = (line for line in done.stderr.splitlines() if "NOT ACTIVE" in line)
    assert line.startswith("[llamafactory_ddm] NOT ACTIVE: llamafactory.hparams.parser ") and "_parse_args" in line
    done = run("-c", "import llamafactory.hparams.parser", program=sys.executable, env=path)
    assert "parsed by torch" in done.stdout
    assert len(re.findall(r"NOT ACTIVE: llamafactory\.hparams\.parser .*\btorch\b", done.stderr)) == 1


@pytest.mark.parametrize("by_torchrun", [True, False])
@pytest.mark.parametrize("name", ["llamafactory.train.tuner", "llamafactory.hparams.parser"])
def test_a_module_that_imports_torch_itself(name, by_torchrun, monkeypatch, capsys):
    """torchrun's processes import the tuner first; it is patched when a diffusion stage is parsed."""
    from types import ModuleType, SimpleNamespace

    from llamafactory_ddm import _autoload

    module = ModuleType(name)
    module.__spec__ = SimpleNamespace(_initializing=True)
    monkeypatch.setitem(sys.modules, name, module)
    monkeypatch.setattr(_autoload, "HOOKS", {name: "nowhere:nothing"})
    monkeypatch.setattr(_autoload, "_printed", set())
    monkeypatch.setattr(sys, "meta_path", [f for f in sys.meta_path if not isinstance(f, _autoload._Finder)])
    monkeypatch.setattr(_autoload._errors, "install", lambda: None)
    monkeypatch.delenv(_autoload.DISABLE, raising=False)
    monkeypatch.delenv("TORCHELASTIC_RUN_ID", raising=False)
    if by_torchrun:
        monkeypatch.setenv("TORCHELASTIC_RUN_ID", "1")
    _autoload.activate()
    assert isinstance(sys.meta_path[0], _autoload._Finder)
    assert ("NOT ACTIVE" in capsys.readouterr().err) == (name.endswith("parser") or not by_torchrun)


@pytest.mark.slow
def test_doctor(stub):
    done = run("doctor", program="llamafactory-ddm", fresh=True)
    assert re.search("^active: ", done.stdout, re.MULTILINE)
    path = {"PYTHONPATH": f"{stub}{os.pathsep}{ROOT / 'src'}"}  # where the plugin is off, a stub will do
    for name, value in (*OFF.items(), ("LLAMAFACTORY_DDM_DISABLE", "1")):
        done = run("doctor", program="llamafactory-ddm", env={name: value, **path}, check=False, fresh=True)
        assert done.returncode == 1
        assert "NOT ACTIVE" in done.stdout and f"{name}{'=0' if value == '0' else ''} turns it off" in done.stdout


@pytest.mark.slow
def test_our_modules_are_not_top_level_ones_in_torchruns_children(stub, tmp_path):
    """Python adds the launcher's folder to sys.path, where our modules would be importable as top-level ones."""
    launcher = ROOT / "src" / "llamafactory_ddm" / "_launcher.py"
    done = subprocess.run(
        [sys.executable, "-S", str(launcher), "x.yaml", "a=b"],
        env={**os.environ, **QUIET, **OFF, "PYTHONPATH": str(stub)},
        cwd=tmp_path,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.stdout.strip() == "[None, None, None] ['x.yaml', 'a=b']", done.stderr


@pytest.mark.slow
def test_a_failure_in_the_plugin_never_breaks_torch(tmp_path, wheel, stub):
    """The plugin's file raises an error when it is imported, as soon as a module has the name of upstream's."""
    broken = tmp_path / "broken"
    subprocess.run(["cp", "-r", str(wheel), str(broken)], check=True)
    (broken / "llamafactory_ddm" / "integration" / "patches" / "table.py").write_text("raise OSError('damaged')")
    environment = link_environment(tmp_path / "site")
    path = os.pathsep.join(map(str, (stub, environment, broken)))
    done = python("-c", "import torch, llamafactory.hparams.parser; print('fine')", path=path)
    assert "fine" in done.stdout
    assert done.stderr.count("[llamafactory_ddm] NOT ACTIVE: damaged") == 1
