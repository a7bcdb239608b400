"""Training as users run it: every way to start it, accumulation and ranks, resuming, kills and full disks."""

import json
import shutil
import signal
import time
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from llamafactory_ddm.modeling.diffusion_config import DiffusionConfig
from support.cli import evaluations, history, predictions, run, start, train_here
from support.fake_flash import FakeKernels
from support.limits import LIMIT
from support.warm import free_port

RECIPE = "examples/tiny_gpt2_full_ddm.yaml"
SMALL = (
    "max_steps=2",
    "warmup_steps=0",
    "logging_steps=1",
    'eval_strategy="no"',
    "do_eval=false",
    'save_strategy="no"',
    "plot_loss=false",
    "cutoff_len=32",
    "packing=true",
    "anneal_steps=4",
    "disable_tqdm=true",
)


def words(folder, data, *keys):
    return ("train", RECIPE, *SMALL, f"output_dir={folder}", f"dataset_dir={data}", *keys)


def test_a_run_leaves_an_ordinary_model_logs_plots_and_metrics(small_data, tmp_path):
    out = tmp_path / "out"
    run(
        *words(
            out,
            small_data,
            "do_eval=true",
            "eval_strategy=steps",
            "eval_steps=1",
            "plot_loss=true",
            "report_to=tensorboard",
            f"logging_dir={tmp_path / 'board'}",
            "do_predict=true",
            "num_samples=2",
            "diffusion_steps=3",
        ),
        env={"TENSORBOARD_LOGGING_DIR": str(tmp_path / "board")},
    )
    for log in history(out):
        assert {"loss", "nll", "masked_fraction", "attention_ratio", "tokens_per_second", "grad_norm"} <= log.keys()
    assert [log["attention_ratio"] for log in history(out)] == [0.25, 0.5]
    names = {
        "eval_loss",
        "eval_perplexity_bound",
        "eval_nll",
        "eval_nll_q1",
        "eval_nll_q2",
        "eval_nll_q3",
        "eval_nll_q4",
    }
    assert all(names <= log.keys() for log in evaluations(out))
    assert names <= json.loads((out / "eval_results.json").read_text()).keys()
    for name in ("loss", "nll", "eval_loss"):
        assert (out / f"training_{name}.png").stat().st_size > 5000
    assert DiffusionConfig.load(out).attention_ratio == 0.5
    assert list((tmp_path / "board").rglob("events.out.tfevents.*"))
    assert len(predictions(out)) == 2
    model, tokenizer = AutoModelForCausalLM.from_pretrained(out), AutoTokenizer.from_pretrained(out)
    assert tokenizer.mask_token == "<|mask|>"
    assert model(input_ids=torch.tensor([[1, tokenizer.mask_token_id]])).logits.isfinite().all()
    assert "stage: ddm" in (out / "README.md").read_text() or (out / "README.md").is_file()


@pytest.mark.slow
def test_two_ranks_give_the_gradient_of_one_big_batch(small_data, tmp_path, train_small):
    """Without PyTorch's autoload, so that torchrun's children come from our launcher.

    The script of `test_launching.py` shows those of `llamafactory-cli`.
    """
    env = {"FORCE_TORCHRUN": "1", "NPROC_PER_NODE": "2", "MASTER_PORT": str(free_port())}
    env["TORCH_DEVICE_BACKEND_AUTOLOAD"] = "0"
    two_ranks = tmp_path / "two_ranks"
    keys = ("per_device_train_batch_size=4", "use_cpu=true", "do_predict=true", "num_samples=3", "diffusion_steps=2")
    evaluate = ("do_eval=true", "eval_strategy=steps", "eval_steps=2", "per_device_eval_batch_size=2")
    run(*words(two_ranks, small_data, *keys, *evaluate), program="llamafactory-ddm", env=env, fresh=True)
    same = {
        "max_steps": 2,
        "anneal_steps": 4,
        "do_predict": True,
        "num_samples": 3,
        "diffusion_steps": 2,
        "do_eval": True,
        "eval_strategy": "steps",
        "eval_steps": 2,
    }
    one_batch = train_small(tmp_path / "one_batch", per_device_train_batch_size=8, **same)
    split = train_small(tmp_path / "split", per_device_train_batch_size=2, gradient_accumulation_steps=4, **same)
    for other in (two_ranks, split):
        for a, b in zip(history(one_batch), history(other), strict=True):
            for key in ("loss", "nll", "grad_norm", "masked_fraction"):
                assert a[key] == pytest.approx(b[key], rel=1e-4), (key, other.name)
        assert evaluations(one_batch)[0]["eval_loss"] == pytest.approx(evaluations(other)[0]["eval_loss"], rel=1e-4)
        assert len(predictions(other)) == 3


def prepare(folder, data, **keys):
    """Tokenise the built-in corpus into folder/rows."""
    train_here(
        "gpt2_preprocess.yaml",
        **keys,
        mask_token="<|mask|>",
        model_name_or_path="data/tiny_gpt2",
        dataset="tiny_corpus_train",
        dataset_dir=data,
        val_size=0,
        preprocessing_num_workers=1,
        overwrite_cache=True,
        tokenized_path=folder / "rows",
        output_dir=folder / "unused",
    )


@pytest.mark.slow
def test_preparing_data_keeps_rows_without_room_and_gives_no_warning(small_data, tmp_path, told):
    """A later run drops them by its own cutoff_len; there are no texts or metrics to warn of."""
    keys = {"variable_length": "eos_pad", "drop_overlong": False, "packing": False, "cutoff_len": 8}
    prepare(tmp_path, small_data, **keys)
    assert (tmp_path / "rows" / "dataset_dict.json").is_file()
    assert "The data set is prepared" in told.text and "meaningless" not in told.text


def test_streaming_and_a_tokenised_path_give_the_same_rows(small_data, tmp_path, train_small):
    plain = train_small(tmp_path / "plain", disable_shuffling=True)
    prepare(tmp_path, small_data, cutoff_len=32)
    assert not (tmp_path / "unused").exists()
    prepared = train_small(
        tmp_path / "prepared", disable_shuffling=True, tokenized_path=tmp_path / "rows", eval_dataset=None
    )
    streamed = train_small(
        tmp_path / "streamed",
        disable_shuffling=True,
        streaming=True,
        dataloader_num_workers=1,
        buffer_size=1,
        preprocessing_batch_size=1000,
        eval_dataset=None,
    )
    losses = [[log["loss"] for log in history(f)] for f in (plain, prepared, streamed)]
    assert losses[1] == losses[0]
    assert len(losses[2]) == 3


@pytest.mark.slow
@pytest.mark.parametrize(
    "keys",
    [
        {"train_from_scratch": True},
        {"bf16": True},
        {"disable_gradient_checkpointing": True},
        {"flash_attn": "disabled"},
        {"packing": False},
        {"antithetic_time": True, "gradient_accumulation_steps": 2},
        {"weight_decay": 0.1, "neftune_noise_alpha": 5},
    ],
    ids=lambda keys: next(iter(keys)),
)
def test_upstreams_keys_work(keys, train_small, tmp_path):
    logs = history(train_small(tmp_path / "out", anneal_steps=2, **keys))
    assert all(0 < log["loss"] < 30 and log["grad_norm"] > 0 for log in logs)


@pytest.mark.slow
@pytest.mark.parametrize("key", ["fa2", "fa3"])
def test_flash_attention(key, train_small, tmp_path, monkeypatch):
    """With kernels that sdpa computes; the packages and a GPU are said to be there."""
    from transformers import modeling_utils

    kernels = FakeKernels(int(key[-1]))
    kernels.install(monkeypatch)
    monkeypatch.setattr("transformers.utils.is_flash_attn_2_available", lambda: True)
    monkeypatch.setattr(modeling_utils.PreTrainedModel, "_flash_attn_can_dispatch", lambda *args, **kwargs: True)
    keys = {"bf16": True, "anneal_steps": 0, "packing": False}
    flash, plain = (history(train_small(tmp_path / name, flash_attn=name, **keys)) for name in (key, "sdpa"))
    for one, two in zip(flash, plain, strict=True):
        assert one["loss"] == pytest.approx(two["loss"], rel=2e-2)
    assert kernels.calls


@pytest.mark.slow
def test_gradient_checkpointing_changes_no_number(train_small, tmp_path):
    one, two = (
        history(train_small(tmp_path / str(off), disable_gradient_checkpointing=off, anneal_steps=4))
        for off in (True, False)
    )
    for a, b in zip(one, two, strict=True):
        assert a["loss"] == pytest.approx(b["loss"], rel=1e-5)
        assert a["grad_norm"] == pytest.approx(b["grad_norm"], rel=1e-4)


@pytest.mark.slow
def test_torch_compile_changes_no_number(checkpoint, train_small, tmp_path):
    # The default backend differs in its kernels, which take minutes to build.
    compiled = train_small(tmp_path / "out", torch_compile=True, torch_compile_backend="aot_eager")
    for a, b in zip(history(checkpoint), history(compiled), strict=True):
        assert a["loss"] == pytest.approx(b["loss"], rel=1e-3)


SAVING = (
    "max_steps=40",
    "save_strategy=steps",
    "save_steps=2",
    "logging_steps=1",
    "anneal_steps=30",
    "overwrite_output_dir=false",
    "lr_scheduler_type=constant",
)


def wait_for(path, process, seconds=LIMIT):
    end = time.time() + seconds
    while not path.exists():
        assert process.poll() is None, "the run ended early"
        assert time.time() < end, f"{path} did not appear"
        time.sleep(0.02)


@pytest.mark.slow
def test_a_killed_run_resumes_bit_for_bit(small_data, tmp_path):
    """kill -9 while it saves; the same command continues from the last complete checkpoint."""
    out = tmp_path / "killed"
    command = words(out, small_data, *SAVING)
    process = start("llamafactory-cli", *command)
    wait_for(out / "checkpoint-6", process)
    process.send_signal(signal.SIGKILL)
    process.wait(LIMIT)
    newest = max(int(p.name.split("-")[1]) for p in out.glob("checkpoint-*"))
    # The kill may have come after the newest checkpoint was complete.
    (out / f"checkpoint-{newest}" / "trainer_state.json").unlink(missing_ok=True)
    again = run(*command, "max_steps=12", fresh=True)
    assert f"incomplete checkpoint {out}/checkpoint-{newest}" in again.stdout + again.stderr
    whole = tmp_path / "whole"
    run(*words(whole, small_data, *SAVING), "max_steps=12")
    expected = {log["step"]: log for log in history(whole)}
    resumed = [log for log in history(out) if log["step"] > newest - 2]
    assert resumed
    for log in resumed:
        for key in ("loss", "nll", "grad_norm", "attention_ratio"):
            assert log[key] == expected[log["step"]][key], (key, log["step"])


def test_resuming_by_name(small_data, tmp_path, train_small):
    keys = {"save_strategy": "steps", "save_steps": 1, "overwrite_output_dir": False}
    out = train_small(tmp_path / "out", **keys)
    first = history(out)
    shutil.rmtree(out / "checkpoint-3")
    train_small(out, **keys, resume_from_checkpoint=True)
    assert [log["loss"] for log in history(out)] == [log["loss"] for log in first]
    with pytest.raises(ValueError, match=r"resume_from_checkpoint: .*checkpoint-9 "):
        train_small(out, **keys, resume_from_checkpoint=out / "checkpoint-9")
    (out / "checkpoint-3" / "optimizer.pt").write_bytes(b"cut")
    with pytest.raises(ValueError, match=r"resume_from_checkpoint: .*checkpoint-3 .*optimizer\.pt "):
        train_small(out, **keys, resume_from_checkpoint=out / "checkpoint-3")
    with pytest.raises(ValueError, match=r"resume_from_checkpoint: true.* output_dir: .*new "):
        train_small(tmp_path / "new", **keys, resume_from_checkpoint=True)


WITH_A_FULL_DISK = """
import resource
from llamafactory.cli import main
resource.setrlimit(resource.RLIMIT_FSIZE, (2_000_000, 2_000_000))
main()
"""


@pytest.mark.slow
def test_a_full_disk_leaves_the_earlier_model_usable(checkpoint, small_data, tmp_path):
    out = tmp_path / "out"
    shutil.copytree(checkpoint, out)
    before = {path.name: path.read_bytes() for path in out.iterdir() if path.is_file()}
    (tmp_path / "llamafactory-cli.py").write_text(WITH_A_FULL_DISK)
    done = run(*words(out, small_data), program=tmp_path / "llamafactory-cli.py", check=False)
    assert done.returncode != 0
    assert str(out) in done.stderr and "resume_from_checkpoint: true" in done.stderr
    for name in ("model.safetensors", "config.json", "diffusion_config.json", "tokenizer.json"):
        assert (out / name).read_bytes() == before[name]
    assert not list(out.glob(".unfinished-*"))
    assert isinstance(out, Path)
