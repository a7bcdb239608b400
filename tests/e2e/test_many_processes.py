"""Finetuning gives the same result however the examples of a step are distributed over processes."""

import functools
import json
import shutil

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from llamafactory_ddm.modeling.diffusion_config import DiffusionConfig
from support.cli import ROOT, history, in_processes, run, train_in_processes
from support.published import write_llada

SMALL = (
    "max_steps=4",
    "warmup_steps=0",
    "logging_steps=1",
    'eval_strategy="no"',
    "do_eval=false",
    "save_strategy=steps",
    "save_steps=2",
    "plot_loss=false",
    "cutoff_len=64",
    "disable_tqdm=true",
    "antithetic_time=true",
    "learning_rate=1.0e-3",
    "overwrite_cache=true",
)
FSDP = {"fsdp": "full_shard auto_wrap", "fsdp_config": str(ROOT / "examples" / "fsdp" / "fsdp2_config.json")}
# Name -> further keys, whether two processes run, and the relative tolerance of a loss.
WAYS = {
    "accumulation": (("per_device_train_batch_size=2", "gradient_accumulation_steps=4", "use_cpu=true"), False, 1e-5),
    "ddp": (("per_device_train_batch_size=4", "use_cpu=true"), True, 1e-5),
    "zero2": (("per_device_train_batch_size=4", "deepspeed=examples/deepspeed/ds_z2_config.json"), True, 1e-4),
    "zero3": (("per_device_train_batch_size=4", "deepspeed=examples/deepspeed/ds_z3_config.json"), True, 1e-4),
    "fsdp2": (("per_device_train_batch_size=4", "use_cpu=true"), True, 1e-4),
    "ulysses": (("per_device_train_batch_size=8", "sequence_parallel_size=2", "use_cpu=true"), True, 1e-5),
}
ONE_PROCESS = ("per_device_train_batch_size=8", "use_cpu=true")
ADAPTED_HEAD = ("lora_target=c_attn,lm_head", "lora_dropout=0.0")
RECIPES = {"full": "tiny_gpt2_full_ddm_sft.yaml", "lora": "tiny_gpt2_lora_ddm_sft.yaml"}


@pytest.fixture(scope="module")
def trained(tmp_path_factory, checkpoint, small_data):
    """Return a function that runs a way once and returns its folder; None is one process with all examples at once."""

    @functools.cache
    def get(way, recipe, *overrides):
        folder = tmp_path_factory.mktemp("trained") / "out"
        if way is None:
            start(recipe, folder, checkpoint, small_data, *ONE_PROCESS, *overrides)
        else:
            run_way(way, recipe, folder, checkpoint, small_data, *overrides)
        return folder

    return get


def start(recipe, folder, checkpoint, data, *overrides, in_two=False, processes=2, launcher=None):
    """Train, and return the finished processes."""
    arguments = (f"model_name_or_path={checkpoint}", f"dataset_dir={data}", f"output_dir={folder}")
    arguments = (f"examples/{RECIPES[recipe]}", *SMALL, *arguments, *overrides)
    if launcher is not None:
        return in_processes(processes, launcher, *arguments, env={"DS_ACCELERATOR": "cpu"})
    if in_two:
        return train_in_processes(processes, *arguments, env={"DS_ACCELERATOR": "cpu"})
    return [run("train", *arguments)]


def eval_loss(folder):
    return json.loads((folder / "eval_results.json").read_text())["eval_loss"]


def weights(folder, recipe):
    name = "adapter_model.safetensors" if recipe == "lora" else "model.safetensors"
    return load_file(folder / name)


def run_way(way, recipe, folder, checkpoint, data, *overrides):
    keys, in_two, _ = WAYS[way]
    if way.startswith("zero") or way == "ulysses":
        pytest.importorskip("deepspeed")
    launcher = None
    if way == "fsdp2":
        launcher = ROOT / "tests" / "e2e" / "fsdp_on_cpu.py"
        keys = (*keys, *(f"{key}={value}" for key, value in FSDP.items()))
    return start(recipe, folder, checkpoint, data, *keys, *overrides, in_two=in_two, launcher=launcher)


@pytest.mark.slow
@pytest.mark.parametrize("recipe", RECIPES)
@pytest.mark.parametrize("way", WAYS)
def test_each_way_is_the_run_of_one_process(way, recipe, trained):
    out, reference, tolerance = trained(way, recipe), trained(None, recipe), WAYS[way][2]
    for a, b in zip(history(reference), history(out), strict=True):
        for key in ("loss", "nll", "masked_fraction", "grad_norm"):
            assert b[key] == pytest.approx(a[key], rel=tolerance), key
    assert DiffusionConfig.load(out) == DiffusionConfig.load(reference)
    expected, actual = weights(reference, recipe), weights(out, recipe)
    # FSDP writes the tied output embedding too, which is tied again on loading.
    assert actual.keys() - expected.keys() <= {"lm_head.weight"}
    assert (out / "checkpoint-2" / "pytorch_model_fsdp.bin").exists() == (way == "fsdp2")
    for key, value in expected.items():
        torch.testing.assert_close(actual[key].float(), value.float(), rtol=1e-2, atol=2e-4, msg=key)
    if recipe == "full":
        assert AutoModelForCausalLM.from_pretrained(out)(torch.arange(9)[None]).logits.isfinite().all()


@pytest.mark.slow
@pytest.mark.parametrize("way", ["ddp", "zero3", "fsdp2"])
def test_chunks_of_logits_with_a_sharded_head(way, trained):
    """The output embedding's weight is gathered within its forward, where the loss is computed."""
    evaluated = ("do_eval=true", "per_device_eval_batch_size=2")
    out = trained(way, "full", "logits_chunk=3", *evaluated)
    reference = trained(None, "full", "logits_chunk=0", *evaluated)
    for a, b in zip(history(reference), history(out), strict=True):
        for key in ("loss", "nll", "grad_norm"):
            assert b[key] == pytest.approx(a[key], rel=WAYS[way][2]), key
    assert eval_loss(out) == pytest.approx(eval_loss(reference), rel=WAYS[way][2])


@pytest.mark.slow
@pytest.mark.parametrize("way", ["zero3", "fsdp2"])
def test_offload(way, trained, checkpoint, small_data, tmp_path):
    """ZeRO-3 with PyTorch's optimizer: DeepSpeed would compile its own, which takes minutes.

    With FSDP 2 on CPUs nothing has to move, but all of its code for offload runs.
    """
    whole, half = tmp_path / "whole", tmp_path / "half"
    if way == "zero3":
        config = json.loads((ROOT / "examples" / "deepspeed" / "ds_z3_offload_config.json").read_text())
        (tmp_path / "offload.json").write_text(json.dumps({**config, "zero_force_ds_cpu_optimizer": False}))
        keys = (f"deepspeed={tmp_path / 'offload.json'}",)
    else:
        keys = ("fsdp=full_shard auto_wrap offload",)
    finished = run_way(way, "full", whole, checkpoint, small_data, *keys)
    assert all("FSDP offloads to the host" in done.stdout for done in finished) == (way == "fsdp2")
    half.mkdir()
    shutil.copytree(whole / "checkpoint-2", half / "checkpoint-2")
    run_way(way, "full", half, checkpoint, small_data, *keys, f"resume_from_checkpoint={half / 'checkpoint-2'}")
    for a, b in zip(history(trained(None, "full")), history(whole), strict=True):
        for key in ("loss", "nll", "grad_norm"):
            assert b[key] == pytest.approx(a[key], rel=1e-4), key
    for a, b in zip(history(whole), history(half), strict=True):
        assert b["loss"] == pytest.approx(a["loss"], rel=1e-6)


@pytest.mark.slow
def test_fsdp2_in_bf16(trained):
    out, reference = trained("fsdp2", "full", "bf16=true"), trained(None, "full", "bf16=true")
    for a, b in zip(history(reference), history(out), strict=True):
        for key in ("loss", "nll", "grad_norm"):
            assert b[key] == pytest.approx(a[key], rel=0.02), key
    dtypes = {value.dtype for value in weights(out, "full").values()}
    assert dtypes == {torch.float32}


ATTENTIONS = {
    "annealed-packed": ("model_name_or_path=data/tiny_gpt2", "mask_token=10", "anneal_steps=8", "packing=true"),
    "odd-rows": ("cutoff_len=63",),
    "block": ("attention=block", "train_block_length=8", "antithetic_time=false"),
}


@pytest.mark.slow
@pytest.mark.parametrize("attention", ATTENTIONS)
def test_groups_that_share_rows_with_other_attention(attention, trained):
    out, reference = (trained(way, "full", *ATTENTIONS[attention]) for way in ("ulysses", None))
    ratios = [log["attention_ratio"] for log in history(out)]
    assert (max(ratios) < 1) == (attention == "annealed-packed")
    for a, b in zip(history(reference), history(out), strict=True):
        for key in ("loss", "nll", "masked_fraction", "grad_norm"):
            assert b[key] == pytest.approx(a[key], rel=1e-5), key


@pytest.mark.slow
@pytest.mark.parametrize("sharding", ["zero3", "fsdp2"])
def test_groups_that_share_rows_with_sharding(sharding, trained, checkpoint, small_data, tmp_path):
    """Under ZeRO-3 two groups of two, which have other rows; with a sharded head, loss in chunks and an evaluation."""
    pytest.importorskip("deepspeed")
    overrides = ("sequence_parallel_size=2", "do_eval=true", "per_device_eval_batch_size=2", "logits_chunk=3")
    if sharding == "zero3":
        keys = (*WAYS["zero3"][0], *overrides)
        start("full", tmp_path / "out", checkpoint, small_data, *keys, in_two=True, processes=4)
    else:
        run_way("fsdp2", "full", tmp_path / "out", checkpoint, small_data, *overrides, "per_device_train_batch_size=8")
    reference = trained(None, "full", "logits_chunk=0", "do_eval=true", "per_device_eval_batch_size=2")
    for a, b in zip(history(reference), history(tmp_path / "out"), strict=True):
        for key in ("loss", "nll", "masked_fraction", "grad_norm"):
            assert b[key] == pytest.approx(a[key], rel=1e-4), key
    bounds = [
        json.loads((path / "eval_results.json").read_text())["eval_loss"] for path in (reference, tmp_path / "out")
    ]
    assert bounds[1] == pytest.approx(bounds[0], rel=1e-4)


@pytest.mark.slow
def test_fsdp_that_would_not_shard_is_refused(checkpoint, small_data, tmp_path):
    keys = tuple(f"{key}={value}" for key, value in FSDP.items())
    with pytest.raises(AssertionError, match="error: fsdp: "):
        start("full", tmp_path / "out", checkpoint, small_data, *WAYS["fsdp2"][0], *keys, in_two=True)


@pytest.mark.slow
def test_zero_with_use_cpu_is_refused(checkpoint, small_data, tmp_path):
    pytest.importorskip("deepspeed")
    with pytest.raises(AssertionError, match=r"error: deepspeed: .*DS_ACCELERATOR=cpu"):
        start("full", tmp_path / "out", checkpoint, small_data, *WAYS["zero2"][0], "use_cpu=true", in_two=True)
    assert not (tmp_path / "out").exists()


@pytest.mark.slow
@pytest.mark.parametrize("way", ["accumulation", "ddp", "zero2"])
def test_mixed_noise_is_the_same_in_each_way(way, trained):
    overrides = ("noise_process=mixed", "uniform_ratio=0.3")
    reference, out = trained(None, "full", *overrides), trained(way, "full", *overrides)
    for a, b in zip(history(reference), history(out), strict=True):
        for key in ("loss", "kl", "masked_fraction", "grad_norm"):
            assert b[key] == pytest.approx(a[key], rel=WAYS[way][2]), key
    actual = weights(out, "full")
    for key, value in weights(reference, "full").items():
        torch.testing.assert_close(actual[key].float(), value.float(), rtol=1e-2, atol=2e-4, msg=key)


@pytest.fixture(scope="module")
def untied(tmp_path_factory, checkpoint):
    """The shared checkpoint with an output embedding of its own."""
    folder = tmp_path_factory.mktemp("untied") / "model"
    model = AutoModelForCausalLM.from_pretrained(checkpoint)
    model.config.tie_word_embeddings = False
    model.lm_head.weight = torch.nn.Parameter(model.lm_head.weight.detach().clone())
    model.save_pretrained(folder)
    for file in checkpoint.iterdir():
        if file.is_file() and not (folder / file.name).exists() and file.suffix != ".bin":
            shutil.copy(file, folder)
    return folder


@pytest.fixture(scope="module")
def one_word(tmp_path_factory, small_data):
    """Examples whose response is one token."""
    folder = tmp_path_factory.mktemp("one_word") / "data"
    shutil.copytree(small_data, folder)
    examples = [{"instruction": f"Tom has {n} apples.", "output": str(n)} for n in range(2, 10)]
    (folder / "tiny_problems_train.jsonl").write_text("".join(json.dumps(example) + "\n" for example in examples))
    return folder


@pytest.fixture(scope="module")
def one_process_reference(tmp_path_factory, untied, one_word):
    """One process with both examples of a step, two tokens each, without gradient checkpointing."""
    folder = tmp_path_factory.mktemp("rows") / "out"
    overrides = ("per_device_train_batch_size=2", "use_cpu=true", "disable_gradient_checkpointing=true")
    start("full", folder, untied, one_word, "train_on_padding=false", *overrides)
    return folder


@pytest.mark.slow
@pytest.mark.parametrize("way", ["ddp", "zero2", "zero3", "fsdp2"])
def test_a_process_without_a_masked_token(way, one_process_reference, untied, one_word, tmp_path):
    """With untied embeddings and gradient checkpointing: a process with nothing to project still takes part."""
    reference, out = one_process_reference, tmp_path / "out"
    masked = [round(log["masked_fraction"] * 4) for log in history(reference)]
    assert min(masked) < 2, "every process has a masked token; take another seed"
    overrides = ("per_device_train_batch_size=1", "train_on_padding=false", "disable_gradient_checkpointing=false")
    run_way(way, "full", out, untied, one_word, *overrides)
    for a, b in zip(history(reference), history(out), strict=True):
        for key in ("loss", "nll", "masked_fraction", "grad_norm"):
            assert b[key] == pytest.approx(a[key], rel=WAYS[way][2], abs=1e-6), key
    expected, actual = weights(reference, "full"), weights(out, "full")
    assert expected.keys() == actual.keys() and "lm_head.weight" in actual
    for key, value in expected.items():
        torch.testing.assert_close(actual[key].float(), value.float(), rtol=1e-2, atol=2e-4, msg=key)


@pytest.mark.slow
@pytest.mark.parametrize("way", ["ddp", "zero2", "zero3", "fsdp2"])
def test_each_way_resumes(way, trained, checkpoint, small_data, tmp_path):
    whole, half = trained(way, "full"), tmp_path / "half"
    half.mkdir()
    shutil.copytree(whole / "checkpoint-2", half / "checkpoint-2")
    run_way(way, "full", half, checkpoint, small_data, f"resume_from_checkpoint={half / 'checkpoint-2'}")
    assert [log["loss"] for log in history(half)] == pytest.approx([log["loss"] for log in history(whole)], rel=1e-6)


@pytest.mark.slow
def test_a_diverged_run_stops_in_all_processes(checkpoint, small_data, tmp_path):
    folder = tmp_path / "out"
    overrides = (*WAYS["ddp"][0], "learning_rate=1.0e+38", "max_steps=8", "save_steps=1", "max_grad_norm=0")
    with pytest.raises(AssertionError) as ended:
        start("full", folder, checkpoint, small_data, *overrides, in_two=True)
    report = str(ended.value)
    for rank in (0, 1):
        part = report.partition(f"rank {rank} ended with ")[2].partition("rank 1 ended")[0]
        assert "the loss was NaN or infinite in steps 2 to 3" in part
    assert not (folder / "model.safetensors").exists()
    assert not list(folder.glob("checkpoint-*"))


@pytest.mark.slow
def test_published_weights_are_renamed_under_zero3(small_data, tmp_path):
    """Full training of LLaDA: published names load into a sharded model, and plain names are saved."""
    pytest.importorskip("deepspeed")
    published = write_llada(tmp_path / "llada")
    lora = ("lora_rank:", "lora_alpha:", "lora_target:", "finetuning_type:")
    lines = (ROOT / "examples" / "llada_lora_ddm_sft.yaml").read_text().splitlines()
    lines = [line for line in lines if not line.startswith(lora)] + ["finetuning_type: full"]
    (tmp_path / "full.yaml").write_text("\n".join(lines) + "\n")
    keys = (tmp_path / "full.yaml", *SMALL, f"model_name_or_path={published}", f"dataset_dir={small_data}")
    keys += ("dataset=tiny_problems_train", "gradient_accumulation_steps=1", "bf16=false", "cutoff_len=128")
    keys += ("max_steps=2", "save_strategy=no")
    reference, split = tmp_path / "reference", tmp_path / "split"
    run("train", *keys, f"output_dir={reference}", *ONE_PROCESS)
    overrides, _, tolerance = WAYS["zero3"]
    train_in_processes(2, *keys, f"output_dir={split}", *overrides, env={"DS_ACCELERATOR": "cpu"})
    for a, b in zip(history(reference), history(split), strict=True):
        assert b["loss"] == pytest.approx(a["loss"], rel=tolerance)
    expected, trained = weights(reference, "full"), weights(split, "full")
    assert trained.keys() == expected.keys() and "model.embed_tokens.weight" in trained
    for key, value in expected.items():
        torch.testing.assert_close(trained[key].float(), value.float(), rtol=1e-2, atol=2e-4, msg=key)


@pytest.fixture(scope="module")
def adapted_head_reference(tmp_path_factory, untied, small_data):
    """One process with LoRA on the output embedding, with all logits at once."""
    folder = tmp_path_factory.mktemp("adapted_head") / "out"
    start("lora", folder, untied, small_data, *ONE_PROCESS, *ADAPTED_HEAD, "logits_chunk=0")
    return folder


@pytest.mark.slow
@pytest.mark.parametrize("way", ["ddp", "zero3", "fsdp2"])
def test_lora_on_the_output_embedding(way, adapted_head_reference, untied, small_data, tmp_path):
    """In chunks, except with ZeRO-3, which gathers the adapter's weights only within the adapter's layers."""
    finished = run_way(way, "lora", tmp_path / "out", untied, small_data, *ADAPTED_HEAD, "logits_chunk=3")
    for a, b in zip(history(adapted_head_reference), history(tmp_path / "out"), strict=True):
        for key in ("loss", "nll", "grad_norm"):
            assert b[key] == pytest.approx(a[key], rel=WAYS[way][2]), key
    assert any("holds the logits of all" in done.stdout + done.stderr for done in finished) == (way == "zero3")
    actual = weights(tmp_path / "out", "lora")
    # ZeRO-3 leaves out the frozen weight of the output embedding, which PEFT saves beside such an adapter.
    adapters = {k: value for k, value in weights(adapted_head_reference, "lora").items() if "lora_" in k}
    for key, value in adapters.items():
        torch.testing.assert_close(actual[key].float(), value.float(), rtol=1e-2, atol=2e-4, msg=key)
    assert sum("lm_head" in key for key in adapters) == 2
