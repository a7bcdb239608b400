"""`eval_eos`: which tokens of a row are masked, and what the model sees of the others."""

from dataclasses import replace

import torch

from llamafactory_ddm.data.collators import VariableLengthCollator
from llamafactory_ddm.integration.train import eos_evaluation
from llamafactory_ddm.modeling.diffusion_config import VariableLength
from support.tiny import MASK_ID

EOS, PAD = 0, 7


def test_a_mask_token_of_the_text_stays_fixed_and_ends_no_answer(make_trainer, monkeypatch):
    """Of several turns the last answer counts; an earlier one has its EOS as label of the next turn's first token."""
    rows = [
        {"input_ids": [9, 11, 12, MASK_ID, 13, EOS], "labels": [-100, 11, 12, MASK_ID, 13, EOS]},
        {"input_ids": [9, 11, 8, 10, 12, EOS], "labels": [-100, 11, EOS, -100, 12, EOS]},
    ]
    trainer = make_trainer(evaluation=rows)
    trainer.data_collator = VariableLengthCollator(eos_id=EOS, pad_ids=(PAD,), canvas=8)
    trainer.diffusion_config = replace(
        trainer.diffusion_config, variable_length=VariableLength("eos_pad", ("<|pad|>",), (PAD,), canvas=8)
    )
    batches, inputs = [], []
    inner, logits = eos_evaluation.statistics, trainer.bound_logits
    monkeypatch.setattr(
        eos_evaluation, "statistics", lambda rows, *a, **k: (batches.append(rows), inner(rows, *a, **k))[1]
    )
    monkeypatch.setattr(trainer, "bound_logits", lambda model, z, *a: (inputs.append(z), logits(model, z, *a))[1])
    eos_evaluation.evaluate_eos(trainer, rows, eos_ids=[EOS])
    maskable = torch.cat([batch.maskable for batch in batches]).int().tolist()
    assert maskable == [[0, 1, 1, 0, 1, 1, 1, 1], [0, 0, 0, 0, 1, 1, 1, 1]]
    assert all(z[0, 3] == MASK_ID and z[1, 2] == 8 for z in inputs)
