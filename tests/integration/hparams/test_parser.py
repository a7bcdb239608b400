"""Upstream's parser with our keys: in a dict and on the command line, alone and together with upstream's keys."""

import copy
import pickle

import pytest

from llamafactory_ddm.integration.hparams.stages import requested_stage


def to_argv(keys):
    return [word for key, value in keys.items() for word in (f"--{key}", str(value))]


def test_our_stage_is_parsed_as_its_base_stage_and_keeps_its_keys(upstream, basic):
    _, data_args, training_args, finetuning_args, generating_args = upstream[0].get_train_args(
        basic(mask_token=7, anneal_steps=5, do_predict=True)
    )
    assert (finetuning_args.stage, finetuning_args.diffusion_stage) == ("pt", "ddm")
    assert (finetuning_args.mask_token, finetuning_args.anneal_steps) == (7, 5)
    assert training_args.do_predict
    assert data_args.packing
    assert finetuning_args.parsed.generating_args is generating_args
    assert (finetuning_args.to_dict()["stage"], finetuning_args.to_dict()["anneal_steps"]) == ("ddm", 5)
    twin = pickle.loads(pickle.dumps(finetuning_args))
    assert (twin.diffusion_stage, twin.anneal_steps) == ("ddm", 5)
    assert copy.deepcopy(finetuning_args).diffusion_stage == "ddm"


@pytest.mark.parametrize("key", ["diffusion_stage", "parsed"])
def test_attributes_of_the_plugin_are_not_keys(upstream, basic, key):
    with pytest.raises(ValueError, match=f"unknown .*'{key}'"):
        upstream[0].get_train_args(basic(**{key: "ddm"}))


def test_command_line_options_work_as_a_dict_does(upstream, basic):
    finetuning_args = upstream[0].get_train_args(to_argv(basic(anneal_steps=5, shift="false")))[3]
    assert (finetuning_args.diffusion_stage, finetuning_args.anneal_steps, finetuning_args.shift) == ("ddm", 5, False)


def test_a_yaml_with_overrides_works_as_a_dict_does(upstream, basic, tmp_path, monkeypatch):
    import sys

    from omegaconf import OmegaConf

    OmegaConf.save(basic(anneal_steps=5, loss_norm="masked"), tmp_path / "x.yaml")
    monkeypatch.setattr(sys, "argv", ["llamafactory-cli", str(tmp_path / "x.yaml"), "anneal_steps=9", "shift=false"])
    finetuning_args = upstream[0].get_train_args()[3]
    assert (finetuning_args.diffusion_stage, finetuning_args.anneal_steps) == ("ddm", 9)
    assert (finetuning_args.loss_norm, finetuning_args.shift) == ("masked", False)


def test_generation_needs_no_data_set(upstream, basic):
    keys = basic(do_predict=True)
    del keys["do_train"], keys["dataset"]
    training_args = upstream[0].get_train_args(keys)[2]
    assert training_args.do_predict and not training_args.do_train


@pytest.mark.parametrize("value", [True, False])
def test_predict_with_generate_is_hidden_from_upstreams_checks_and_restored(upstream, basic, monkeypatch, value):
    """Upstream allows it for sft only, with a data set and the packages of its metrics."""
    parser = upstream[0]
    checked = []
    monkeypatch.setattr(parser, "check_version", lambda requirement, mandatory=False: checked.append(requirement))
    training_args = parser.get_train_args(basic(do_predict=True, predict_with_generate=value))[2]
    assert (training_args.do_predict, training_args.predict_with_generate) == (True, value)
    assert "jieba" not in checked


def test_what_upstream_checks_for_the_base_stage_still_holds(upstream, basic):
    with pytest.raises(ValueError, match="eval_dataset"):
        upstream[0].get_train_args(basic(do_eval=True))


def test_other_stages_are_untouched(upstream, basic):
    parser = upstream[0]
    arguments = parser.get_train_args(basic(stage="sft", finetuning_type="lora"))[3]
    assert (arguments.stage, arguments.diffusion_stage, arguments.to_dict()["stage"]) == ("sft", None, "sft")
    with pytest.raises(ValueError, match="predict_with_generate"):
        parser.get_train_args(basic(stage="sft", finetuning_type="lora", do_predict=True))
    # argparse allows unambiguous abbreviations.
    argv = to_argv(basic(stage="pt"))
    argv[argv.index("--finetuning_type")] = "--finetuning_ty"
    assert parser.get_train_args(argv)[3].finetuning_type == "full"


@pytest.mark.parametrize("key", ["use_mca", "use_hyper_parallel", "use_unsloth", "use_kt", "enable_liger_kernel"])
def test_unsupported_keys_are_refused_under_our_stages_only(upstream, basic, key):
    parser = upstream[0]
    parsed = parser._parse_train_args(basic(stage="pt", **({key: True} if known(parser, key) else {})))
    assert parsed[3].diffusion_stage is None


def known(parser, key):
    return any(key in kind.__dataclass_fields__ for kind in parser._TRAIN_ARGS)


@pytest.mark.parametrize(
    ("keys", "pattern"),
    [
        ({"anneal_step": 5}, "'anneal_step'.*'anneal_steps'"),
        ({"learning_rat": 5}, "'learning_rat'.*'learning_rate'"),
        ({"anneal_step": 5, "zzzz": 1}, "'anneal_step'.*'anneal_steps'.*'zzzz'$"),
        ({"stage": "dmd"}, "^stage .*'dmd'.*'ddm'"),
        ({"stage": ["ddm"]}, r"^stage .*\['ddm'\]"),
        ({"stage": None}, "^stage .*None"),
        ({"stage": "pt", "anneal_steps": 5}, "^anneal_steps .*stage is pt.*stage: ddm"),
        ({"loss_norm": "token"}, "^loss_norm .*'tokens'"),
        ({"diffusion_steps": 0}, "^diffusion_steps .* 1 .* 0"),
        ({"uniform_ratio": 2}, r"^uniform_ratio .*\[0, 1\].* 2"),
        ({"finetuning_type": "oft"}, "^finetuning_type .*full, freeze, lora.*'oft'.*stage: ddm"),
        ({"use_mca": True}, "^use_mca: True .*stage: ddm.*Megatron"),
        ({"use_unsloth": True}, "^use_unsloth: True .*stage: ddm"),
        ({"enable_liger_kernel": True}, "^enable_liger_kernel: True .*stage: ddm"),
        ({"shift_attn": True}, "^shift_attn: True .*stage: ddm"),
        ({"mixture_of_depths": "convert"}, "^mixture_of_depths: convert .*stage: ddm"),
        ({"use_kt": True}, "^use_kt: True .*stage: ddm"),
        ({"neat_packing": True}, "^neat_packing: True .*stage: ddm"),
        ({"moe_aux_loss_coef": 0.01}, "^moe_aux_loss_coef: 0.01 .*stage: ddm"),
        ({"label_smoothing_factor": 0.1}, "^label_smoothing_factor: 0.1 .*stage: ddm"),
        ({"use_dft_loss": True}, "^use_dft_loss: True .*stage: ddm"),
        ({"hyper_parallel_args": "a.json"}, "hyper_parallel_args"),  # 0.9.4 rejects it as unknown
    ],
)
def test_wrong_keys(upstream, basic, tmp_path, keys, pattern):
    with pytest.raises(ValueError, match=pattern):
        upstream[0].get_train_args(basic(**keys))
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("key", ["use_hyper_parallel", "use_megatron_bridge"])
def test_trainers_that_not_every_version_has(upstream, basic, key):
    """A version without the key refuses it as unknown, one with the key as unsupported."""
    parser = upstream[0]
    with pytest.raises(ValueError, match=f"^{key}: True .*stage: ddm" if known(parser, key) else f"unknown .*'{key}'"):
        parser.get_train_args(basic(**{key: True}))


@pytest.mark.parametrize(
    ("key", "default", "value"),
    [
        ("use_megatron_bridge", False, True),
        ("num_mtp_layers", 0, 1),
        ("mtp_loss_weight", 0.0, 0.3),
        ("hyper_parallel_cp_size", 1, 2),
        ("ulysses_context_parallel_size", 1, 2),
    ],
)
def test_a_key_that_a_later_version_adds_is_refused(upstream, basic, key, default, value):
    from llamafactory_ddm.integration.hparams.parser import check_supported

    _, _, training_args, finetuning_args, _ = upstream[0].get_train_args(basic())
    setattr(finetuning_args, key, default)
    check_supported(finetuning_args, training_args)
    setattr(finetuning_args, key, value)
    with pytest.raises(ValueError, match=f"^{key}: {value} .*stage: ddm"):
        check_supported(finetuning_args, training_args)


def test_a_misspelt_option_on_the_command_line(upstream, tmp_path):
    with pytest.raises(ValueError, match=r"'anneal_step'.*'anneal_steps'"):
        upstream[0].get_train_args(["--stage", "ddm", "--anneal_step", "3", "--output_dir", str(tmp_path)])


@pytest.mark.parametrize("name", ["USE_MCA", "USE_MEGATRON_BRIDGE", "USE_V1"])
def test_environment_variables_that_select_another_trainer(upstream, basic, monkeypatch, name):
    monkeypatch.setenv(name, "1")
    with pytest.raises(ValueError, match=f"^{name}=1 .*unset {name}"):
        upstream[0].get_train_args(basic())
    monkeypatch.setenv(name, "0")
    upstream[0].get_train_args(basic())


def test_environment_variables_are_checked_under_an_abbreviated_stage(upstream, basic, monkeypatch):
    monkeypatch.setenv("USE_V1", "1")  # for the other variables, 0.9.6 first requires their packages
    argv = to_argv(basic())
    argv[argv.index("--stage")] = "--stag"
    with pytest.raises(ValueError, match=r"^USE_V1=1 "):
        upstream[0].get_train_args(argv)


def test_chat_keeps_the_keys_and_export_is_noted(upstream):
    parser = upstream[0]
    keys = {"model_name_or_path": "nowhere", "stage": "ddm", "finetuning_type": "full"}
    served = parser.get_infer_args({**keys, "top_p": 0.5})
    assert served[2].diffusion_stage == "ddm" and "top_p" in served[2].parsed.user_keys
    with pytest.raises(ValueError, match=r"shift_attn"):
        parser.get_infer_args({**keys, "shift_attn": True})
    exported = parser.get_infer_args({**keys, "export_dir": "x"})
    assert exported[0].exported_diffusion is exported[2]
    assert parser.get_infer_args({**keys, "stage": "sft"})[2].stage == "sft"


@pytest.mark.parametrize(
    ("args", "stage"),
    [
        ({"stage": "ddm"}, "ddm"),
        ({"stage": ["ddm"]}, None),
        ({}, None),
        (["--stage", "ddm"], "ddm"),
        (["--stage=ddm", "--x", "--stage", "pt"], "pt"),
        (["--stage"], None),
        (None, None),
    ],
)
def test_the_stage_of_unparsed_arguments(args, stage):
    assert requested_stage(args) == stage
