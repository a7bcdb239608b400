"""What torch.compile makes of a training step: graphs, graph breaks and recompilations, counted on the CPU."""

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch._dynamo.utils import counters
from transformers import LlamaConfig, LlamaForCausalLM

from llamafactory_ddm.data.collators import ResponseCollator
from llamafactory_ddm.modeling.bidirectional import make_bidirectional
from support.tiny import MASK_ID, VOCABULARY, Rows, tiny_model

STEPS = 4


def tiny_llama():
    torch.manual_seed(0)
    model = LlamaForCausalLM(
        LlamaConfig(
            vocab_size=VOCABULARY,
            hidden_size=32,
            intermediate_size=48,
            num_hidden_layers=2,
            num_attention_heads=2,
            num_key_value_heads=1,
            max_position_embeddings=64,
            pad_token_id=0,
        )
    )
    make_bidirectional(model)
    return model


class Responses(torch.utils.data.Dataset):
    """Rows of one document, or packed rows of two, whose lengths vary, so that those of the batches do too."""

    def __init__(self, *, packed):
        generator = torch.Generator().manual_seed(0)
        self.rows = []
        for number in range(8 * STEPS):
            parts = [5 + number // 8 + number % 3, 7 + number % 5][: 1 + packed]
            ids = torch.randint(3, MASK_ID, (sum(parts),), generator=generator).tolist()
            row = {"input_ids": ids, "labels": [-100, -100, *ids[2:]], "attention_mask": [1] * len(ids)}
            self.rows.append(row | ({"position_ids": [i for n in parts for i in range(n)]} if packed else {}))

    def __len__(self):
        return len(self.rows)

    def __getitem__(self, index):
        return self.rows[index]


@pytest.fixture
def run(make_trainer, monkeypatch):
    """Return a function that trains with torch.compile, and gives the trainer and the counts after each step."""
    from accelerate.state import AcceleratorState

    monkeypatch.setenv("ACCELERATE_DYNAMO_BACKEND", "no")  # set by the training arguments; undone afterwards

    def train(*, data=None, backend="eager", **settings):
        AcceleratorState._reset_state(reset_partial_state=True)
        torch._dynamo.reset()
        counters.clear()
        trainer = make_trainer(
            max_steps=STEPS, torch_compile=True, torch_compile_backend=backend, train=data, **settings
        )
        trainer.finetuning_args.disable_shuffling = True
        if isinstance(data, Responses):
            trainer.data_collator = ResponseCollator(pad_id=0, shift=True)
        counts, step = [], trainer.training_step

        def counted(*args, **kwargs):
            result = step(*args, **kwargs)
            counts.append((counters["stats"]["unique_graphs"], sum(counters["graph_break"].values())))
            return result

        trainer.training_step = counted
        trainer.train()
        return trainer, counts

    yield train
    AcceleratorState._reset_state(reset_partial_state=True)
    torch._dynamo.reset()


KINDS = {
    "full": {},
    "annealed": {"anneal_steps": 100},
    "mixed": {"objective": {"uniform_ratio": 0.2}},
    "block": {"objective": {"block_length": 4}},
    "padded": {"data": Responses(packed=False)},
    "packed": {"data": Responses(packed=True)},
    "packed block": {"data": Responses(packed=True), "objective": {"block_length": 4}},
}
VARIES = ("padded", "packed", "packed block")  # in the width of its batches
QUICK = (("full", tiny_model, None), ("padded", tiny_llama, 0))


@pytest.mark.parametrize(
    ("kind", "make", "logits_chunk"),
    [
        pytest.param(kind, make, chunk, marks=[] if (kind, make, chunk) in QUICK else pytest.mark.slow)
        for kind in KINDS
        for make, chunk in ((tiny_model, None), (tiny_llama, 0))
    ],
)
def test_one_graph_serves_every_number_of_scored_tokens(run, kind, make, logits_chunk):
    """Another width of the batch compiles a second one, which serves all widths.

    With chunks of logits the output embedding is left out, which breaks the graph at its call, and under
    transformers 5 also in the function around it. With all logits at once nothing breaks it.
    """
    trainer, counts = run(model=make(), logits_chunk=logits_chunk, **KINDS[kind])
    assert trainer._step_loss._in_chunks == (logits_chunk is None)
    graphs, breaks = zip(*counts, strict=True)
    assert len(counts) == STEPS and graphs[0] == 1 and graphs[-1] == (2 if kind in VARIES else 1)
    at_head = [reason for reason in counters["graph_break"] if "RowSelectingHead._call_instead" in reason]
    assert list(counters["graph_break"]) == at_head
    assert breaks[-1] in ((0,) if logits_chunk == 0 else (graphs[-1], 2 * graphs[-1]))
    scored = [log["masked_fraction"] for log in trainer.state.log_history if "loss" in log]
    assert kind == "mixed" or len(set(scored)) > 2  # so the number of scored tokens has changed


def adapted():
    return get_peft_model(tiny_model(), LoraConfig(r=2, target_modules=["c_attn", "lm_head"]))


@pytest.mark.slow
@pytest.mark.parametrize("make", [tiny_model, adapted])
@pytest.mark.filterwarnings("ignore")
def test_a_compiled_step_is_the_plain_one(run, make_trainer, make):
    """With the graphs of autograd, for chunks of three logits."""
    settings = {"logits_chunk": 3, "anneal_steps": 4, "learning_rate": 1e-3}
    compiled, counts = run(model=make(), data=Rows(64), backend="aot_eager", **settings)
    plain = make_trainer(model=make(), max_steps=STEPS, folder="plain", train=Rows(64), **settings)
    plain.finetuning_args.disable_shuffling = True
    plain.train()
    for name in ("loss", "grad_norm", "nll"):
        losses = [[log[name] for log in t.state.log_history if "loss" in log] for t in (compiled, plain)]
        assert losses[0] == pytest.approx(losses[1], rel=1e-4)
    assert counts[-1][0] <= 2  # the second without a mask, once attention is full; transformers 4 always has one
