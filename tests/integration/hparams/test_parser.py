"""What upstream's parser makes of our keys: in a dict, on the command line, alone and together with its own."""

import copy
import pickle

import pytest

from llamafactory_ddm.integration.hparams.stages import requested_stage


def words_of(keys):
    return [word for key, value in keys.items() for word in (f"--{key}", str(value))]


def test_our_stage_rides_on_its_base_and_keeps_its_keys(upstream, basic):
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
def test_what_the_plugin_notes_is_no_key(upstream, basic, key):
    with pytest.raises(ValueError, match=f"unknown key '{key}'"):
        upstream[0].get_train_args(basic(**{key: "ddm"}))


def test_command_line_words_work_as_a_dict_does(upstream, basic):
    given = upstream[0].get_train_args(words_of(basic(anneal_steps=5, shift="false")))[3]
    assert (given.diffusion_stage, given.anneal_steps, given.shift) == ("ddm", 5, False)


def test_a_yaml_with_overrides_works_as_a_dict_does(upstream, basic, tmp_path, monkeypatch):
    import sys

    from omegaconf import OmegaConf

    OmegaConf.save(basic(anneal_steps=5, loss_norm="masked"), tmp_path / "x.yaml")
    monkeypatch.setattr(sys, "argv", ["llamafactory-cli", str(tmp_path / "x.yaml"), "anneal_steps=9", "shift=false"])
    given = upstream[0].get_train_args()[3]
    assert (given.diffusion_stage, given.anneal_steps, given.loss_norm, given.shift) == ("ddm", 9, "masked", False)


def test_generation_needs_no_data_set(upstream, basic):
    keys = basic(do_predict=True)
    del keys["do_train"], keys["dataset"]
    training_args = upstream[0].get_train_args(keys)[2]
    assert training_args.do_predict and not training_args.do_train


@pytest.mark.parametrize("wanted", [True, False])
def test_predict_with_generate_is_hidden_from_upstreams_checks_and_given_back(upstream, basic, monkeypatch, wanted):
    """Upstream wants it for sft alone, with a data set and packages for its metrics."""
    parser = upstream[0]
    checked = []
    monkeypatch.setattr(parser, "check_version", lambda requirement, mandatory=False: checked.append(requirement))
    training_args = parser.get_train_args(basic(do_predict=True, predict_with_generate=wanted))[2]
    assert (training_args.do_predict, training_args.predict_with_generate) == (True, wanted)
    assert "jieba" not in checked


def test_what_upstream_checks_for_the_base_stage_still_holds(upstream, basic):
    with pytest.raises(ValueError, match="eval_dataset"):
        upstream[0].get_train_args(basic(do_eval=True))


def test_other_stages_are_untouched(upstream, basic):
    parser = upstream[0]
    given = parser.get_train_args(basic(stage="sft", finetuning_type="lora"))[3]
    assert (given.stage, given.diffusion_stage, given.to_dict()["stage"]) == ("sft", None, "sft")
    with pytest.raises(ValueError, match="predict_with_generate"):
        parser.get_train_args(basic(stage="sft", finetuning_type="lora", do_predict=True))
    # argparse takes an unambiguous beginning for the word.
    words = words_of(basic(stage="pt"))
    words[words.index("--finetuning_type")] = "--finetuning_ty"
    assert parser.get_train_args(words)[3].finetuning_type == "full"


@pytest.mark.parametrize("key", ["use_mca", "use_hyper_parallel", "use_unsloth", "use_kt", "enable_liger_kernel"])
def test_keys_of_other_stages_are_not_judged(upstream, basic, key):
    """Ours are refused with our words, theirs are upstream's affair."""
    parser = upstream[0]
    parsed = parser._parse_train_args(basic(stage="pt", **({key: True} if known(parser, key) else {})))
    assert parsed[3].diffusion_stage is None


def known(parser, key):
    return any(key in kind.__dataclass_fields__ for kind in parser._TRAIN_ARGS)


@pytest.mark.parametrize(
    ("keys", "words"),
    [
        ({"anneal_step": 5}, "unknown key 'anneal_step', did you mean 'anneal_steps'"),
        ({"learning_rat": 5}, "unknown key 'learning_rat', did you mean 'learning_rate'"),
        (
            {"anneal_step": 5, "zzzz": 1},
            "unknown key 'anneal_step', did you mean 'anneal_steps'.; unknown key 'zzzz'$",
        ),
        ({"stage": "dmd"}, "stage must be one of .*did you mean 'ddm'"),
        ({"stage": ["ddm"]}, "stage must be one of .*got .'ddm'."),
        ({"stage": None}, "stage must be one of .*got None"),
        ({"stage": "pt", "anneal_steps": 5}, "anneal_steps belongs to the diffusion stages .*stage is pt; set stage"),
        ({"loss_norm": "token"}, "did you mean 'tokens'"),
        ({"diffusion_steps": 0}, "diffusion_steps must be at least 1"),
        ({"uniform_ratio": 2}, r"uniform_ratio must lie in \[0, 1\]"),
        ({"finetuning_type": "oft"}, "finetuning_type must be one of full, freeze, lora, got 'oft'"),
        ({"use_mca": True}, "use_mca: True does not work with stage: ddm: Megatron"),
        ({"use_unsloth": True}, "use_unsloth: True does not work with stage: ddm"),
        ({"enable_liger_kernel": True}, "enable_liger_kernel: True does not work"),
        ({"shift_attn": True}, "shift_attn: True does not work"),
        ({"mixture_of_depths": "convert"}, "mixture_of_depths: convert does not work"),
        ({"use_kt": True}, "use_kt: True does not work"),
        ({"neat_packing": True}, "neat_packing: True does not work"),
        (
            {"moe_aux_loss_coef": 0.01},
            "moe_aux_loss_coef: 0.01 does not work with stage: ddm: a router's loss is no sum",
        ),
        ({"label_smoothing_factor": 0.1}, "label_smoothing_factor: 0.1 does not work"),
        ({"use_dft_loss": True}, "use_dft_loss: True does not work with stage: ddm: it is a loss of autoregressive"),
    ],
)
def test_wrong_keys(upstream, basic, tmp_path, keys, words):
    with pytest.raises(ValueError, match=words):
        upstream[0].get_train_args(basic(**keys))
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("key", ["use_hyper_parallel", "use_megatron_bridge"])
def test_trainers_that_not_every_version_has(upstream, basic, key):
    """A version without the key refuses it as unknown, one that has it as unfit."""
    parser, expected = upstream[0], f"unknown key '{key}'"
    if known(parser, key):
        expected = f"{key}: True does not work with stage: ddm"
    with pytest.raises(ValueError, match=expected):
        parser.get_train_args(basic(**{key: True}))


def test_a_trainer_that_a_later_version_adds_is_refused(upstream, basic):
    from llamafactory_ddm.integration.hparams.parser import check_together

    _, _, training_args, finetuning_args, _ = upstream[0].get_train_args(basic())
    check_together(finetuning_args, training_args)
    finetuning_args.use_megatron_bridge = True
    with pytest.raises(ValueError, match="use_megatron_bridge: True does not work with stage: ddm"):
        check_together(finetuning_args, training_args)


def test_a_misspelt_word_on_the_command_line(upstream, tmp_path):
    with pytest.raises(ValueError, match="unknown key 'anneal_step', did you mean 'anneal_steps'"):
        upstream[0].get_train_args(["--stage", "ddm", "--anneal_step", "3", "--output_dir", str(tmp_path)])


@pytest.mark.parametrize("name", ["USE_MCA", "USE_MEGATRON_BRIDGE", "USE_V1"])
def test_environment_variables_that_lead_elsewhere(upstream, basic, monkeypatch, name):
    monkeypatch.setenv(name, "1")
    with pytest.raises(ValueError, match=f"{name}=1 selects .*; unset {name}"):
        upstream[0].get_train_args(basic())
    monkeypatch.setenv(name, "0")
    upstream[0].get_train_args(basic())


def test_an_abbreviated_stage_cannot_slip_past_the_environment(upstream, basic, monkeypatch):
    monkeypatch.setenv("USE_MEGATRON_BRIDGE", "1")
    words = words_of(basic())
    words[words.index("--stage")] = "--stag"
    with pytest.raises(ValueError, match="USE_MEGATRON_BRIDGE=1 selects Megatron Bridge"):
        upstream[0].get_train_args(words)


def test_chat_says_what_to_do_and_export_is_noted(upstream):
    parser = upstream[0]
    keys = {"model_name_or_path": "nowhere", "stage": "ddm", "finetuning_type": "full"}
    with pytest.raises(ValueError, match="does not serve stage: ddm; generate with do_predict: true"):
        parser.get_infer_args(keys)
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
def test_the_stage_that_raw_arguments_ask_for(args, stage):
    assert requested_stage(args) == stage
