"""Write a small corpus in the formats of large ones, from the built-in texts, the same bytes on every machine.

    python data/make_shards.py             writes to saves/tiny_shards
    python data/make_shards.py --out DIR   writes to DIR

`web/` holds three parquet files with FineWeb's columns text, id, language and language_score; one text in five is not
English, and one in fifty is there twice. `code/` holds a file of JSON lines, compressed with zstd, whose texts are in
`content`, as StarCoder's are.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

import pyarrow
import pyarrow.parquet

HERE = Path(__file__).resolve().parent
N_WEB, N_CODE, N_FILES = 6000, 3000, 3


def read(name: str) -> list[dict[str, Any]]:
    """Return the rows of a built-in file."""
    return [json.loads(line) for line in (HERE / name).read_text(encoding="utf-8").splitlines()]


def web_rows() -> list[dict[str, Any]]:
    """Return the documents of `web/`."""
    texts = [row["text"] for row in read("tiny_corpus_train.jsonl")[:N_WEB]]
    texts = [texts[n - 1] if n % 50 == 48 else text for n, text in enumerate(texts)]
    return [
        {
            "text": text,
            "id": f"web-{n:06d}",
            "language": "de" if n % 5 == 4 else "en",
            "language_score": (n * 37 % 100) / 100,
        }
        for n, text in enumerate(texts)
    ]


def main() -> None:
    """Read the command line and write the files."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=HERE.parent / "saves" / "tiny_shards")
    out = parser.parse_args().out
    rows = web_rows()
    (out / "web").mkdir(parents=True, exist_ok=True)
    for n in range(N_FILES):
        part = rows[n * len(rows) // N_FILES : (n + 1) * len(rows) // N_FILES]
        table = pyarrow.Table.from_pylist(part)
        pyarrow.parquet.write_table(table, out / "web" / f"{n:03d}.parquet", row_group_size=500)
    (out / "code").mkdir(exist_ok=True)
    problems = read("tiny_problems_train.jsonl")[:N_CODE]
    lines = "".join(
        json.dumps({"content": f"{row['instruction']}\n{row['output']}\n", "stars": n % 9}) + "\n"
        for n, row in enumerate(problems)
    )
    (out / "code" / "000.jsonl.zst").write_bytes(pyarrow.compress(lines.encode(), "zstd", asbytes=True))
    print(f"{len(rows)} documents in {out / 'web'}, {len(problems)} in {out / 'code'}")


if __name__ == "__main__":
    main()
