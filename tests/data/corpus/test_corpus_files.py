"""Files, shards and rows of a corpus."""

import bz2
import gzip
import json
import random
import threading
import time
from contextlib import contextmanager
from pathlib import Path

import fsspec
import numpy as np
import pyarrow
import pyarrow.parquet
import pytest
from fsspec.spec import AbstractBufferedFile, AbstractFileSystem

from llamafactory_ddm.data.corpus import files
from llamafactory_ddm.data.corpus.files import Piece, divide, find_files, read_rows
from llamafactory_ddm.data.corpus.filters import Filters
from llamafactory_ddm.data.corpus.keys import Source

ROWS = [{"text": f"Tom has {n} eggs.\nSüß 😀" + "x" * (n % 7), "score": n / 40, "other": [n]} for n in range(40)]
LINES = "".join(json.dumps(row, ensure_ascii=n % 2 == 0) + "\n" for n, row in enumerate(ROWS))


def source(*paths, filters=()):
    return Source("s", tuple(map(str, paths)), "text", Filters.parse(filters, 0, None, "filters"))


def zstd(data):
    return pyarrow.compress(data, "zstd", asbytes=True)


def write_parquet(path, rows, **keys):
    path.parent.mkdir(parents=True, exist_ok=True)
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), path, **keys)
    return path


@pytest.fixture(params=["jsonl", "jsonl.gz", "json.bz2", "jsonl.zst", "parquet"])
def file(request, tmp_path):
    path = tmp_path / f"rows.{request.param}"
    if request.param == "parquet":
        return write_parquet(path, ROWS, row_group_size=7)
    compress = {"gz": gzip.compress, "bz2": bz2.compress, "zst": zstd}.get(request.param[-3:].strip("."), bytes)
    path.write_bytes(compress(LINES.encode()))
    return path


def texts_of(shards):
    return [row.get("text") for shard in shards for piece in shard for row, _ in read_rows(piece, ["text"])]


@pytest.mark.parametrize("size", [1, 50, 333, 1e9])
def test_shards_hold_each_row_once_and_in_order(file, size):
    of = source(file)
    shards = divide(of, find_files(of), size)
    assert texts_of(shards) == [row["text"] for row in ROWS]
    if size < 50 and file.suffix in (".parquet", ".jsonl"):
        assert len(shards) > 5
    if size == 1e9:
        assert len(shards) == len(shards[0]) == 1
    for shard in shards:
        for piece in shard:
            fractions = [fraction for _, fraction in read_rows(piece, ["text"])]
            assert fractions == sorted(fractions) and all(0 <= value <= 1 for value in fractions)


def test_every_cut_of_a_file_of_lines(tmp_path):
    path = tmp_path / "rows.jsonl"
    path.write_bytes(LINES.encode())
    size = path.stat().st_size
    for cut in range(0, size + 1, 7):
        pieces = [Piece(str(path), 1, 0, cut), Piece(str(path), 1, cut, size)]
        assert texts_of([pieces]) == [row["text"] for row in ROWS]


def test_folders_globs_lists_and_urls(tmp_path):
    for name in ("b/2.parquet", "b/1.parquet", "a/3.parquet", "b/.hidden.parquet", "b/_meta.parquet"):
        write_parquet(tmp_path / name, ROWS[:1])
    (tmp_path / "b/readme.txt").write_text("no data")

    def names(*paths):
        return ["/".join(path.rsplit("/", 2)[1:]) for path, _ in find_files(source(*paths))]

    assert names(tmp_path / "b") == ["b/1.parquet", "b/2.parquet"]
    assert names(tmp_path) == ["a/3.parquet", "b/1.parquet", "b/2.parquet"]
    assert names(tmp_path / "*/[13].parquet") == ["a/3.parquet", "b/1.parquet"]
    assert names(tmp_path / "b/2.parquet", tmp_path / "a", tmp_path / "b") == [
        "b/2.parquet",
        "a/3.parquet",
        "b/1.parquet",
    ]
    assert names(f"file://{tmp_path}/b/*.parquet") == ["b/1.parquet", "b/2.parquet"]


def test_what_a_folder_holds_beside_data_is_left_out(tmp_path):
    """Hidden and linked folders, metadata, and the folder of the blocks; a file that is named is read."""
    left_out = (".git/a.jsonl", "_temporary/b.jsonl", "dataset_info.json", "sub/dataset_infos.json", "rows/x.json")
    for name in ("a[1].jsonl", "sub/b.jsonl", *left_out):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(LINES)
    (tmp_path / "linked").symlink_to(tmp_path / "sub")

    def names(path):
        return [str(Path(file).relative_to(tmp_path)) for file, _ in find_files(source(path), tmp_path / "rows")]

    assert names(tmp_path) == ["a[1].jsonl", "sub/b.jsonl"]
    assert names(tmp_path / "a[1].jsonl") == ["a[1].jsonl"]  # an existing file is no glob
    assert names(tmp_path / "rows/x.json") == names(tmp_path / "rows") == ["rows/x.json"]


@pytest.mark.parametrize("name", ["000.parquet", "*.parquet"])
def test_the_hub_without_a_network(name, monkeypatch):
    """Offline, and with an endpoint that refuses connections, whose error is no OSError."""
    import huggingface_hub

    path = f"hf://datasets/HuggingFaceFW/fineweb/sample/10BT/{name}"
    words = r"sources: hf://.*\.parquet cannot be reached .*download the files and name their folder"
    for offline in (True, False):
        monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", offline)
        system = huggingface_hub.HfFileSystem(endpoint="http://127.0.0.1:9")
        monkeypatch.setattr("fsspec.core.url_to_fs", lambda url, system=system: (system, url.removeprefix("hf://")))
        with pytest.raises(ValueError, match=words):
            find_files(source(path))


def test_progress_within_a_compressed_file(tmp_path):
    """A file of many gigabytes must not leave the bar at 0 to its end."""
    text = "".join(json.dumps({"text": random.Random(n).randbytes(2000).hex()}) + "\n" for n in range(3000))
    path = tmp_path / "a.jsonl.gz"
    path.write_bytes(gzip.compress(text.encode(), 1))
    size = path.stat().st_size
    fractions = [fraction for _, fraction in read_rows(Piece(str(path), size, 0, size), ["text"])]
    assert fractions == sorted(fractions) and len(set(fractions)) > 3 and fractions[-1] == 1.0


def test_long_rows_of_parquet_are_read_a_few_at_a_time(tmp_path, monkeypatch):
    path, sizes = write_parquet(tmp_path / "a.parquet", ROWS), []
    inner = pyarrow.parquet.ParquetFile.iter_batches

    def counted(self, **keys):
        sizes.append(keys["batch_size"])
        return inner(self, **keys)

    monkeypatch.setattr(pyarrow.parquet.ParquetFile, "iter_batches", counted)
    for row_bytes in (1, 1000, 10**6):
        monkeypatch.setattr("llamafactory_ddm.data.corpus.files._ROW_BYTES", row_bytes)
        assert texts_of([[Piece(str(path), 1, 0, 1)]]) == [row["text"] for row in ROWS]
    assert sizes[0] == 1 and 1 < sizes[1] < 256 and sizes[2] == 256


def test_a_column_that_the_first_lines_lack(tmp_path):
    path = tmp_path / "a.jsonl"
    path.write_text('{"other": 1}\n' * 5 + '{"text": "x", "score": 1}\n')
    of = source(path, filters=["score > 0"])
    assert texts_of(divide(of, find_files(of), 1e6)) == [None] * 5 + ["x"]
    path.write_text('{"other": 1}\n' * 5 + '{"text": "x"}\n')
    with pytest.raises(ValueError, match=r"filters: .*no column 'score'; it has 'other', 'text'"):
        divide(of, find_files(of), 1e6)


def test_a_remote_file_system():
    """As hf:// and s3://, through fsspec."""
    import fsspec

    system = fsspec.filesystem("memory")
    with system.open("/corpus/1.parquet", "wb") as stream:
        pyarrow.parquet.write_table(pyarrow.Table.from_pylist(ROWS), stream, row_group_size=10)
    system.pipe("/corpus/2.jsonl.gz", gzip.compress(LINES.encode()))
    of = source("memory://corpus/*")
    found = find_files(of)
    assert [path for path, _ in found] == ["memory:///corpus/1.parquet", "memory:///corpus/2.jsonl.gz"]
    assert texts_of(divide(of, found, 100)) == 2 * [row["text"] for row in ROWS]


def test_files_are_checked_at_once_and_kept_in_order(tmp_path, monkeypatch):
    n_files = 8
    for n in range(n_files):
        (tmp_path / f"{n}.jsonl").write_text(json.dumps({"text": str(n)}) + "\n")
    together, opened = threading.Barrier(n_files), files._open

    @contextmanager
    def opened_together(path, fetching):
        together.wait(timeout=60)  # raises unless all files are opened at once
        time.sleep(0.02 * (n_files - int(Path(path).stem)))  # the last is ready first
        with opened(path, fetching) as both:
            yield both

    of = source(tmp_path)
    with monkeypatch.context() as patch:
        patch.setattr(files, "_open", opened_together)
        shards = divide(of, find_files(of), 1)
    assert texts_of(shards) == [str(n) for n in range(n_files)]


def test_the_first_of_several_bad_files_is_named_and_the_rest_left(tmp_path, monkeypatch):
    for n in range(500):
        (tmp_path / f"{n:03}.jsonl").write_text(json.dumps({"text" if n < 3 else "body": "x"}) + "\n")
    checked, opened = [], files._open

    @contextmanager
    def counted(path, fetching):
        checked.append(path)
        time.sleep(0.05)  # all would take at least 1.5 seconds
        with opened(path, fetching) as both:
            yield both

    monkeypatch.setattr(files, "_open", counted)
    of = source(tmp_path)
    with pytest.raises(ValueError, match=r"text_column: .*/003\.jsonl .*has no column 'text'"):
        divide(of, find_files(of), 1e6)
    assert len(checked) < 500


def test_small_files_share_a_shard(tmp_path):
    for n in range(6):
        write_parquet(tmp_path / f"{n}.parquet", ROWS[n : n + 1])
    of = source(tmp_path)
    found = find_files(of)
    size = pyarrow.parquet.read_metadata(tmp_path / "0.parquet").row_group(0).total_byte_size
    assert [len(shard) for shard in divide(of, found, 2.5 * size)] == [3, 3]


@pytest.mark.parametrize(
    ("name", "content", "words"),
    [
        ("a.jsonl", b"", "files are empty"),
        ("a.txt", b"hello", r"holds no \.parquet"),
        ("a.parquet", b"PAR1nonsense", r"a\.parquet cannot be read"),
        ("a.jsonl.gz", b"nonsense", r"a\.jsonl\.gz cannot be read"),
        ("a.jsonl", b'{"content": "x"}\n', r"text_column: .*no column 'text'; it has 'content'"),
        ("a.jsonl", b'{"text": "x"}\n', r"filters: .*no column 'score'"),
        ("a.json", b'[{"text": "x"},\n{"text": "y"}]', "byte 0 .*one object per line"),
        ("a.jsonl", b"3\n", "byte 0 is no object"),
        ("state.json", b"{\n}", r"state\.json: the line at byte 0 is not JSON .*with a glob"),
    ],
)
def test_files_that_are_refused(tmp_path, name, content, words):
    (tmp_path / name).write_bytes(content)
    of = source(tmp_path / name, filters=["score > 0"])
    with pytest.raises(ValueError, match=words) as error:
        divide(of, find_files(of), 1e6)
    assert "\n" not in str(error.value)


def test_a_broken_line_is_named(tmp_path):
    path = tmp_path / "a.jsonl"
    path.write_text('{"text": "x"}\n{"text": \n')
    with pytest.raises(ValueError, match="line at byte 14 is not JSON"):
        list(read_rows(Piece(str(path), 1, 0, 99), ["text"]))


def test_a_name_of_the_hub_is_explained():
    with pytest.raises(ValueError, match="hf://datasets/HuggingFaceFW/fineweb/"):
        find_files(source("HuggingFaceFW/fineweb"))
    with pytest.raises(ValueError, match="nosuch://x cannot be reached"):
        find_files(source("nosuch://x"))


class CountedFile(AbstractBufferedFile):
    """A local file whose ranges are fetched as those of a remote one."""

    n_bytes = 0

    def _fetch_range(self, start, end):
        CountedFile.n_bytes += end - start
        with open(self.path, "rb") as file:
            file.seek(start)
            return file.read(end - start)


class Counted(AbstractFileSystem):
    def info(self, path, **rest):
        return {"name": path, "size": Path(path).stat().st_size, "type": "file"}

    def _open(self, path, mode="rb", **rest):
        return CountedFile(self, path, mode, size=Path(path).stat().st_size, **rest)


@pytest.mark.parametrize("n_columns", [1, 6])
def test_columns_of_remote_parquet_are_fetched_once(n_columns, tmp_path):
    """Each column is read at a place of its own, and none must push the blocks of another out of memory."""
    fsspec.register_implementation("counted", Counted, clobber=True)
    names = [f"column{number}" for number in range(6)]
    random = np.random.default_rng(0)
    columns = {name: [random.bytes(1250).hex() for _ in range(4000)] for name in names}
    path = tmp_path / "x.parquet"
    pyarrow.parquet.write_table(pyarrow.table(columns), path, compression="none", use_dictionary=False)
    CountedFile.n_bytes = 0
    rows = [row for row, _ in read_rows(Piece(f"counted://{path}", 1, 0, 1), names[:n_columns])]
    assert [row["column0"] for row in rows] == columns["column0"]
    assert CountedFile.n_bytes <= 10e6 * n_columns + 2**21 * (n_columns + 2)
