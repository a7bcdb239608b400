"""A small corpus, and prepare-data in this process with any tokenizer."""

import json
import os

from llamafactory_ddm.data.corpus.encoder import Encoder
from llamafactory_ddm.data.corpus.keys import PrepareKeys
from llamafactory_ddm.data.corpus.prepare import begin, finish, make_blocks, plan, write_metadata

from .cli import ROOT

TEXTS = [
    json.loads(line)["text"]
    for line in (ROOT / "data" / "tiny_corpus_train.jsonl").read_text(encoding="utf-8").splitlines()[:300]
]


def write(folder, texts, name="corpus.jsonl"):
    folder.mkdir(exist_ok=True)
    path = folder / name
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts), encoding="utf-8")
    return path


def prepare(folder, tokenizer, **keys):
    preparation = plan(PrepareKeys(tokenized_path=str(folder), **keys), Encoder.of(tokenizer, tokenizer.eos_token))
    report = begin(preparation)
    if report is None:
        make_blocks(preparation)
        write_metadata(preparation)
        report = finish(preparation)
    return report


def end_process(job, encoder):
    """A job that ends its process, as the kernel does when memory runs out."""
    os._exit(9)
