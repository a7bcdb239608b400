"""Upstream's pages with our fields, built without a server, and the commands that LlamaBoard makes of them."""

import json
import shutil
from dataclasses import replace

import pytest

from llamafactory_ddm.integration.hparams.stages import STAGES
from llamafactory_ddm.integration.webui.fields import CHAT_KEYS, ONE_STAGE, PREDICT_KEYS, PREFIX, TRAINING_KEYS
from llamafactory_ddm.integration.webui.texts import CHAT_TAB, PREDICT_TAB, TRAINING_TAB
from llamafactory_ddm.modeling.diffusion_config import DiffusionConfig, VariableLength

gr = pytest.importorskip("gradio")
pytestmark = pytest.mark.usefixtures("patched_pages")
LABELS = {stage.name: stage.label for stage in STAGES.values()}


@pytest.fixture
def in_folder(tmp_path, monkeypatch):
    """A working folder for what LlamaBoard writes."""
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.fixture
def board(in_folder):
    """LlamaBoard: its engine, and the blocks of its page."""
    from llamafactory.webui import interface

    made = []

    class Engine(interface.Engine):
        def __init__(self, *args, **kwargs):
            super().__init__(*args, **kwargs)
            made.append(self)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(interface, "Engine", Engine)
        blocks = interface.create_ui()
    return made[0], blocks


def data_of(engine, **values):
    """Return what a page sends: the value of each component, with some changed, such as train__dataset."""
    data = {element: getattr(element, "value", None) for element in engine.manager.get_elem_list()}
    basic = {
        "top__model_name": "Custom",
        "top__model_path": "nowhere",
        "top__lang": "en",
        "top__finetuning_type": "full",
        "train__dataset": ["x"],
        "train__output_dir": "out",
        "eval__dataset": ["x", "y"],
        "eval__output_dir": "out",
    }
    for name, value in {**basic, **values}.items():
        data[engine.manager.get_elem_by_id(name.replace("__", "."))] = value
    return data


def event_of(blocks, function):
    return next(event for event in blocks.fns.values() if event.fn == function)


def test_our_fields_are_read_saved_and_translated_with_upstreams(board):
    engine, blocks = board
    training = {engine.manager.get_elem_by_id(f"train.{PREFIX}{name}") for name in TRAINING_KEYS}
    predict = {engine.manager.get_elem_by_id(f"eval.{PREFIX}{name}") for name in PREDICT_KEYS}
    for function, fields in (("preview_train", training), ("run_train", training), ("save_args", training)):
        assert fields <= set(event_of(blocks, getattr(engine.runner, function)).inputs)
    for function in ("preview_eval", "run_eval"):
        assert predict <= set(event_of(blocks, getattr(engine.runner, function)).inputs)
    assert training <= set(event_of(blocks, engine.runner.load_args).outputs)
    for lang in ("en", "zh", "ru", "ko", "ja"):
        changed = engine.change_lang(lang)
        assert training | predict <= set(changed)
    assert changed[engine.manager.get_elem_by_id(f"infer.{CHAT_TAB}")].label


def test_our_boxes_stand_among_upstreams_and_nowhere_twice(board):
    engine, blocks = board
    element = engine.manager.get_elem_by_id
    for before, box in ((f"train.{TRAINING_TAB}", "train.freeze_tab"), (f"infer.{CHAT_TAB}", "infer.clear_btn")):
        siblings = element(box).parent.children
        assert siblings[siblings.index(element(box)) - 1] is element(before)
    row = element("eval.cmd_preview_btn").parent
    siblings = row.parent.children
    assert siblings[siblings.index(row) - 1] is element(f"eval.{PREDICT_TAB}")

    def ids(layout):
        return [layout["id"], *(found for child in layout.get("children", ()) for found in ids(child))]

    everything = ids(blocks.get_config_file()["layout"])
    assert len(everything) == len(set(everything))
    assert {element(f"train.{PREFIX}{name}")._id for name in TRAINING_KEYS} <= set(everything)


def test_the_chat_sends_our_fields_after_upstreams(board):
    engine, blocks = board
    event = event_of(blocks, engine.chatter.stream)
    fields = [engine.manager.get_elem_by_id(f"infer.{PREFIX}{name}") for name in CHAT_KEYS]
    assert event.inputs[-len(fields) :] == fields and event.types_generator
    assert engine.manager.get_elem_by_id(f"infer.{CHAT_TAB}").visible is False  # no model is loaded


def test_fields_of_one_stage_and_packing_follow_the_stage(board):
    engine, blocks = board
    from llamafactory.webui.components.train import change_stage

    stage, box = engine.manager.get_elem_by_id("train.training_stage"), engine.manager.get_elem_by_id
    (show,) = [
        event.fn
        for event in blocks.fns.values()
        if event.inputs == [stage] and event.outputs[0] is box(f"train.{TRAINING_TAB}")
    ]
    for label, shown in (("Supervised Fine-Tuning", None), (LABELS["ddm"], "ddm"), (LABELS["ddm-sft"], "ddm-sft")):
        visible = [update["visible"] for update in show(label)]
        assert visible == [shown is not None, *(one == shown for one in ONE_STAGE.values())]
    assert change_stage(LABELS["ddm"]) == ([], True) and change_stage(LABELS["ddm-sft"]) == ([], False)
    assert change_stage("Pre-Training") == ([], True) and change_stage("DPO") == ([], False)


def test_templates_of_ours_can_be_chosen(board):
    choices = [value for _, value in board[0].manager.get_elem_by_id("top.template").choices]
    assert "diffullama" in choices and "default" in choices


def test_a_training_command_has_the_changed_keys_of_our_stages_only(board):
    engine, _ = board
    changed = {
        "train__ddm_attention": "block",
        "train__ddm_train_block_length": "8",
        "train__ddm_drop_overlong": False,
    }

    def args(stage, **more):
        return engine.runner._parse_train_args(data_of(engine, train__training_stage=stage, **more))

    plain = args(LABELS["ddm"])
    assert plain["stage"] == "ddm" and not set(TRAINING_KEYS) & set(plain)
    ours = args(LABELS["ddm"], **changed)
    keys = {"attention": "block", "train_block_length": 8, "drop_overlong": "false"}
    assert ours == {**plain, **keys}
    assert args("Supervised Fine-Tuning", **changed) == {**plain, "stage": "sft"}
    extra = json.dumps({"train_block_length": 4, "optim": "adamw_torch"})
    assert args(LABELS["ddm"], **changed, train__extra_args=extra)["train_block_length"] == 4


def test_a_training_command_survives_upstreams_file_and_preview(board):
    engine, _ = board
    from llamafactory.webui.common import gen_cmd, save_cmd
    from omegaconf import OmegaConf

    data = data_of(engine, train__training_stage=LABELS["ddm"], train__ddm_shift="false", train__ddm_anneal_steps=0)
    args = engine.runner._parse_train_args(data)
    saved = OmegaConf.to_container(OmegaConf.load(save_cmd(args)))
    assert (saved["shift"], saved["anneal_steps"]) == ("false", 0)
    assert "--shift false" in gen_cmd(args) and "--anneal_steps 0" in gen_cmd(args)


def test_a_saved_page_is_loaded_with_our_fields(board):
    engine, _ = board
    data = data_of(engine, train__ddm_attention="block", train__config_path="page.yaml")
    plain = (str, int, float, list, type(None))
    data = {element: value for element, value in data.items() if isinstance(value, plain)}
    engine.runner.save_args(data)
    loaded = engine.runner.load_args("en", "page.yaml")
    assert loaded[engine.manager.get_elem_by_id(f"train.{PREFIX}attention")] == "block"


@pytest.fixture
def diffusion_model(in_folder):
    """Return a function that makes the folder of a diffusion model, finetuned on a canvas of a size."""

    def make(folder, canvas=None, *, variable_length=False):
        config = DiffusionConfig("<|mask|>", 2, True, "masked", 0.0, "linear", 1.0, canvas=canvas)
        if variable_length:
            lengths = VariableLength("eos_pad", pad_tokens=("<|pad|>",), pad_token_ids=(1,), canvas=canvas)
            config = replace(config, variable_length=lengths)
        (in_folder / folder).mkdir(parents=True)
        config.save(in_folder / folder)
        return folder

    return make


def predict_args(engine, **values):
    return engine.runner._parse_eval_args(data_of(engine, **values))


def test_predictions_of_a_diffusion_model_are_of_our_stage(board, diffusion_model):
    engine, _ = board
    model = diffusion_model("model")
    theirs = predict_args(engine)
    assert (theirs["stage"], theirs["do_predict"], theirs["predict_with_generate"]) == ("sft", True, True)
    ours = predict_args(engine, top__model_path=model, eval__ddm_diffusion_steps=16, eval__ddm_save_trace=True)
    same = {key: value for key, value in theirs.items() if key not in ("stage", "predict_with_generate")}
    changed = {"stage": "ddm-sft", "model_name_or_path": model, "diffusion_steps": 16, "save_trace": True}
    assert ours == {**same, **changed}


@pytest.mark.parametrize("finetuning_type", ["full", "lora"])
def test_a_diffusion_checkpoint_of_any_model_is_recognised(board, diffusion_model, finetuning_type):
    engine, _ = board
    diffusion_model(f"saves/Custom/{finetuning_type}/run")
    checkpoint = "run" if finetuning_type == "full" else ["run"]
    args = predict_args(engine, top__finetuning_type=finetuning_type, top__checkpoint_path=checkpoint)
    assert args["stage"] == "ddm-sft"
    shutil.rmtree("saves")
    args = predict_args(engine, top__finetuning_type=finetuning_type, top__checkpoint_path=checkpoint)
    assert args["stage"] == "sft"


@pytest.mark.parametrize("variable_length", [False, True])
def test_a_canvas_is_at_most_the_one_of_finetuning(board, diffusion_model, variable_length):
    engine, _ = board
    model = diffusion_model("model", canvas=64, variable_length=variable_length)
    args = predict_args(engine, top__model_path=model)
    assert args["cutoff_len"] == 64 and "max_new_tokens" not in args
    args = predict_args(engine, top__model_path=model, eval__cutoff_len=32, eval__max_new_tokens=8)
    assert (args["cutoff_len"], args["max_new_tokens"]) == (32, 8)
