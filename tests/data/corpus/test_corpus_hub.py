"""Sources of the Hugging Face Hub, through its own client, against a server on this machine."""

import gzip
import json
import os
import re
import subprocess
import sys

import pyarrow
import pyarrow.parquet
import pytest
from datasets import load_from_disk

from support.corpus import TEXTS, prepare
from support.hub import TOKEN, serving_hub
from support.tiny import tiny_tokenizer

# The client reads its environment when it is imported, so each run is a process, which does without torch.
SCRIPT = """
import json, sys
from fsspec.spec import AbstractBufferedFile
from tokenizers import Tokenizer
from llamafactory_ddm.data.corpus import files
from llamafactory_ddm.data.corpus.encoder import Encoder
from llamafactory_ddm.data.corpus.keys import PrepareKeys
from llamafactory_ddm.data.corpus.prepare import begin, finish, make_blocks, plan, write_metadata

AbstractBufferedFile.readline = None  # would copy a block for each line

def prepare(keys):
    preparation = plan(PrepareKeys(cutoff_len=16, **keys), encoder)
    report = begin(preparation)
    if report is None:
        make_blocks(preparation)
        write_metadata(preparation)
        report = finish(preparation)
    return report

if __name__ == "__main__":
    tokenizer, runs, block_size = json.loads(sys.argv[1])
    encoder = Encoder("<|endoftext|>", None, 300, False, Tokenizer.from_file(tokenizer), None)
    files._FETCHING["block_size"] = block_size or files._FETCHING["block_size"]
    for keys in runs:
        try:
            print(json.dumps(prepare(keys)))
        except ValueError as error:
            print(json.dumps(str(error)))
"""


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Files as on the Hub, and a tokenizer."""
    folder = tmp_path_factory.mktemp("hub")
    rows = [{"text": text, "score": n / 300, "id": f"<{n}>"} for n, text in enumerate(TEXTS)]
    lines = [json.dumps(row).encode() + b"\n" for row in rows]
    for name in ("lines/train/b", "lines/train/a", "web/en", "web/de", "web/.cache", "converted"):
        (folder / name).mkdir(parents=True)
    (folder / "lines/train/a/0.jsonl").write_bytes(b"".join(lines[:60]))
    (folder / "lines/train/a/1.jsonl").write_bytes(b"".join(lines[60:90]))
    (folder / "lines/train/b/0.jsonl.gz").write_bytes(gzip.compress(b"".join(lines[90:160])))
    (folder / "lines/train/b/1.jsonl.zst").write_bytes(
        pyarrow.compress(b"".join(lines[160:180]), "zstd", asbytes=True)
    )
    (folder / "lines/README.md").write_text("no data")
    for name, part in (("en/0", rows[:50]), ("en/1", rows[50:60]), ("de/0", rows[60:99]), (".cache/0", rows)):
        table = pyarrow.Table.from_pylist(part)
        pyarrow.parquet.write_table(table, folder / "web" / f"{name}.parquet", row_group_size=7)
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows[:70]), folder / "converted" / "0.parquet")
    tiny_tokenizer().backend_tokenizer.save(str(folder / "tokenizer.json"))
    return folder


@pytest.fixture
def hub(folder):
    sets = {"org/set": folder, "org/set@refs/convert/parquet": folder, "org/secret": folder, "org/gated": folder}
    with serving_hub(sets, private={"org/secret"}, gated={"org/gated"}) as hub:
        yield hub


def run(folder, env, *runs, block_size=None):
    """Prepare each corpus in one new process; returns the reports, or the errors."""
    words = json.dumps([str(folder / "tokenizer.json"), runs, block_size])
    env = {name: value for name, value in os.environ.items() if not name.startswith("HF_")} | env
    (folder / "script.py").write_text(SCRIPT)  # for the processes that it starts
    command = [sys.executable, folder / "script.py", words]
    done = subprocess.run(command, env=env, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    return [json.loads(line) for line in done.stdout.splitlines()]


def sources(base):
    revision = "@refs/convert/parquet" if "://" in base else ""
    return {
        "lines": f"{base}/lines/**/*.jsonl*",
        "web": {"path": [f"{base}/web/"], "filters": ["score >= 0.1"]},
        "one": f"{base}/lines/train/a/0.jsonl",
        "revision": [f"{base}{revision}/converted", f"{base}{revision}/conv*/*.parquet"],
    }


def test_the_blocks_are_those_of_the_same_files(folder, hub, tmp_path):
    """Globs, folders, files and revisions; two processes; JSON lines, compressed or not, and parquet."""
    keys = {"shard_size": 0.004, "val_size": 0.1, "deduplicate": False}
    here = prepare(tmp_path / "here", tiny_tokenizer(), sources=sources(str(folder)), cutoff_len=16, **keys)
    keys |= {"sources": sources("hf://datasets/org/set"), "tokenized_path": str(tmp_path / "there")}
    hub.failing = 1  # the client asks again
    (there,) = run(folder, hub.env(), {**keys, "preprocessing_num_workers": 2})
    assert hub.failing == 0
    assert there["sources"] == here["sources"] and there["train"] == here["train"]
    names = ["lines/train/a/0.jsonl", "lines/train/a/1.jsonl", "lines/train/b/0.jsonl.gz", "lines/train/b/1.jsonl.zst"]
    found = [[f"hf://datasets/org/set/{name}", (folder / name).stat().st_size] for name in names]
    assert there["settings"]["files"]["lines"] == found
    for split in ("train", "validation"):
        rows, expected = (load_from_disk(str(tmp_path / name))[split]["input_ids"][:] for name in ("there", "here"))
        assert rows == expected and len(rows) > 20
    assert not any(".cache" in address for address in hub.requests if "tree" not in address)


def test_lines_are_fetched_in_blocks(folder, hub, tmp_path):
    """Each block of a file once, apart from those that two shards share."""
    name = "lines/train/a/0.jsonl"
    keys = {"sources": f"hf://datasets/org/set/{name}", "tokenized_path": str(tmp_path), "shard_size": 0.005}
    (report,) = run(folder, hub.env(), keys, block_size=512)
    assert report["sources"]["documents"]["kept"] == 60
    checked, *reads = [(start, stop) for _, start, stop in hub.reads]
    size, n_shards = (folder / name).stat().st_size, len(list((tmp_path / "train").glob("*.arrow")))
    assert checked == (0, size) and size < 2**16  # to check the columns
    assert n_shards > 2 and all(start % 512 == 0 and stop == min(size, start + 512) for start, stop in reads)
    assert sorted(set(reads))[-1][1] == size and len(reads) <= len(set(reads)) + 2 * n_shards


def test_a_changed_file_is_noticed(folder, hub, tmp_path):
    keys = {"sources": "hf://datasets/org/set/changing.jsonl", "tokenized_path": str(tmp_path / "rows")}
    file = folder / "changing.jsonl"
    file.write_text("".join(json.dumps({"text": text}) + "\n" for text in TEXTS[:20]))
    report, again = run(folder, hub.env(), keys, keys)
    assert report == again and report["train"]["documents"] > 5
    file.write_text(file.read_text() + '{"text": "x"}\n')
    (error,) = run(folder, hub.env(), keys)
    assert error.startswith("sources: the files have changed since tokenized_path: ")


CHECK = "; check the name, as in hf://datasets/OWNER/NAME/FOLDER; if the data set is private or gated, "
REFUSED = (
    ("org/absent/*.parquet", "org/absent.* cannot be reached .*not found", CHECK),
    ("org/absent", "org/absent cannot be reached .*not found", CHECK),
    ("org/secret/lines/*/*/0.jsonl", "cannot be reached .*not found", CHECK),
    ("org/set@v9/lines", "cannot be reached .*revision not found", CHECK),
    ("org/set/nowhere", r"nowhere holds no \.parquet", "; check the path"),
    ("org/set/lines/*.parquet", r"holds no \.parquet", "; check the path"),
    ("org/gated/lines/train/a/0.jsonl", r"a/0\.jsonl cannot be read .*gated", CHECK),
    ("set", "datasets/set cannot be reached ", CHECK),
    ("down/set", "cannot be reached .*refused", "; check the address and the network, or download the files"),
)


@pytest.fixture(scope="module")
def explained(folder, tmp_path_factory):
    """The errors of these paths, and the reports of a user with access."""
    rows, hidden = tmp_path_factory.mktemp("rows"), {"org/secret": folder, "org/gated": folder}
    runs = {path: {"sources": f"hf://datasets/{path}", "tokenized_path": str(rows / path)} for path, *_ in REFUSED}
    *up, down = runs
    with serving_hub({"org/set": folder, **hidden}, private={"org/secret"}, gated={"org/gated"}) as hub:
        errors = run(folder, hub.env(), *(runs[path] for path in up))
        reports = run(folder, hub.env(HF_TOKEN=TOKEN), *(runs[path] for path in up if path.startswith(tuple(hidden))))
    return dict(zip(runs, errors + run(folder, hub.env(), runs[down]), strict=True)), reports


@pytest.mark.parametrize(("path", "cause", "cure"), REFUSED, ids=[path for path, *_ in REFUSED])
def test_what_cannot_be_read_is_explained_in_one_line(path, cause, cure, explained):
    error = explained[0][path]
    assert "\n" not in error and error.startswith("sources")
    assert re.search(cause, error) and cure in error, error


def test_a_token_gives_access(explained):
    assert [report["sources"]["documents"]["kept"] for report in explained[1]] == [60, 60]


READING = """
import re, sys
from llamafactory_ddm.data.corpus.files import divide, find_files, read_rows
from llamafactory_ddm.data.corpus.filters import Filters
from llamafactory_ddm.data.corpus.keys import Source
source = Source("s", (sys.argv[1],), "text", Filters.parse((), 0, None, "filters"))
n_rows = sum(1 for (piece,) in divide(source, find_files(source), 1e9) for _ in read_rows(piece, ["text"]))
print(n_rows, int(re.search(r"VmHWM:\\s+(\\d+)", open("/proc/self/status").read())[1]) / 1024)
"""


@pytest.mark.slow
@pytest.mark.parametrize("remote", [False, True])
def test_memory_does_not_grow_with_a_row_group(remote, tmp_path):
    """pyarrow would fetch it as a whole; nothing but the end of the file is fetched twice."""
    text, found = os.urandom(8000).hex(), {}
    for n in (4000, 16000):
        table = pyarrow.Table.from_pylist([{"text": f"{k}{text}"} for k in range(n)])
        file = tmp_path / f"{n}.parquet"
        pyarrow.parquet.write_table(table, file, row_group_size=n, compression="none", use_dictionary=False)
        with serving_hub({"org/set": tmp_path}) as hub:
            path = f"hf://datasets/org/set/{n}.parquet" if remote else str(file)
            command = [sys.executable, "-c", READING, path]
            done = subprocess.run(command, env={**os.environ, **hub.env()}, capture_output=True, text=True, check=True)
        n_rows, found[n] = map(float, done.stdout.split())
        size = file.stat().st_size
        assert n_rows == n and size > n * 16000
        if remote:
            fetched = [stop - start for _, start, stop in hub.reads]
            assert max(fetched) == 2**21 and sum(fetched) < size + 2**21 + 2**17  # the block with the footer
    assert found[16000] - found[4000] < 64, found  # MB, of 192 more of text
