"""prepare-data as a user runs it: upstream's tokens, kill -9, training from the blocks, exact resume over shards."""

import importlib.util
import json
import shutil
import signal
import time
from collections import Counter
from random import Random

import pytest
from datasets import load_from_disk
from transformers import AutoTokenizer

from support.cli import ABSENT, ROOT, history, in_processes, run, start, train_here
from support.corpus import TEXTS, write
from support.hub import serving_hub
from support.limits import LIMIT

MODEL = ("model_name_or_path=data/tiny_gpt2", "mask_token=<|mask|>")
# A plugin that writes which rows each step sees, before and after noise, and ends the process as kill -9 does.
PLUGIN = """
import json, os, signal
from llamafactory_ddm.integration.train.trainer import DiffusionTrainer
inner_noise, inner_step = DiffusionTrainer._noise, DiffusionTrainer.training_step
def noise(self, collated, micro):
    clean = collated["input_ids"].tolist()
    result = inner_noise(self, collated, micro)
    with open(os.environ["ROWS_FILE"] + f".{self.args.process_index}", "a") as file:
        print(json.dumps([self.state.global_step, clean, result[0]["input_ids"].tolist()]), file=file)
    return result
def training_step(self, *rest, **keys):
    if str(self.state.global_step) == os.environ.get("KILL_AT") and str(self.args.process_index) == os.environ["RANK"]:
        os.kill(os.getpid(), signal.SIGKILL)
    return inner_step(self, *rest, **keys)
DiffusionTrainer._noise, DiffusionTrainer.training_step = noise, training_step
"""
TRAIN = (
    *("stage=ddm", "do_train=true", "finetuning_type=full", "anneal_steps=4", "use_cpu=true", "report_to=none"),
    *("cutoff_len=32", "learning_rate=1.0e-3", "logging_steps=1", "save_steps=2", "num_train_epochs=1"),
    *("lr_scheduler_type=constant", "gradient_accumulation_steps=2", "dataset_dir=data", "disable_tqdm=true"),
    *("resume_from_checkpoint=null", "plot_loss=false", "dataset=tiny_corpus_train"),  # which upstream demands
)


def prepare(yaml, *words, **rest):
    return run("prepare-data", yaml, *words, program="llamafactory-ddm", **rest)


@pytest.fixture(scope="module")
def yaml(tmp_path_factory):
    """A YAML of the built-in model and a file of documents."""
    folder = tmp_path_factory.mktemp("corpus")
    path = write(folder / "in", TEXTS)
    keys = {"model_name_or_path": "data/tiny_gpt2", "mask_token": "<|mask|>", "sources": str(path)}
    (folder / "x.json").write_text(json.dumps({**keys, "cutoff_len": 32}))
    return folder / "x.json"


@pytest.fixture(scope="module")
def blocks(yaml, tmp_path_factory):
    """A folder of blocks in three shards."""
    folder = tmp_path_factory.mktemp("blocks") / "rows"
    path = write(folder.parent / "in", TEXTS[:100])
    shard = path.stat().st_size / 3 / 1e6 + 1e-4
    prepare(yaml, f"sources={path}", f"tokenized_path={folder}", f"shard_size={shard}")
    assert len(list((folder / "train").glob("*.arrow"))) == 3
    return folder


def test_the_blocks_are_those_of_a_run_that_prepares_its_data(yaml, tmp_path):
    """The same columns and tokens, of the same rows, as upstream's own pre-tokenisation under stage: ddm."""
    info = {"corpus": {"file_name": str(yaml.parent / "in" / "corpus.jsonl"), "columns": {"prompt": "text"}}}
    (tmp_path / "dataset_info.json").write_text(json.dumps(info))
    train_here(
        "gpt2_preprocess.yaml",
        model_name_or_path="data/tiny_gpt2",
        mask_token="<|mask|>",
        dataset="corpus",
        dataset_dir=tmp_path,
        cutoff_len=32,
        val_size=ABSENT,
        preprocessing_num_workers=1,
        overwrite_cache=True,
        tokenized_path=tmp_path / "upstream",
        output_dir=tmp_path / "unused",
    )
    done = prepare(yaml, f"tokenized_path={tmp_path / 'rows'}")
    ours, theirs = (load_from_disk(str(tmp_path / name))["train"] for name in ("rows", "upstream"))
    assert ours["input_ids"][:] == theirs["input_ids"][:] and len(ours) > 100
    stored = [json.loads((tmp_path / name / "llamafactory_ddm.json").read_text()) for name in ("rows", "upstream")]
    assert stored[0] == stored[1]
    assert f"{len(ours):,}" in done.stdout


@pytest.mark.slow
def test_a_source_on_the_hub(yaml, tmp_path):
    """The same blocks as from the file itself."""
    words = ("shard_size=0.01", "preprocessing_num_workers=2")
    prepare(yaml, *words, f"tokenized_path={tmp_path / 'here'}")
    with serving_hub({"org/set": yaml.parent / "in"}) as hub:
        sources = "sources=hf://datasets/org/set/corpus.jsonl"
        prepare(yaml, *words, sources, f"tokenized_path={tmp_path / 'there'}", env=hub.env(), fresh=True)
        assert len(hub.reads) > 2
    here, there = (load_from_disk(str(tmp_path / name))["train"]["input_ids"][:] for name in ("here", "there"))
    assert here == there and len(here) > 100


@pytest.mark.slow
def test_kill_9_loses_only_what_is_not_finished(yaml, tmp_path):
    """With two processes, which end with the first one."""
    command = ("prepare-data", yaml, "shard_size=0.003", "preprocessing_num_workers=2")
    out = tmp_path / "rows"
    process = start("llamafactory-ddm", *command, f"tokenized_path={out}")
    end = time.monotonic() + LIMIT
    while not (finished := sorted((out / "unfinished").glob("0*.json"))):
        assert process.poll() is None and time.monotonic() < end
        time.sleep(0.005)
    process.send_signal(signal.SIGKILL)
    process.wait(LIMIT)
    assert (out / "unfinished").is_dir()
    keys = {"eval_dataset": ABSENT, "eval_strategy": "no", "do_eval": False, "packing": True}
    with pytest.raises(ValueError, match=r"tokenized_path: .*rows is half written"):
        train_here("tiny_gpt2_full_ddm.yaml", tokenized_path=out, output_dir=tmp_path / "out", **keys)
    kept = {path.name: path.stat().st_mtime_ns for path in (out / "train").glob("data-0000[0-3]*.arrow")}
    names = {f"data-{path.stem}" for path in finished}
    prepare(*command[1:], f"tokenized_path={out}")
    prepare(*command[1:], "preprocessing_num_workers=1", f"tokenized_path={tmp_path / 'whole'}")
    for path in (out / "train").glob("*.arrow"):
        assert path.read_bytes() == (tmp_path / "whole" / "train" / path.name).read_bytes()
        if any(path.name.startswith(name) for name in names) and path.name in kept:
            assert path.stat().st_mtime_ns == kept[path.name]
    assert load_from_disk(str(out))["train"].num_rows == load_from_disk(str(tmp_path / "whole"))["train"].num_rows


def seen(file, n_processes):
    """The rows of each step of a run, clean and noised, by rank and in order."""
    steps = {}
    for rank in range(n_processes):
        for line in file.with_name(f"{file.name}.{rank}").read_text().splitlines():
            step, clean, noised = json.loads(line)
            steps.setdefault(step, []).extend((tuple(a), tuple(b)) for a, b in zip(clean, noised, strict=True))
    return steps


@pytest.mark.slow
@pytest.mark.parametrize("n_processes", [1, 2])
def test_a_run_over_three_shards_is_killed_and_resumes_exactly(n_processes, blocks, tmp_path):
    """Identical losses; every row of the epoch is seen once, none is repeated or lost. The kill is in any step."""
    plugin, recipe = tmp_path / "plugin.py", tmp_path / "x.yaml"
    plugin.write_text(PLUGIN)
    recipe.write_text("seed: 7\n")
    words = (*MODEL, *TRAIN, f"tokenized_path={blocks}", f"plugins={plugin}")
    words += (f"per_device_train_batch_size={8 // n_processes}",)
    launcher = importlib.util.find_spec("llamafactory.launcher").origin

    def train(name, rows, *more, **env):
        env |= {"ROWS_FILE": str(tmp_path / rows)}
        line = (recipe, *words, f"output_dir={tmp_path / name}", *more)
        if n_processes == 1:
            run("train", *line, env={"RANK": "0", **env})
        else:
            in_processes(n_processes, launcher, *line, env=env)

    train("whole", "whole_rows")
    expected = history(tmp_path / "whole")
    killed = Random(time.time_ns()).randrange(2, len(expected) - 1)
    with pytest.raises(AssertionError, match="ended with -9"):
        train("killed", "first_rows", KILL_AT=str(killed))
    last = max(int(path.name.split("-")[1]) for path in (tmp_path / "killed").glob("checkpoint-*"))
    train("killed", "second_rows", "resume_from_checkpoint=true")
    assert last <= killed
    whole, first, second = (seen(tmp_path / f"{name}_rows", n_processes) for name in ("whole", "first", "second"))
    assert (min(first), max(first), min(second)) == (0, killed, last)
    joined = {**{step: rows for step, rows in first.items() if step < last}, **second}
    assert joined == whole
    rows = Counter(map(tuple, load_from_disk(str(blocks))["train"]["input_ids"][:]))
    found = Counter(clean for step in joined.values() for clean, _ in step)
    # The sampler fills the last step of several processes, of 8 rows, with the first rows, killed or not.
    assert not rows - found and (found - rows).total() == (n_processes > 1) * (-rows.total() % 8)
    actual = history(tmp_path / "killed")
    for key in ("step", "loss", "nll", "grad_norm", "masked_fraction"):
        assert [log[key] for log in actual] == [log[key] for log in expected], (key, killed)


def test_a_mask_token_of_the_tokenizer_needs_no_key(yaml, tmp_path):
    """As in training; the model has no diffusion config yet."""
    shutil.copytree(ROOT / "data" / "tiny_gpt2", tmp_path / "model")
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "model")
    tokenizer.add_special_tokens({"mask_token": "<|mask|>"})
    tokenizer.save_pretrained(tmp_path / "model")
    prepare(yaml, f"tokenized_path={tmp_path / 'rows'}", "mask_token=null", f"model_name_or_path={tmp_path / 'model'}")
    assert (tmp_path / "rows" / "prepare_data.json").is_file()


def test_mistakes_are_one_line(yaml, tmp_path):
    for words, text in (
        (("cutoff_len=9",), "tokenized_path is missing"),
        ((f"tokenized_path={tmp_path / 'a'}", "sources=nowhere/*.parquet"), "nowhere/*.parquet holds no"),
        ((f"tokenized_path={tmp_path / 'a'}", "text_column=body"), "no column 'body'"),
        ((f"tokenized_path={tmp_path / 'a'}", "filter=x"), "'filter'"),
        ((f"tokenized_path={tmp_path / 'a'}", "stage=ddm-sft"), "stage: ddm-sft"),
        ((f"tokenized_path={tmp_path / 'a'}", "packing=false"), "packing: "),
        ((f"tokenized_path={tmp_path / 'a'}", "variable_length=eos_pad"), "variable_length: eos_pad"),
    ):
        done = prepare(yaml, *words, check=False)
        assert done.returncode == 1
        (line,) = [line for line in done.stderr.splitlines() if line.startswith("llamafactory-ddm prepare-data: ")]
        assert text in line
    assert not (tmp_path / "a").exists()
