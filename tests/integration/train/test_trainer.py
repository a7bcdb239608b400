import json
import math
from types import SimpleNamespace

import pytest
import torch
from torch.nn import functional
from transformers import TrainerCallback

from llamafactory_ddm.data.collators import ResponseCollator
from llamafactory_ddm.diffusion.noise import draw_time, mask_tokens, mix_tokens
from llamafactory_ddm.diffusion.schedules import get_schedule
from llamafactory_ddm.integration.model.model_card import Origin
from llamafactory_ddm.modeling import bidirectional
from llamafactory_ddm.modeling.bidirectional import NotBidirectionalError
from llamafactory_ddm.objectives.base import CleanBatch
from llamafactory_ddm.objectives.shift import head_index
from support.tiny import LENGTH, MASK_ID, VOCABULARY, Rows, tiny_model


def first_gradient(trainer):
    """Return the gradients that the first optimiser step sees, before clipping."""
    gradients = {}

    def keep(*args, **kwargs):
        if not gradients:
            gradients.update({n: p.grad.clone() for n, p in trainer.model.named_parameters()})

    trainer.create_optimizer_and_scheduler(num_training_steps=2)
    trainer.optimizer.register_step_pre_hook(keep)
    trainer.train()
    return gradients


def by_hand(shift, weighting, norm, ids, keep):
    """The loss of the first step from dense logits, one row and one formula at a time."""
    model, schedule, rows = tiny_model(), get_schedule("linear"), torch.arange(len(ids))
    maskable = keep.bool() & (ids != MASK_ID)
    if shift:
        maskable[:, 0] = False
    t = draw_time(5, rows)
    noised = mask_tokens(ids, maskable, t, schedule, seed=5, sample_index=rows, mask_id=MASK_ID)
    total, count = torch.zeros(()), 0
    for b in range(len(ids)):
        length = int(keep[b].sum())
        everything = torch.zeros(1, 1, length, length)
        logits = model(input_ids=noised.z_t[b : b + 1, :length], attention_mask=everything, use_cache=False).logits[0]
        row = torch.zeros(())
        for i in range(length):
            if noised.is_masked[b, i]:
                weight = 1 / t[b] if weighting == "elbo" else 1.0
                row = row + weight * functional.cross_entropy(logits[i - 1 if shift else i], ids[b, i])
        n = int(maskable[b].sum())
        total = total + (row / n if norm == "sequence" else row)
        count += {"tokens": n, "masked": int(noised.is_masked[b].sum()), "sequence": 1}[norm]
    loss = total / count
    loss.backward()
    return loss.item(), {n: p.grad for n, p in model.named_parameters()}


@pytest.mark.parametrize("shift", [True, False])
@pytest.mark.parametrize("norm", ["tokens", "masked", "sequence"])
@pytest.mark.parametrize("weighting", ["elbo", "uniform"])
def test_the_gradient_equals_the_formula(make_trainer, shift, norm, weighting):
    """With texts that contain [MASK], which is no target."""
    data = Rows(8, lengths=[16, 9, 3, 16, 12, 16, 5, 16])
    data.ids[0, 3:9] = data.ids[2, 1] = data.ids[4, 0] = MASK_ID
    trainer = make_trainer(
        train=data,
        max_steps=1,
        objective={"shift": shift, "norm": norm, "weighting": weighting},
        lr_scheduler_type="constant",
    )
    trainer.finetuning_args.disable_shuffling = True
    gradient = first_gradient(trainer)
    loss, expected = by_hand(shift, weighting, norm, data.ids, data.keep)
    assert trainer.state.log_history[0]["loss"] == pytest.approx(loss, rel=1e-4)
    for name, value in expected.items():
        torch.testing.assert_close(gradient[name], value, rtol=1e-3, atol=1e-6, msg=name)


class Responses(torch.utils.data.Dataset):
    """Prompts of `prompts` tokens with responses up to `lengths`."""

    def __init__(self, prompts, lengths):
        generator = torch.Generator().manual_seed(3)
        self.rows = []
        for prompt, length in zip(prompts, lengths, strict=True):
            ids = torch.randint(0, MASK_ID, (length,), generator=generator).tolist()
            labels = [-100] * prompt + ids[prompt:]
            self.rows.append({"input_ids": ids, "attention_mask": [1] * length, "labels": labels})

    def __len__(self):
        return len(self.rows)

    def __getitem__(self, index):
        return self.rows[index]


@pytest.mark.parametrize("target_length", [None, LENGTH])
def test_only_responses_are_noised_and_scored(make_trainer, target_length):
    """The first step of finetuning against dense logits, one row and one formula at a time."""
    data = Responses([3, 1, 9, 2, 5, 15, 1, 4], [16, 9, 10, 16, 12, 16, 2, 7])
    trainer = make_trainer(train=data, max_steps=1)
    trainer.finetuning_args.disable_shuffling = True
    trainer.data_collator = ResponseCollator(pad_id=7, shift=True, target_length=target_length)
    gradient = first_gradient(trainer)

    model, rows = tiny_model(), torch.arange(8)
    ids = torch.full((8, LENGTH), 7)
    maskable, keep = torch.zeros(8, LENGTH, dtype=torch.bool), [LENGTH] * 8
    for b, row in enumerate(data.rows):
        n = len(row["input_ids"])
        ids[b, :n] = torch.tensor(row["input_ids"])
        maskable[b, :n] = torch.tensor(row["labels"]) != -100
        maskable[b, n:] = target_length is not None
        keep[b] = LENGTH if target_length is not None else n
    t = draw_time(5, rows)
    noised = mask_tokens(ids, maskable, t, get_schedule("linear"), seed=5, sample_index=rows, mask_id=MASK_ID)
    loss = torch.zeros(())
    for b in range(8):
        everything = torch.zeros(1, 1, keep[b], keep[b])
        logits = model(input_ids=noised.z_t[b : b + 1, : keep[b]], attention_mask=everything).logits[0]
        for i in range(keep[b]):
            if noised.is_masked[b, i]:
                loss = loss + functional.cross_entropy(logits[i - 1], ids[b, i]) / t[b]
    loss = loss / int(maskable.sum())
    loss.backward()
    assert trainer.state.log_history[0]["loss"] == pytest.approx(loss.item(), rel=1e-4)
    for name, parameter in model.named_parameters():
        torch.testing.assert_close(gradient[name], parameter.grad, rtol=1e-3, atol=1e-6, msg=name)


def test_documents_of_a_packed_row_do_not_see_each_other(make_trainer):
    """The logits of two documents in one row equal those of each document by itself."""
    ids = torch.randint(0, MASK_ID, (12,), generator=torch.Generator().manual_seed(8)).tolist()
    row = {
        "input_ids": ids,
        "attention_mask": [1] * 5 + [2] * 7,
        "position_ids": [*range(5), *range(7)],
        "labels": [-100, *ids[1:5], -100, -100, *ids[7:]],
    }
    batch = ResponseCollator(pad_id=7, shift=True)([row])
    trainer = make_trainer()
    model = trainer.model.eval()
    clean = CleanBatch.of(batch, shift=True, mask_id=MASK_ID)
    z = clean.x_0.masked_fill(clean.maskable, MASK_ID)
    rows = head_index(clean.maskable, True)
    with torch.no_grad():
        together = trainer.bound_logits(model, z, rows, clean.placement())
        first = model(input_ids=z[:, :5], attention_mask=torch.zeros(1, 1, 5, 5)).logits[0, :4]
        second = model(input_ids=z[:, 5:], attention_mask=torch.zeros(1, 1, 7, 7)).logits[0, 1:6]
    torch.testing.assert_close(together, torch.cat([first, second]), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("norm", ["tokens", "masked", "sequence"])
@pytest.mark.parametrize("antithetic", [True, False])
def test_accumulation_is_exact(make_trainer, norm, antithetic):
    accumulates_exactly(make_trainer, {"norm": norm, "antithetic": antithetic}, "nll")


def test_accumulation_of_mixed_noise_is_exact(make_trainer):
    accumulates_exactly(make_trainer, {"uniform_ratio": 0.2, "antithetic": True, "truncate_ratio": 0.5}, "kl")


def accumulates_exactly(make_trainer, objective, term):
    data = Rows(16, lengths=[16, 9, 3, 16, 12, 16, 5, 16, 4, 4, 4, 4, 16, 16, 16, 2])
    whole = make_trainer(train=data, objective=objective)
    split = make_trainer(
        train=data, objective=objective, per_device_train_batch_size=2, gradient_accumulation_steps=4, folder="split"
    )
    first, second = first_gradient(whole), first_gradient(split)
    for name in first:
        torch.testing.assert_close(first[name], second[name], rtol=1e-4, atol=1e-7, msg=name)
    for one, two in zip(whole.state.log_history[:2], split.state.log_history[:2], strict=True):
        for key in ("loss", term, "masked_fraction", "grad_norm"):
            assert one[key] == pytest.approx(two[key], rel=1e-4), key


def test_workers_that_collate_rows_change_nothing(make_trainer):
    """Noise depends on the sample index, and is drawn by the main process."""
    runs = []
    for workers in (0, 2):
        trainer = make_trainer(
            train=Responses([3, 1, 2] * 8, [16, 9, 12] * 8),
            max_steps=4,
            per_device_train_batch_size=4,
            gradient_accumulation_steps=2,
            dataloader_num_workers=workers,
            folder=f"{workers}",
        )
        trainer.data_collator = ResponseCollator(pad_id=7, shift=True)
        trainer.train()
        runs.append(trainer)
    logs = [[(log["loss"], log["masked_fraction"]) for log in t.state.log_history if "loss" in log] for t in runs]
    assert logs[0] == logs[1] and len(logs[0]) == 4
    for one, two in zip(*(trainer.model.parameters() for trainer in runs), strict=True):
        assert torch.equal(one, two)


def test_evaluating_more_often_changes_nothing(make_trainer):
    often = make_trainer(evaluation=Rows(6, seed=1), eval_strategy="steps", eval_steps=1, folder="often")
    never = make_trainer(folder="never")
    often.train()
    never.train()
    losses = [[log["loss"] for log in t.state.log_history if "loss" in log] for t in (often, never)]
    assert losses[0] == losses[1]


def test_the_log_holds_the_diffusion_figures(make_trainer):
    trainer = make_trainer(anneal_steps=4, max_steps=3, logging_steps=1)
    trainer.train()
    logs = [log for log in trainer.state.log_history if "loss" in log]
    assert [log["attention_ratio"] for log in logs] == [0.25, 0.5, 0.75]
    for log in logs:
        assert 0 < log["masked_fraction"] < 1
        assert log["tokens_per_second"] > 0
        assert log["nll"] == pytest.approx(math.log(40), rel=0.3)


def test_annealing_never_lowers_the_ratio(make_trainer):
    trainer = make_trainer(anneal_steps=10, attention_ratio=0.5)
    assert [trainer.attention_ratio(step) for step in (0, 4, 5, 20)] == [0.5, 0.5, 0.6, 1.0]


def test_annealing_reaches_the_model(make_trainer):
    full = make_trainer(max_steps=1)
    annealed = make_trainer(max_steps=1, anneal_steps=1000, folder="annealed")
    full.train()
    annealed.train()
    assert full.state.log_history[0]["loss"] != annealed.state.log_history[0]["loss"]


def test_a_step_without_a_masked_token_has_a_zero_gradient(make_trainer):
    trainer = make_trainer(train=Rows(8, lengths=[1] * 8), max_steps=1)  # with shift, one token is nothing to predict
    gradient = first_gradient(trainer)
    assert trainer.state.log_history[0]["loss"] == 0.0
    assert all((value == 0).all() for value in gradient.values())


def test_a_causal_model_is_refused_at_the_first_step(make_trainer, monkeypatch):
    monkeypatch.setattr(bidirectional, "_READS_CONFIG", True)  # so that a mask cannot make it bidirectional
    model = tiny_model()
    model.config.is_causal = True
    for module in model.modules():
        if hasattr(module, "is_causal"):
            module.is_causal = True
    with pytest.raises(NotBidirectionalError):
        make_trainer(model=model).train()


def test_evaluation_is_the_same_for_any_batch_size_and_any_training_seed(make_trainer):
    data = Rows(10, lengths=[16, 9, 3, 16, 12, 16, 5, 16, 16, 2], seed=2)
    one = make_trainer(evaluation=data).evaluate()
    two = make_trainer(evaluation=data, per_device_eval_batch_size=3, seed=6, objective={"seed": 6}).evaluate()
    for key in ("eval_loss", "eval_nll", "eval_nll_q1", "eval_nll_q4", "eval_perplexity_bound"):
        assert one[key] == pytest.approx(two[key], rel=1e-5), key
    assert one["eval_perplexity_bound"] == pytest.approx(math.exp(one["eval_loss"]))


def test_evaluation_agrees_with_monte_carlo_over_the_training_noise(make_trainer):
    """Many samples of the training estimator of the bound average to eval_loss."""
    data, model, schedule = Rows(4, seed=3), tiny_model(), get_schedule("linear")
    trainer = make_trainer(evaluation=data, model=model, eval_time_samples=64)
    estimate = trainer.evaluate()["eval_loss"]
    total, draws = 0.0, 300
    model.eval()
    with torch.inference_mode():
        for draw in range(draws):
            rows = torch.arange(4) + 4 * draw
            maskable = torch.ones_like(data.ids, dtype=torch.bool)
            maskable[:, 0] = False
            t = draw_time(9, rows, time_epsilon=1e-3, antithetic=True, group_size=4 * draws)
            noised = mask_tokens(data.ids, maskable, t, schedule, seed=9, sample_index=rows, mask_id=MASK_ID)
            everything = torch.zeros(1, 1, LENGTH, LENGTH)
            logp = model(input_ids=noised.z_t, attention_mask=everything, use_cache=False).logits.log_softmax(-1)[
                :, :-1
            ]
            nll = -logp.gather(-1, data.ids[:, 1:, None])[..., 0] * noised.is_masked[:, 1:]
            total += (nll.sum(dim=1) / t).sum().item() / (4 * 15)
    assert estimate == pytest.approx(total / draws, rel=0.03)


def test_resuming_repeats_the_uninterrupted_run_bit_for_bit(make_trainer):
    settings = {
        "max_steps": 6,
        "save_strategy": "steps",
        "save_steps": 3,
        "anneal_steps": 8,
        "lr_scheduler_type": "linear",
    }
    whole = make_trainer(folder="whole", per_device_train_batch_size=2, gradient_accumulation_steps=2, **settings)
    whole.train()
    again = make_trainer(
        folder="whole",
        model=tiny_model(seed=99),
        per_device_train_batch_size=2,
        gradient_accumulation_steps=2,
        **settings,
    )
    again.train(resume_from_checkpoint=whole.args.output_dir + "/checkpoint-3")
    for key in ("loss", "nll", "grad_norm", "attention_ratio", "masked_fraction"):
        expected = [log[key] for log in whole.state.log_history if key in log]
        assert [log[key] for log in again.state.log_history if key in log] == expected, key
    for one, two in zip(whole.model.parameters(), again.model.parameters(), strict=True):
        assert torch.equal(one, two)


def test_a_checkpoint_stores_its_diffusion_config(make_trainer, tmp_path):
    trainer = make_trainer(max_steps=2, save_strategy="steps", save_steps=1, anneal_steps=4)
    trainer.train()
    stored = [json.loads((tmp_path / f"out/checkpoint-{n}/diffusion_config.json").read_text()) for n in (1, 2)]
    assert [s["attention_ratio"] for s in stored] == [0.25, 0.5]
    assert stored[0]["mask_token_id"] == MASK_ID
    assert not list((tmp_path / "out").rglob(".unfinished-*"))


def test_an_empty_evaluation_set_is_an_error(make_trainer):
    with pytest.raises(ValueError, match="no token to predict"):
        make_trainer(evaluation=Rows(4, lengths=[1] * 4)).evaluate()


def by_naive_autograd(ids, keep, ratio, norm, weighting):
    """The mixed loss of the first step from its definition: dense float64 logits, and the sum over jumps."""
    model, rows = tiny_model(), torch.arange(len(ids))
    maskable = keep.bool().clone()
    maskable[:, 0] = False
    t = draw_time(5, rows)
    z_t = mix_tokens(
        ids, maskable, t, uniform_ratio=ratio, n_ids=VOCABULARY, mask_id=MASK_ID, seed=5, sample_index=rows
    )
    pi = torch.full((VOCABULARY,), ratio / VOCABULARY, dtype=torch.float64)
    pi[MASK_ID] += 1 - ratio
    total, count = torch.zeros((), dtype=torch.float64), 0
    for b in range(len(ids)):
        length, a = int(keep[b].sum()), 1 - t[b].double()
        everything = torch.zeros(1, 1, length, length)
        logits = model(input_ids=z_t[b : b + 1, :length], attention_mask=everything, use_cache=False).logits[0]
        logits = logits.double().index_fill(1, torch.tensor([MASK_ID]), -torch.inf)
        row, n = torch.zeros((), dtype=torch.float64), int(maskable[b].sum())
        for i in range(1, length):
            x, z = int(ids[b, i]), int(z_t[b, i])
            q_p = a * logits[i - 1].softmax(-1) + (1 - a) * pi
            q_x = (1 - a) * pi + a * functional.one_hot(ids[b, i], VOCABULARY)
            true, predicted = q_x / q_x[z], q_p / q_p[z]
            rate = pi[z] / a * (predicted - true + torch.xlogy(true, true / predicted)).sum()
            weight = 1.0 if weighting == "elbo" else float(t[b])
            row = row + weight * rate
            count += z != x if norm == "masked" else 0
        total = total + (row / max(n, 1) if norm == "sequence" else row)
        count += {"tokens": n, "masked": 0, "sequence": int(n > 0)}[norm]
    loss = total / count
    loss.backward()
    return loss.item(), {n: p.grad for n, p in model.named_parameters()}


@pytest.mark.parametrize("ratio", [0.1, 1.0])
@pytest.mark.parametrize(("norm", "weighting"), [("tokens", "elbo"), ("masked", "uniform"), ("sequence", "elbo")])
def test_gradient_of_mixed_noise_equals_the_definition(make_trainer, ratio, norm, weighting):
    data = Rows(8, lengths=[16, 9, 3, 16, 12, 16, 5, 16])
    objective = {"uniform_ratio": ratio, "norm": norm, "weighting": weighting}
    trainer = make_trainer(train=data, max_steps=1, objective=objective)
    trainer.finetuning_args.disable_shuffling = True
    gradient = first_gradient(trainer)
    loss, expected = by_naive_autograd(data.ids, data.keep, ratio, norm, weighting)
    assert trainer.state.log_history[0]["loss"] == pytest.approx(loss, rel=1e-4)
    for name, value in expected.items():
        torch.testing.assert_close(gradient[name], value, rtol=2e-3, atol=2e-6, msg=name)


def test_mixed_noise_resumes_bit_for_bit(make_trainer):
    objective = {"uniform_ratio": 0.2, "antithetic": True, "truncate_ratio": 0.5}
    settings = {"max_steps": 4, "save_strategy": "steps", "save_steps": 2, "objective": objective, "folder": "saved"}
    run, again = make_trainer(**settings), make_trainer(model=tiny_model(seed=99), **settings)
    run.train()
    again.train(resume_from_checkpoint=run.args.output_dir + "/checkpoint-2")
    for one, two in zip(run.model.parameters(), again.model.parameters(), strict=True):
        assert torch.equal(one, two)


def never_the_mask(model):
    """Set the probability of [MASK] to 0, as generation does."""
    model.lm_head.register_forward_hook(
        lambda module, args, logits: logits.index_fill(-1, torch.tensor([MASK_ID]), -1e4)
    )
    return model


def test_mixed_noise_without_random_tokens_trains_as_masked_noise(make_trainer):
    """Losses and weights coincide if [MASK] has no probability."""
    data = Rows(16, lengths=[16, 9, 3, 16, 12, 16, 5, 16, 4, 4, 4, 4, 16, 16, 16, 2])
    settings = {"train": data, "max_steps": 6, "optim": "sgd", "learning_rate": 0.1}  # Adam magnifies rounding
    masked = make_trainer(model=never_the_mask(tiny_model()), folder="masked", **settings)
    mixed = make_trainer(model=never_the_mask(tiny_model()), objective={"uniform_ratio": 0.0}, **settings)
    masked.train()
    mixed.train()
    losses = [[log["loss"] for log in t.state.log_history if "loss" in log] for t in (masked, mixed)]
    assert losses[0] == pytest.approx(losses[1], rel=1e-5)
    for one, two in zip(masked.model.parameters(), mixed.model.parameters(), strict=True):
        torch.testing.assert_close(one, two, rtol=1e-4, atol=1e-6)


def test_mixed_evaluation_is_the_same_for_any_batch_size_and_any_training_seed(make_trainer):
    data, objective = Rows(4, lengths=[16, 9, 5, 12], seed=3), {"uniform_ratio": 0.3}
    one = make_trainer(evaluation=data, objective=objective).evaluate()
    two = make_trainer(
        evaluation=data, per_device_eval_batch_size=3, objective={**objective, "seed": 6, "antithetic": True}
    ).evaluate()
    for key in ("eval_loss", "eval_kl", "eval_kl_q1", "eval_kl_q4", "eval_perplexity_bound"):
        assert one[key] == pytest.approx(two[key], rel=1e-5), key


def test_randomly_truncated_rows_are_padded():
    rows, real = torch.arange(4000), torch.tensor([16, 9] * 2000)
    keep = (torch.arange(LENGTH) < real[:, None]).long()
    clean = CleanBatch.of({"input_ids": torch.ones_like(keep), "attention_mask": keep}, shift=False, mask_id=MASK_ID)
    cut = clean.truncated(0.3, seed=1, sample_index=rows)
    length = (~cut.is_padding).sum(dim=1)
    assert torch.equal(cut.is_padding, torch.arange(LENGTH) >= length[:, None])
    assert torch.equal(cut.maskable, clean.maskable & ~cut.is_padding)
    shorter = length < real
    expected = 0.3 * (1 - 1 / real.double()).mean()  # a row may keep its length
    assert abs(float(shorter.double().mean()) - float(expected)) < 4.5 * (0.21 / 4000) ** 0.5
    lengths = torch.bincount(length[(real == 9) & shorter], minlength=9)[1:9].double()
    assert float(((lengths - lengths.mean()) ** 2 / lengths.mean()).sum()) < 30  # chi-square of 7 degrees of freedom
    assert clean.truncated(0.0, seed=1, sample_index=rows) is clean
    halves = [
        clean_rows(clean, part).truncated(0.3, seed=1, sample_index=rows[part])
        for part in (slice(0, 7), slice(7, 4000))
    ]
    assert torch.equal(cut.maskable, torch.cat([half.maskable for half in halves]))


def clean_rows(clean, part):
    return CleanBatch(
        clean.x_0[part], clean.maskable[part], None if clean.is_padding is None else clean.is_padding[part]
    )


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("objective", [{}, {"uniform_ratio": 0.2}])
def test_logits_of_half_precision_are_not_copied_to_float32(make_trainer, monkeypatch, dtype, objective):
    """In training, and in evaluation before and after it; the loss equals that of float32 copies."""
    dtypes = []

    def run(folder):
        trainer = make_trainer(
            model=tiny_model().to(dtype),
            evaluation=Rows(4),
            objective=objective,
            bf16=True,
            folder=folder,
            logits_chunk=0,
        )
        for name in ("loss", "evaluate"):
            inner = getattr(trainer.objective, name)

            def recorded(logits, *rest, inner=inner):
                dtypes.append(logits.dtype)
                return inner(logits, *rest)

            object.__setattr__(trainer.objective, name, recorded)
        before = trainer.evaluate()["eval_loss"]
        trainer.train()
        after = trainer.evaluate()["eval_loss"]
        losses = [log["loss"] for log in trainer.state.log_history if "loss" in log]
        return [before, *losses, after]

    losses = run("half")
    assert set(dtypes) == {torch.bfloat16} and len(dtypes) == 2 + 2 * 4
    dtypes.clear()
    monkeypatch.setattr("llamafactory_ddm.integration.train.trainer.keep_half_logits", lambda model: False)
    assert run("float32") == pytest.approx(losses, rel=1e-6)
    assert set(dtypes) == {torch.float32}


def test_the_best_weights_are_saved_with_their_attention_ratio(make_trainer, tmp_path):
    trainer = make_trainer(
        evaluation=Rows(4, seed=1),
        max_steps=3,
        anneal_steps=4,
        eval_strategy="steps",
        eval_steps=1,
        save_strategy="steps",
        save_steps=1,
        load_best_model_at_end=True,
        metric_for_best_model="eval_loss",
    )

    def evaluate(**_):
        metrics = {"eval_loss": float(trainer.state.global_step)}
        trainer.log(dict(metrics))
        return metrics

    trainer.evaluate = evaluate
    trainer.train()
    assert trainer.state.best_model_checkpoint.endswith("checkpoint-1")
    assert trainer.reached_ratio() == 0.25
    trainer.origin = Origin(base=None, stage="ddm", finetuning_type="full")
    trainer.create_model_card()
    card = (tmp_path / "out/README.md").read_text()
    assert "eval_loss: 1.0" in card and "steps: 1\n" in card
    trainer.save_model()
    assert json.loads((tmp_path / "out/diffusion_config.json").read_text())["attention_ratio"] == 0.25
    trainer.args.load_best_model_at_end = False
    trainer.train()  # keeps the last step's weights
    assert trainer.reached_ratio() == 0.75


def test_an_evaluation_of_the_same_weights_is_not_repeated(make_trainer):
    keys = {"evaluation": Rows(4, seed=1), "eval_strategy": "steps", "eval_steps": 2, "eval_time_samples": 1}
    trainer = make_trainer(max_steps=4, **keys)
    trainer.train()
    logged = [log for log in trainer.state.log_history if "eval_loss" in log]
    assert [log["step"] for log in logged] == [2, 4]
    assert trainer.last_evaluation()["eval_loss"] == logged[-1]["eval_loss"] == trainer.evaluate()["eval_loss"]
    other = make_trainer(max_steps=3, folder="other", **keys)
    other.train()
    assert other.last_evaluation()["eval_loss"] == other.evaluate()["eval_loss"] != logged[0]["eval_loss"]
    assert [log["step"] for log in other.state.log_history if "eval_loss" in log] == [2, 3, 3]


class CountedTasks:
    """Tasks whose metric is the number of times that they were run, and which draw random numbers."""

    def __init__(self, model):
        self.model, self.count = model, 0

    def metrics(self, world):
        assert not self.model.training
        torch.manual_seed(0)
        self.count += 1
        return {"eval_mine_acc": float(self.count)}


def test_tasks_are_part_of_an_evaluation(make_trainer):
    """In one log line; of several data sets with the first, and once; callbacks see them."""
    keys = {"max_steps": 2, "eval_strategy": "steps", "eval_steps": 1, "eval_time_samples": 1}
    seen = []

    class Watch(TrainerCallback):
        def on_evaluate(self, args, state, control, metrics, **kwargs):
            seen.append(metrics.get("eval_mine_acc"))

    plain = make_trainer(evaluation=Rows(4, seed=1), folder="plain", **keys)
    trainer = make_trainer(evaluation=Rows(4, seed=1), **keys)
    trainer.tasks = CountedTasks(trainer.model)
    trainer.add_callback(Watch())
    for each in (plain, trainer):
        torch.manual_seed(4)
        each.train()
        each.drawn = torch.rand(())
    logs = [log for log in trainer.state.log_history if "eval_loss" in log]
    assert [log["eval_mine_acc"] for log in logs] == seen == [1.0, 2.0]
    assert trainer.last_evaluation()["eval_mine_acc"] == 2.0 and logs[0]["eval_tasks_runtime"] >= 0
    assert trainer.drawn == plain.drawn
    parts = {"one": Rows(4, seed=1), "two": Rows(4, seed=2)}
    several = make_trainer(evaluation=parts, max_steps=1)
    several.tasks = CountedTasks(several.model)
    metrics = several.evaluate()
    assert metrics["eval_mine_acc"] == 1.0 and {"eval_one_loss", "eval_two_loss"} <= metrics.keys()
    assert "eval_mine_acc" not in several.evaluate(eval_dataset=parts["two"])


class FailingTasks(CountedTasks):
    """Tasks whose second run fails."""

    def metrics(self, world):
        found = super().metrics(world)
        if self.count == 2:
            raise ZeroDivisionError("no documents\nand more")
        return found


def test_tasks_that_fail_do_not_lose_a_run(make_trainer, caplog):
    """The run goes on; that evaluation is not the best, and its callbacks and checkpoint are as ever."""
    keys = {"max_steps": 3, "eval_strategy": "steps", "eval_steps": 1, "eval_time_samples": 1}
    keys |= {"save_strategy": "steps", "save_steps": 1, "load_best_model_at_end": True, "greater_is_better": True}
    trainer = make_trainer(evaluation=Rows(4, seed=1), metric_for_best_model="mine_acc", **keys)
    trainer.tasks = FailingTasks(trainer.model)
    modes = [module.training for module in trainer.model.modules()]
    trainer.train()
    logs = [log for log in trainer.state.log_history if "eval_loss" in log]
    assert [log.get("eval_mine_acc") for log in logs] == [1.0, None, 3.0]
    assert "No metrics of eval_tasks at step 2: ZeroDivisionError: no documents" in caplog.text
    assert "and more" not in caplog.text
    assert trainer.state.best_model_checkpoint.endswith("checkpoint-3")
    assert [module.training for module in trainer.model.modules()] == modes
    assert trainer.last_evaluation()["eval_mine_acc"] == 3.0


def test_tasks_that_fail_at_the_end_are_an_error_after_it(make_trainer):
    """Then the model is saved; before the first step nothing is lost either."""
    keys = {"max_steps": 2, "eval_strategy": "steps", "eval_steps": 1, "eval_time_samples": 1}
    trainer = make_trainer(evaluation=Rows(4, seed=1), **keys)
    trainer.tasks = FailingTasks(trainer.model)
    trainer.train()
    trainer.tasks.count = 1
    with pytest.raises(ZeroDivisionError):
        trainer.last_evaluation()
    first = make_trainer(evaluation=Rows(4, seed=1), eval_on_start=True, **keys)
    first.tasks = FailingTasks(first.model)
    first.tasks.count = 1
    with pytest.raises(ZeroDivisionError):
        first.train()
    assert first.steps_taken == 0


@pytest.mark.parametrize("steps", [3, 4, 8])
def test_a_finished_run_takes_no_further_step(make_trainer, steps):
    """Within an epoch, at the end of one and of the last; nor does a run beyond its max_steps."""
    keys = {"train": Rows(32), "save_strategy": "steps", "save_steps": steps}  # four steps an epoch
    run = make_trainer(max_steps=steps, **keys)
    run.train()
    for max_steps in (steps, 2):
        again = make_trainer(max_steps=max_steps, model=tiny_model(seed=99), **keys)
        again.train(resume_from_checkpoint=f"{run.args.output_dir}/checkpoint-{steps}")
        assert (again.state.global_step, again.steps_taken) == (steps, 0)
        assert again.state.log_history == run.state.log_history[:steps]
        for one, two in zip(run.model.parameters(), again.model.parameters(), strict=True):
            assert torch.equal(one, two)


def test_tied_weights_are_not_missing(make_trainer, caplog):
    keys = {"max_steps": 2, "save_strategy": "steps", "save_steps": 1}
    run = make_trainer(**keys)
    run.train()
    again = make_trainer(model=tiny_model(seed=99), **keys)
    again.train(resume_from_checkpoint=run.args.output_dir + "/checkpoint-1")
    assert not [record for record in caplog.records if "missing keys" in record.getMessage()]
    result = torch.nn.modules.module._IncompatibleKeys(["lm_head.weight", "transformer.wpe.weight"], [])
    again._issue_warnings_after_load(result)
    assert ": ['transformer.wpe.weight']" in caplog.text
    result = torch.nn.modules.module._IncompatibleKeys(["lm_head.weight", "transformer.wte.weight"], [])
    again._issue_warnings_after_load(result)
    assert "['lm_head.weight', 'transformer.wte.weight']" in caplog.text


@pytest.mark.parametrize(
    ("is_enabled", "trains", "pattern"), [(False, True, "fsdp: .* on cpu"), (True, False, "fsdp: .*do_train")]
)
def test_fsdp_that_cannot_work_is_refused(is_enabled, trains, pattern):
    from llamafactory_ddm.integration.train.trainer import DiffusionTrainer

    args = SimpleNamespace(fsdp=["full_shard"], do_train=trains, device=torch.device("cpu"))
    run = SimpleNamespace(args=args, is_fsdp_enabled=is_enabled, accelerator=SimpleNamespace(is_fsdp2=True))
    with pytest.raises(ValueError, match=pattern):
        DiffusionTrainer._check_fsdp(run)


@pytest.mark.parametrize(("backend", "norm"), [("cuda:nccl", 1.0), ("cuda:nccl", 0.0), ("cuda:nccl,cpu:gloo", 1.0)])
def test_fsdp_with_offload_needs_a_backend_for_the_host(backend, norm, monkeypatch):
    from torch.distributed.fsdp import CPUOffloadPolicy

    from llamafactory_ddm.integration.train.trainer import DiffusionTrainer

    monkeypatch.setattr(torch.distributed, "get_backend_config", lambda: backend)
    types = []
    plugin = SimpleNamespace(cpu_offload=CPUOffloadPolicy(), set_state_dict_type=types.append)
    accelerator = SimpleNamespace(is_fsdp2=True, state=SimpleNamespace(fsdp_plugin=plugin))
    args = SimpleNamespace(fsdp=["full_shard", "offload"], do_train=True, max_grad_norm=norm)
    run = SimpleNamespace(args=args, is_fsdp_enabled=True, accelerator=accelerator)
    if "cpu" in backend or not norm:
        DiffusionTrainer._check_fsdp(run)
        assert types == ["FULL_STATE_DICT"]
        return
    with pytest.raises(ValueError, match=r"^fsdp: offload .*ddp_backend: cuda:nccl,cpu:gloo"):
        DiffusionTrainer._check_fsdp(run)


def test_training_on_a_cpu_keeps_freed_memory_before_its_first_step(make_trainer, monkeypatch):
    from llamafactory_ddm.integration.train import trainer as module

    steps = []
    trainer = make_trainer()
    monkeypatch.setattr(module, "keep_freed_memory", lambda: steps.append(trainer.state.global_step))
    trainer.train()
    assert steps == [0]
    assert trainer.state.global_step > 0
