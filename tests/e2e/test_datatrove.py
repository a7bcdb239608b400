"""datatrove's filters before `prepare-data`; extra `[datatrove]`."""

import gzip
import importlib.util
import json
import random
import re

import pyarrow
import pyarrow.parquet
import pytest

from support.cli import run
from support.corpus import TEXTS

pytestmark = pytest.mark.slow
STOP = {"that", "have", "with"}  # of Gopher's stop words, those of four letters and more
WORDS = sorted(set(re.findall(r"\b[a-z]{4,9}\b", " ".join(TEXTS))) - STOP)


def sentence(rng):
    first, *rest = rng.sample(WORDS, 8)
    return f"{first.title()} and the {' '.join(rest[:4])} of that {' '.join(rest[4:])} have to be with us."


def corpus(rng):
    """Rows with some of FineWeb's columns; and how many of them, from the first on, are to be kept."""
    good = ["\n".join(sentence(rng) for _ in range(12)) for _ in range(40)]
    others = {
        "short": sentence(rng),  # C4 wants five sentences
        "lorem": good[0] + "\nLorem ipsum dolor sit amet, lorem ipsum.",
        "code": good[1] + "\nfunction main() { return 0; }.",
        "symbols": "\n".join(f"# # # # # # # # # # {sentence(rng)}" for _ in range(12)),  # Gopher
        "stranger": "\n".join(" ".join(rng.sample(WORDS, 8)) + "." for _ in range(12)),  # no stop word
        "copy": good[2],
        "nearly": good[3].replace("us.", "everyone.", 1),
    }
    rows = [*enumerate(good), *others.items()]
    return [{"text": text, "id": f"<{n}>", "language": "en", "language_score": 0.5} for n, text in rows], 40


@pytest.mark.skipif(importlib.util.find_spec("datatrove") is None, reason="needs the extra [datatrove]")
def test_filtered_documents_are_prepared(tmp_path):
    """What the rules are known to drop is dropped, and `prepare-data` reads the rest, by the columns of the input."""
    rows, n_good = corpus(random.Random(0))
    (tmp_path / "in").mkdir()
    for n, part in enumerate((rows[:25], rows[25:])):
        pyarrow.parquet.write_table(pyarrow.Table.from_pylist(part), tmp_path / "in" / f"{n}.parquet")
    run(tmp_path / "in", tmp_path / "out", program="examples/datatrove_filters.py")
    kept = pyarrow.parquet.read_table(tmp_path / "out" / "kept", columns=list(rows[0])).to_pylist()
    assert kept == rows[:n_good]
    files = (tmp_path / "out" / "dropped").rglob("*.jsonl.gz")
    lines = {file.parent.name: gzip.decompress(file.read_bytes()).splitlines() for file in files}
    assert {name: {json.loads(line)["id"] for line in found} for name, found in lines.items()} == {
        "c4": {"<short>", "<lorem>", "<code>"},
        "gopher": {"<symbols>", "<stranger>"},
        "minhash": {"<copy>", "<nearly>"},
    }
    keys = {
        "model_name_or_path": "data/tiny_gpt2",
        "mask_token": "<|mask|>",
        "cutoff_len": 64,
        "sources": {"all": {"path": str(tmp_path / "out/kept"), "filters": ["language == en", "language_score > 0"]}},
        "tokenized_path": str(tmp_path / "rows"),
    }
    (tmp_path / "x.json").write_text(json.dumps(keys))
    run("prepare-data", tmp_path / "x.json", program="llamafactory-ddm")
    report = json.loads((tmp_path / "rows" / "prepare_data.json").read_text())
    assert report["sources"]["all"]["kept"] == report["sources"]["all"]["documents"] == n_good
    assert report["train"]["all"] > n_good
