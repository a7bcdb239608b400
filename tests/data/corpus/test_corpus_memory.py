"""The memory of prepare-data does not depend on the size of the corpus."""

import json
import subprocess
import sys

import pyarrow
import pyarrow.parquet
import pytest

from support.corpus import TEXTS
from support.tiny import tiny_tokenizer

SCRIPT = """
import json, re, sys
from tokenizers import Tokenizer
from llamafactory_ddm.data.corpus.encoder import Encoder
from llamafactory_ddm.data.corpus.keys import PrepareKeys
from llamafactory_ddm.data.corpus.prepare import begin, finish, make_blocks, plan, write_metadata
corpus, out, tokenizer = sys.argv[1:]
encoder = Encoder("<|endoftext|>", None, 300, False, Tokenizer.from_file(tokenizer), None)
keys = PrepareKeys(sources={"a": corpus, "b": corpus}, tokenized_path=out, cutoff_len=64, shard_size=0.25,
    mix_strategy="interleave_under", interleave_probs="0.5,0.5", val_size=0.1)
preparation = plan(keys, encoder)
begin(preparation)
make_blocks(preparation)
write_metadata(preparation)
blocks = finish(preparation)["train"]
print(json.dumps([blocks, int(re.search(r"VmHWM:\\s+(\\d+)", open("/proc/self/status").read())[1]) / 1024]))
"""


@pytest.mark.slow
def test_peak_memory_at_once_and_ten_times_the_size(tmp_path):
    tiny_tokenizer().backend_tokenizer.save(str(tmp_path / "tokenizer.json"))
    found = {}
    for share in (1, 10):
        rows = [{"text": f"{n}. {TEXTS[n % 300]}"} for n in range(2500 * share)]
        path = tmp_path / f"{share}.parquet"
        pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), path, row_group_size=500)
        words = (str(path), str(tmp_path / f"rows{share}"), str(tmp_path / "tokenizer.json"))
        done = subprocess.run([sys.executable, "-c", SCRIPT, *words], capture_output=True, text=True, check=True)
        found[share] = json.loads(done.stdout)
    (few, small), (many, large) = found[1], found[10]
    assert sum(many.values()) > 9 * sum(few.values())
    grown = sum(path.stat().st_size for path in (tmp_path / "rows10").rglob("*.arrow")) / 2**20
    assert grown > 10 and large - small < 0.1 * small, (small, large)
