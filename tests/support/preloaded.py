"""Imported by the fork server of `warm`: the modules that the programs of tests import."""

import gc
import importlib
import importlib.util
import os

MODULES = (
    "torch",  # first, as its import activates the plugin
    "datasets",
    "llamafactory.cli",
    "llamafactory.launcher",
    "llamafactory.train.tuner",
    "llamafactory_ddm.cli.generate",
    "llamafactory_ddm.harness.run",
    "llamafactory_ddm.integration.workflow",
    "matplotlib.backends.backend_agg",
    "peft",
    "torch.distributed.fsdp",
    "transformers.models.gpt2.modeling_gpt2",
    "transformers.models.llama.modeling_llama",
    "transformers.models.qwen2.modeling_qwen2",
    "transformers.models.auto.tokenization_auto",
    "transformers.trainer",
)


def load():
    """Import `MODULES`, and the configs of all models, which LLaMA-Factory looks through when it loads one."""
    gc.disable()
    for name in MODULES:
        importlib.import_module(name)
    if importlib.util.find_spec("deepspeed"):  # then accelerate imports it in every run
        os.environ["DS_ACCELERATOR"] = "cpu"
        importlib.import_module("deepspeed")
    from transformers import AutoModelForImageTextToText, AutoModelForSeq2SeqLM, AutoModelForTextToWaveform

    for auto in (AutoModelForImageTextToText, AutoModelForSeq2SeqLM, AutoModelForTextToWaveform):
        auto._model_mapping.keys()
    gc.enable()
    gc.freeze()  # children need not look through all this for garbage, again and again


load()
