"""The patch table, in this process: applied to upstream's real modules and undone again."""

import copy
import multiprocessing
import pickle
import sys

import pytest


@pytest.fixture
def upstream():
    """Upstream's parser and tuner with the patches applied; afterwards everything is as it was."""
    import llamafactory.hparams.parser as parser
    import llamafactory.train.tuner as tuner

    from llamafactory_ddm.integration import patches

    was_active = patches.is_active()
    if not was_active:
        patches.after_parser(parser)
    yield parser, tuner, patches
    if patches.is_active() and not was_active:
        patches.undo()
    if was_active and not patches.is_active():
        patches.after_parser(parser)


def picture(parser, tuner):
    import llamafactory.hparams
    from llamafactory.extras.constants import TRAINING_STAGES

    names = ("_parse_args", "_parse_train_args", "get_train_args", "get_infer_args")
    return {
        "functions": [getattr(parser, n) for n in names],
        "bound": [llamafactory.hparams.get_train_args, tuner.get_train_args, tuner.run_pt, tuner.run_sft],
        "lists": [list(parser._TRAIN_ARGS), list(parser._INFER_ARGS), list(parser._EVAL_ARGS)],
        "labels": dict(TRAINING_STAGES),
    }


def basic(tmp_path, **keys):
    return {
        "model_name_or_path": "nowhere",
        "stage": "ddm",
        "do_train": True,
        "finetuning_type": "full",
        "dataset": "x",
        "output_dir": str(tmp_path / "out"),
        "report_to": "none",
        **keys,
    }


def test_applied_once_and_undone_to_the_last_name(upstream):
    parser, tuner, patches = upstream
    patches._patch_tuner()
    active = picture(parser, tuner)
    patches.after_parser(parser)
    assert picture(parser, tuner) == active
    patches.undo()
    assert not patches.is_active()
    plain = picture(parser, tuner)
    assert "Diffusion Adaptation" not in plain["labels"]
    assert all(f.__module__.startswith("llamafactory.") and not hasattr(f, "__wrapped__") for f in plain["functions"])
    assert all(not hasattr(f, "__wrapped__") for f in plain["bound"])
    assert parser.FinetuningArguments in plain["lists"][0]
    patches.after_parser(parser)
    patches._patch_tuner()
    again = picture(parser, tuner)
    assert again["labels"] == active["labels"]
    assert again["lists"] == active["lists"]
    assert all(hasattr(f, "__wrapped__") for f in again["bound"])


def test_our_stage_rides_on_its_base_and_keeps_its_keys(upstream, tmp_path):
    parser, _, _ = upstream
    _, data_args, training_args, finetuning_args, generating_args = parser.get_train_args(
        basic(tmp_path, mask_token=7, anneal_steps=5, do_predict=True, dataset="x")
    )
    assert (finetuning_args.stage, finetuning_args.diffusion_stage) == ("pt", "ddm")
    assert (finetuning_args.mask_token, finetuning_args.anneal_steps) == (7, 5)
    assert training_args.do_predict
    assert data_args.packing
    assert finetuning_args.generating_args is generating_args
    assert finetuning_args.to_dict()["stage"] == "ddm"
    twin = pickle.loads(pickle.dumps(finetuning_args))
    assert (twin.diffusion_stage, twin.anneal_steps) == ("ddm", 5)
    assert copy.deepcopy(finetuning_args).diffusion_stage == "ddm"


def test_command_line_words_work_as_a_dict_does(upstream, tmp_path):
    parser, _, _ = upstream
    words = [
        w for key, value in basic(tmp_path, anneal_steps=5, shift="false").items() for w in (f"--{key}", str(value))
    ]
    finetuning_args = parser.get_train_args(words)[3]
    assert (finetuning_args.diffusion_stage, finetuning_args.anneal_steps, finetuning_args.shift) == ("ddm", 5, False)


def test_generation_needs_no_data_set(upstream, tmp_path):
    parser, _, _ = upstream
    keys = basic(tmp_path, do_predict=True)
    del keys["do_train"], keys["dataset"]
    training_args = parser.get_train_args(keys)[2]
    assert training_args.do_predict and not training_args.do_train


def test_other_stages_are_untouched(upstream, tmp_path):
    parser, _, _ = upstream
    finetuning_args = parser.get_train_args(basic(tmp_path, stage="sft", finetuning_type="lora"))[3]
    assert (finetuning_args.stage, finetuning_args.diffusion_stage) == ("sft", None)
    with pytest.raises(ValueError, match="predict_with_generate"):
        parser.get_train_args(basic(tmp_path, stage="sft", finetuning_type="lora", do_predict=True))


@pytest.mark.parametrize(
    ("keys", "words"),
    [
        ({"anneal_step": 5}, "unknown key 'anneal_step', did you mean 'anneal_steps'"),
        ({"learning_rat": 5}, "unknown key 'learning_rat', did you mean 'learning_rate'"),
        ({"stage": "dmd"}, "stage must be one of .*did you mean 'ddm'"),
        ({"stage": "pt", "anneal_steps": 5}, "anneal_steps belong to the diffusion stages"),
        ({"loss_norm": "token"}, "did you mean 'tokens'"),
        ({"diffusion_steps": 0}, "diffusion_steps must be at least 1"),
        ({"uniform_ratio": 2}, r"uniform_ratio must lie in \[0, 1\]"),
        ({"finetuning_type": "lora"}, "supports finetuning_type full, got lora"),
        ({"use_unsloth": True}, "use_unsloth: True does not work with stage: ddm"),
        ({"enable_liger_kernel": True}, "enable_liger_kernel: True does not work"),
        ({"shift_attn": True}, "shift_attn: True does not work"),
        ({"mixture_of_depths": "convert"}, "mixture_of_depths: convert does not work"),
        ({"use_kt": True}, "use_kt: True does not work"),
        ({"neat_packing": True}, "neat_packing: True does not work"),
        ({"label_smoothing_factor": 0.1}, "label_smoothing_factor: 0.1 does not work"),
        ({"use_hyper_parallel": True}, "use_hyper_parallel: True does not work"),
    ],
)
def test_wrong_keys(upstream, tmp_path, keys, words):
    parser, _, _ = upstream
    with pytest.raises(ValueError, match=words):
        parser.get_train_args(basic(tmp_path, **keys))
    assert not (tmp_path / "out").exists()


def test_a_misspelt_word_on_the_command_line(upstream, tmp_path):
    parser, _, _ = upstream
    with pytest.raises(ValueError, match="unknown key 'anneal_step', did you mean 'anneal_steps'"):
        parser.get_train_args(["--stage", "ddm", "--anneal_step", "3", "--output_dir", str(tmp_path)])


@pytest.mark.parametrize("name", ["USE_MCA", "USE_V1"])
def test_environment_variables_that_lead_elsewhere(upstream, tmp_path, monkeypatch, name):
    parser, _, _ = upstream
    monkeypatch.setenv(name, "1")
    with pytest.raises(ValueError, match=f"{name}=1 selects .*; unset {name}"):
        parser.get_train_args(basic(tmp_path))


def test_chat_and_export_say_what_to_do(upstream):
    parser, _, _ = upstream
    keys = {"model_name_or_path": "nowhere", "stage": "ddm", "finetuning_type": "full"}
    with pytest.raises(ValueError, match="do_predict: true"):
        parser.get_infer_args(keys)
    with pytest.raises(ValueError, match="nothing to export"):
        parser.get_infer_args({**keys, "export_dir": "x"})
    assert parser.get_infer_args({**keys, "stage": "sft"})[2].stage == "sft"


def test_an_autoregressive_stage_on_a_diffusion_model_is_warned_of(upstream, tmp_path, caplog):
    parser, _, _ = upstream
    (tmp_path / "diffusion_config.json").write_text("{}")
    parser.get_train_args(basic(tmp_path, stage="pt", model_name_or_path=str(tmp_path)))
    assert "is a diffusion model" in caplog.text


def test_run_pt_dispatches_by_stage(upstream, tmp_path, monkeypatch):
    parser, tuner, patches = upstream
    from llamafactory_ddm.integration import stages

    calls = []
    patches._patch_tuner()
    parsed = parser.get_train_args(basic(tmp_path))
    monkeypatch.setattr(stages.Stage, "load_runner", lambda self: lambda *args: calls.append((self.name, args)))
    model_args, data_args, training_args, finetuning_args, generating_args = parsed
    tuner.run_pt(model_args, data_args, training_args, finetuning_args, ["callback"])
    assert calls == [("ddm", (model_args, data_args, training_args, finetuning_args, generating_args, ["callback"]))]


@pytest.mark.parametrize("version", ["0.9.3", "0.9.7", "1.0.0", "0.9.7.dev0"])
def test_an_unsupported_upstream_is_named(upstream, monkeypatch, version):
    parser, _, patches = upstream
    monkeypatch.setattr(patches.metadata, "version", lambda name: version)
    assert f"llamafactory {version} is not supported" in patches.incompatibilities(parser)[0]


@pytest.mark.parametrize("version", ["0.9.4", "0.9.5", "0.9.6.dev0"])
def test_supported_versions(upstream, monkeypatch, version):
    parser, _, patches = upstream
    patches.undo()
    monkeypatch.setattr(patches.metadata, "version", lambda name: version)
    assert patches.incompatibilities(parser) == []


def test_a_changed_upstream_is_noticed(upstream, monkeypatch):
    parser, _, patches = upstream
    patches.undo()
    monkeypatch.setattr(parser, "_parse_args", lambda words: None)
    assert patches.incompatibilities(parser) == ["llamafactory.hparams.parser._parse_args has changed"]
    with pytest.raises(patches.IncompatibleUpstream):
        patches.after_parser(parser)
    assert patches.status() == "llamafactory.hparams.parser._parse_args has changed"


def test_a_key_that_upstream_took_is_noticed(upstream, monkeypatch):
    from dataclasses import make_dataclass

    parser, _, patches = upstream
    patches.undo()
    monkeypatch.setattr(parser, "_INFER_ARGS", [make_dataclass("Rival", [("shift", bool)])])
    assert patches.incompatibilities(parser) == ["llamafactory's Rival has keys of ours: shift"]


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
    assert queue.get(timeout=120) == "DiffusionFinetuningArguments"
    child.join()


def test_importing_the_package_changes_nothing():
    import subprocess

    words = (
        "import sys; before = list(sys.meta_path); import llamafactory_ddm, llamafactory_ddm.diffusion;"
        "assert 'llamafactory' not in sys.modules; print(llamafactory_ddm.__version__)"
    )
    environment = {"TORCH_DEVICE_BACKEND_AUTOLOAD": "0"}
    import os

    done = subprocess.run(
        [sys.executable, "-c", words], env={**os.environ, **environment}, capture_output=True, text=True, check=True
    )
    assert done.stdout.strip()
