"""The speed and memory of prepare-data, against LLaMA-Factory's own pre-tokenisation of the same file.

    python benchmarks/prepare_data.py [--megabytes 20] [--rounds 3] [--processes 2] [--folder DIR]

Writes a parquet file of texts like the built-in ones, with the built-in tokenizer, and tokenises and packs it into
blocks of 256 tokens both ways, in turn, each in a fresh process. Figures are CPU seconds of all processes, as those do
not depend on what else runs, from the YAML's keys to the blocks on disk; ratios are medians over the rounds. Memory is
the peak resident memory (VmHWM) with one process, for a file of a tenth of the size and for the whole.
LLaMA-Factory drops what is left of each 1000 documents, prepare-data of each shard, so their numbers of blocks differ.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import pyarrow
import pyarrow.parquet

ROOT = Path(__file__).resolve().parents[1]
LENGTH = 256  # positions of the built-in model
CLAIMS = {"speed": 1.0, "memory": 1.1}
_CLOCK = """
    def cpu():
        times = os.times()
        return times.user + times.system + times.children_user + times.children_system
"""
_OURS = """
import json, os, re, sys, time
from pathlib import Path
if __name__ == "__main__":
CLOCK
    from llamafactory_ddm._autoload import activate
    activate()
    from llamafactory_ddm.integration.prepare_data import prepare_data
    keys = json.loads(sys.argv[1])
    start, wall = cpu(), time.perf_counter()
    prepare_data(keys)
"""
_UPSTREAM = """
import json, os, re, sys, time
from pathlib import Path
if __name__ == "__main__":
CLOCK
    from llamafactory.data import get_dataset, get_template_and_fix_tokenizer
    from llamafactory.hparams import get_train_args
    from llamafactory.model import load_tokenizer
    keys = json.loads(sys.argv[1])
    start, wall = cpu(), time.perf_counter()
    model_args, data_args, training_args, _, _ = get_train_args(keys)
    module = load_tokenizer(model_args)
    template = get_template_and_fix_tokenizer(module["tokenizer"], data_args)
    get_dataset(template, model_args, data_args, training_args, stage="pt", **module)
"""
_END = """
    seconds, wall = cpu() - start, time.perf_counter() - wall
    peak = int(re.search(r"VmHWM:\\s+(\\d+)", Path("/proc/self/status").read_text())[1]) / 1024
    print(json.dumps([seconds, peak, wall]))
"""


def write_corpus(path: Path, megabytes: float) -> None:
    """Write the built-in texts, ten to a document and each document with its number, in row groups of 1000."""
    lines = (ROOT / "data" / "tiny_corpus_train.jsonl").read_text(encoding="utf-8").splitlines()
    texts = [json.loads(line)["text"] for line in lines]
    documents = ["\n".join(texts[n : n + 10]) for n in range(0, len(texts), 10)]
    path.parent.mkdir(parents=True)
    schema = pyarrow.schema([("text", pyarrow.string()), ("id", pyarrow.int64())])
    size, number = 0, 0
    with pyarrow.parquet.ParquetWriter(path, schema) as writer:
        while size < megabytes * 1e6:
            rows = [{"text": f"{n}. {documents[n % len(documents)]}", "id": n} for n in range(number, number + 1000)]
            writer.write_table(pyarrow.Table.from_pylist(rows, schema))
            size, number = size + sum(len(row["text"]) for row in rows), number + 1000


def ours(corpus: Path, out: Path, processes: int, shard_size: float) -> tuple[float, float]:
    """Return the CPU seconds of prepare-data, and the peak memory of its first process in MB."""
    keys = {"model_name_or_path": str(ROOT / "data" / "tiny_gpt2"), "mask_token": "<|mask|>", "sources": str(corpus)}
    keys |= {"cutoff_len": LENGTH, "tokenized_path": str(out), "preprocessing_num_workers": processes}
    return call(_OURS, keys | {"shard_size": shard_size})


def upstream(corpus: Path, out: Path, processes: int) -> tuple[float, float]:
    """Return the CPU seconds of LLaMA-Factory, and the peak memory of its first process in MB."""
    info = {"corpus": {"file_name": corpus.name, "columns": {"prompt": "text"}}}
    (corpus.parent / "dataset_info.json").write_text(json.dumps(info))
    keys = {"model_name_or_path": str(ROOT / "data" / "tiny_gpt2"), "stage": "pt", "do_train": True, "use_cpu": True}
    keys |= {"dataset": "corpus", "dataset_dir": str(corpus.parent), "cutoff_len": LENGTH}  # packed by default
    keys |= {"tokenized_path": str(out), "output_dir": str(out) + "-unused", "overwrite_cache": True}
    keys |= {"preprocessing_num_workers": processes, "report_to": "none"}
    return call(_UPSTREAM, keys)


def call(code: str, keys: dict[str, Any]) -> tuple[float, float]:
    """Run code in a fresh process; return what it prints last."""
    with tempfile.TemporaryDirectory() as cache:
        script = Path(cache) / "run.py"
        script.write_text(code.replace("CLOCK\n", _CLOCK) + _END)
        env = {**os.environ, "HF_HOME": cache, "HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false"}
        env |= {"CUDA_VISIBLE_DEVICES": "", "LLAMAFACTORY_VERBOSITY": "WARNING"}
        done = subprocess.run(
            [sys.executable, script, json.dumps(keys)], capture_output=True, text=True, env=env, check=False
        )
    if done.returncode:
        raise SystemExit(done.stderr[-3000:])
    seconds, peak, wall = json.loads(done.stdout.splitlines()[-1])
    print(f"    {seconds:.1f} CPU seconds, {wall:.1f} s, {peak:.0f} MB", flush=True)
    return float(seconds), float(peak)


def n_blocks(folder: Path) -> int:
    """Return the number of blocks in a folder."""
    from datasets import load_from_disk

    return len(load_from_disk(str(folder))["train"])


def report(text: str, value: float, claim: str, held: bool) -> bool:
    """Print a line, and return whether the claim holds."""
    print(f"{text:<62} {value:8.2f}   claimed {claim}  {'held' if held else 'NOT HELD'}", flush=True)
    return held


def main() -> int:
    """Run the benchmark; return 1 if a claim does not hold."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--megabytes", type=float, default=20.0, help="of text (default: 20)")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--processes", type=int, default=2, help="of the second comparison (default: 2)")
    parser.add_argument("--folder", type=Path, help="where the temporary folder is made")
    arguments = parser.parse_args()
    work = Path(tempfile.mkdtemp(prefix="prepare-data-", dir=arguments.folder))
    held = True
    try:
        corpora = {share: work / f"corpus{share}" / "corpus.parquet" for share in (1, 10)}
        for share, corpus in corpora.items():
            write_corpus(corpus, arguments.megabytes * share / 10)
        shard = arguments.megabytes / 10
        peaks: dict[int, float] = {}
        for processes in dict.fromkeys((1, arguments.processes)):
            ratios = []
            for _ in range(arguments.rounds):
                for name in ("ours", "upstream"):
                    shutil.rmtree(work / name, ignore_errors=True)
                theirs, _ = upstream(corpora[10], work / "upstream", processes)
                mine, peak = ours(corpora[10], work / "ours", processes, shard)
                if processes == 1:
                    peaks[10] = peak
                ratios.append(theirs / mine)
            least = CLAIMS["speed"]
            ratio = statistics.median(ratios)
            text = f"documents per CPU second, to LLaMA-Factory's, {processes} process(es)"
            held &= report(text, ratio, f">= {least:.2f}", ratio >= least)
        blocks = n_blocks(work / "ours"), n_blocks(work / "upstream")
        print(f"blocks: prepare-data {blocks[0]}, LLaMA-Factory {blocks[1]}")
        shutil.rmtree(work / "ours")
        _, peaks[1] = ours(corpora[1], work / "ours", 1, shard)
        growth = peaks[10] / peaks[1]
        print(f"peak memory of prepare-data: {peaks[1]:.0f} MB at 1x, {peaks[10]:.0f} MB at 10x")
        held &= report(
            "peak memory at 10x the text / at 1x",
            growth,
            f"<= {CLAIMS['memory']:.2f}",
            growth <= CLAIMS["memory"],
        )
    finally:
        shutil.rmtree(work, ignore_errors=True)
    return 0 if held else 1


if __name__ == "__main__":
    sys.exit(main())
