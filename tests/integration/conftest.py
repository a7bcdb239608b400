"""A training run in memory, and upstream's parser as the plugin leaves it."""

import pytest

from llamafactory_ddm.diffusion.schedules import get_schedule
from llamafactory_ddm.modeling.diffusion_config import DiffusionConfig
from llamafactory_ddm.objectives.block import BlockObjective
from llamafactory_ddm.objectives.masked import MaskedObjective
from llamafactory_ddm.objectives.mixed import MixedObjective
from support.tiny import MASK_ID, VOCABULARY, Rows, stack, tiny_model


@pytest.fixture
def make_trainer(tmp_path):
    """Return a function that builds a DiffusionTrainer on the CPU."""
    from llamafactory.hparams import FinetuningArguments, TrainingArguments

    from llamafactory_ddm.integration.train.trainer import DiffusionTrainer

    def build(
        *,
        model=None,
        train=None,
        evaluation=None,
        anneal_steps=0,
        attention_ratio=0.0,
        eval_time_samples=4,
        objective=None,
        folder="out",
        logits_chunk=None,
        peak_tflops=None,
        **training,
    ):
        settings = {
            "output_dir": str(tmp_path / folder),
            "per_device_train_batch_size": 8,
            "per_device_eval_batch_size": 4,
            "max_steps": 2,
            "logging_steps": 1,
            "learning_rate": 1e-2,
            "max_grad_norm": 1e9,
            "lr_scheduler_type": "constant",
            "report_to": "none",
            "save_strategy": "no",
            "use_cpu": True,
            "disable_tqdm": True,
            "remove_unused_columns": False,
            "seed": 5,
            **training,
        }
        options = {"shift": True, "seed": 5, **(objective or {})}
        schedule = get_schedule(options.pop("noise_schedule", "linear"))
        mixed = {"n_ids": VOCABULARY} if "uniform_ratio" in options else {}
        blocks = options.get("block_length")
        kind = BlockObjective if blocks else MixedObjective if mixed else MaskedObjective
        return DiffusionTrainer(
            objective=kind(mask_id=MASK_ID, schedule=schedule, **mixed, **options),
            diffusion_config=DiffusionConfig(
                mask_token="<|mask|>",
                mask_token_id=MASK_ID,
                shift=options["shift"],
                noise_process="mixed" if mixed else "masked",
                uniform_ratio=options.get("uniform_ratio", 0.0),
                noise_schedule=schedule.name,
                attention_ratio=1.0 if blocks else attention_ratio,
                attention="block" if blocks else "full",
                train_block_length=blocks,
            ),
            anneal_steps=anneal_steps,
            eval_time_samples=eval_time_samples,
            logits_chunk=logits_chunk,
            peak_tflops=peak_tflops,
            model=model or tiny_model(),
            args=TrainingArguments(**settings),
            finetuning_args=FinetuningArguments(stage="pt", finetuning_type="full"),
            processor=None,
            tokenizer=None,
            train_dataset=train if train is not None else Rows(64),
            eval_dataset=evaluation,
            data_collator=stack,
        )

    return build


@pytest.fixture
def upstream():
    """Upstream's parser and tuner with the patches applied, and the patches; afterwards all is as it was before."""
    import sys

    import llamafactory.hparams.parser as parser
    import llamafactory.train.tuner as tuner

    from llamafactory_ddm.integration.patches import table as patches

    applied = {target.partition(":")[0] for target, _ in patches._applied}
    patches.undo()
    patches.after_parser(parser)
    yield parser, tuner, patches
    patches.undo()
    if parser.__name__ in applied:
        patches.after_parser(parser)
        # What was loaded meanwhile would have been patched then.
        applied |= {patch.module for patch in patches.PATCHES}
    for name in applied & set(sys.modules):
        patches.apply(name)


@pytest.fixture
def basic(tmp_path):
    """Return a function that gives the least arguments of a training run of stage: ddm, and more."""

    def build(**keys):
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

    return build
