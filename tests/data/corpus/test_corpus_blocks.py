"""Tokenising and packing, token by token against LLaMA-Factory's processor."""

import json
import math
import os
import pickle
from collections import Counter
from types import SimpleNamespace

import numpy as np
import pytest
from datasets import load_from_disk
from llamafactory.data.processor import PretrainDatasetProcessor
from transformers import AutoTokenizer, ByT5Tokenizer

from llamafactory_ddm.data.control_tokens import reading_as_text
from llamafactory_ddm.data.corpus.blocks import BlockFiles, write_split, writing
from llamafactory_ddm.data.corpus.encoder import Encoder
from llamafactory_ddm.data.corpus.pool import run_jobs
from llamafactory_ddm.data.corpus.prepare import is_unfinished
from llamafactory_ddm.data.corpus.shards import text_hash
from support.cli import ROOT
from support.corpus import TEXTS, end_process, prepare, write
from support.tiny import tiny_tokenizer

ODD = ["Süß 😀\n\n", " dog cat<|endoftext|> dog", "  ", "a <|mask|> b", "x" * 700, "e\u0301"]


def with_bos():
    tokenizer = tiny_tokenizer()
    tokenizer.add_bos_token = True
    return tokenizer


def masked():
    tokenizer = AutoTokenizer.from_pretrained(ROOT / "data" / "tiny_gpt2")
    tokenizer.add_special_tokens({"additional_special_tokens": ["<|mask|>"]})
    return reading_as_text(tokenizer, ["<|mask|>"])


def splitting():
    tokenizer = masked()
    tokenizer.split_special_tokens = True
    return tokenizer


def byt5():
    return ByT5Tokenizer()


MAKERS = [tiny_tokenizer, with_bos, masked, splitting, byt5]


def rows(folder, split="train"):
    return load_from_disk(str(folder))[split]["input_ids"][:]


def upstream(tokenizer, texts, length):
    """What `stage: pt` makes of the texts as one batch."""
    data_args = SimpleNamespace(packing=True, cutoff_len=length, template=None)
    processor = PretrainDatasetProcessor(template=None, tokenizer=tokenizer, processor=None, data_args=data_args)
    return processor.preprocess_dataset({"_prompt": [[{"content": text}] for text in texts]})["input_ids"]


@pytest.mark.parametrize("maker", MAKERS)
@pytest.mark.parametrize("length", [7, 64])
def test_blocks_are_upstreams_token_by_token(maker, length, tmp_path):
    texts = TEXTS[: 30 if maker is byt5 else 300] + ODD  # a slow tokenizer
    report = prepare(tmp_path / "rows", maker(), sources=str(write(tmp_path / "in", texts)), cutoff_len=length)
    expected = upstream(maker(), texts, length)
    assert rows(tmp_path / "rows") == expected
    counts = report["sources"]["documents"]
    assert counts["kept"] == len(texts) and report["train"]["documents"] == len(expected)
    assert counts["tokens"] == length * len(expected) + counts["tokens_dropped"] and counts["tokens_dropped"] < length


@pytest.mark.parametrize("maker", MAKERS)
def test_an_encoder_is_the_same_in_another_process(maker):
    encoder = Encoder.of(maker(), "<|endoftext|>")
    twin = pickle.loads(pickle.dumps(encoder))
    assert twin.digest() == encoder.digest()
    for one in (encoder, twin):
        one.start()
    for a, b in zip(encoder.encode(ODD), twin.encode(ODD), strict=True):
        assert a.tolist() == b.tolist()


def test_a_tokenizer_that_begins_with_a_token_which_it_lacks():
    tokenizer = with_bos()
    tokenizer.bos_token = None
    assert Encoder.of(tokenizer, "<|endoftext|>").bos_id is None


def test_tokenizers_are_told_apart():
    assert len({Encoder.of(maker(), "<|endoftext|>").digest() for maker in MAKERS}) == len(MAKERS)


def test_shards_are_packed_on_their_own_and_in_order(tmp_path):
    """What is left of a shard is dropped, and nothing else."""
    path, tokenizer = write(tmp_path / "in", TEXTS), tiny_tokenizer()
    report = prepare(tmp_path / "rows", tokenizer, sources=str(path), cutoff_len=32, shard_size=0.01)
    files = sorted((tmp_path / "rows" / "train").glob("*.arrow"))
    assert len(files) > 3
    stream = np.concatenate([tokenizer(text + "<|endoftext|>")["input_ids"] for text in TEXTS]).tolist()
    position = 0
    for row in rows(tmp_path / "rows"):  # each block is in the stream, at most one block after the last one
        where = next(n for n in range(position, position + 33) if stream[n : n + 32] == row)
        position = where + 32
    assert report["sources"]["documents"]["tokens"] == len(stream)


def test_the_number_of_processes_changes_nothing(tmp_path):
    keys = {"sources": str(write(tmp_path / "in", TEXTS + ODD)), "cutoff_len": 32, "shard_size": 0.02, "val_size": 0.2}
    reports = [
        prepare(tmp_path / str(count), masked(), **keys, preprocessing_num_workers=count, deduplicate=True)
        for count in (1, 2)
    ]
    assert reports[0] == reports[1]
    files = [sorted(path.relative_to(tmp_path / n) for path in (tmp_path / n).rglob("*.*")) for n in ("1", "2")]
    assert files[0] == files[1] and len(files[0]) > 10
    assert all((tmp_path / "1" / name).read_bytes() == (tmp_path / "2" / name).read_bytes() for name in files[0])


def test_filters_and_counts(tmp_path):
    documents = [{"text": "x" * n, "language": "en" if n % 2 else "de"} for n in range(40)] + [{"language": "en"}]
    path = tmp_path / "a.jsonl"
    path.write_text("".join(json.dumps(document) + "\n" for document in documents))
    keys = {"filters": "language == en", "min_length": 5, "max_length": 30, "cutoff_len": 8}
    report = prepare(tmp_path / "rows", tiny_tokenizer(), sources=str(path), **keys)
    kept = ["x" * n for n in range(5, 31, 2)]
    assert report["sources"]["documents"]["dropped"] == {"min_length": 6, "max_length": 9, "language == en": 13}
    assert report["sources"]["documents"]["kept"] == len(kept)
    assert rows(tmp_path / "rows") == upstream(tiny_tokenizer(), kept, 8)


def test_duplicates_are_dropped_across_sources_and_shards(tmp_path, monkeypatch):
    monkeypatch.setattr("llamafactory_ddm.data.corpus.duplicates._BUCKET", 50)
    a, b = write(tmp_path / "in", TEXTS[:200]), write(tmp_path / "in", TEXTS[100:] + TEXTS[:1], "b.jsonl")
    report = prepare(
        tmp_path / "rows",
        tiny_tokenizer(),
        sources={"a": str(a), "b": str(b)},
        cutoff_len=16,
        shard_size=0.005,
        deduplicate=True,
    )
    seen = Counter(TEXTS[:200] + TEXTS[100:] + TEXTS[:1])
    in_a = len(set(TEXTS[:200]))
    assert report["sources"]["a"]["kept"] == in_a
    assert report["sources"]["b"]["kept"] == len(seen) - in_a
    assert report["sources"]["b"]["dropped"] == {"deduplicate": 201 - (len(seen) - in_a)}


def test_validation_documents_are_disjoint_and_a_fraction(tmp_path):
    report = prepare(
        tmp_path / "rows", tiny_tokenizer(), sources=str(write(tmp_path / "in", TEXTS)), cutoff_len=16, val_size=0.25
    )
    held_out = [text for text in TEXTS if text_hash(text) < 2**62]
    assert abs(len(held_out) / len(TEXTS) - 0.25) < 3 * math.sqrt(0.25 * 0.75 / len(TEXTS))
    rest = [text for text in TEXTS if text not in held_out]
    assert rows(tmp_path / "rows", "validation") == upstream(tiny_tokenizer(), held_out, 16)
    assert rows(tmp_path / "rows") == upstream(tiny_tokenizer(), rest, 16)
    assert report["sources"]["documents"]["blocks"].keys() == {"train", "validation"}


@pytest.mark.parametrize("keys", [{}, {"val_size": 0.3}, {"deduplicate": True}, {"mix_strategy": "interleave_over"}])
def test_a_kill_after_any_file_loses_only_that_shard(keys, tmp_path, monkeypatch):
    """Stopped at each file that it replaces, in turn, a run goes on and writes what an uninterrupted one does."""
    sources = {name: str(write(tmp_path / name, TEXTS[n : n + 60])) for n, name in ((0, "a"), (30, "b"))}
    given = {"sources": sources, "cutoff_len": 16, "shard_size": 0.005, **keys}
    if "mix_strategy" in keys:
        given["interleave_probs"] = "0.4,0.6"
    whole = prepare(tmp_path / "whole", tiny_tokenizer(), **given)
    replace, allowed, n_kills = os.replace, 0, 0

    def dying(source, target):
        nonlocal left
        left -= 1
        if left < 0:
            raise KeyboardInterrupt
        return replace(source, target)

    monkeypatch.setattr("os.replace", dying)
    while True:
        left = allowed = 1 + allowed % 9
        try:
            report = prepare(tmp_path / "killed", tiny_tokenizer(), **given)
            break
        except KeyboardInterrupt:
            n_kills += 1
            assert is_unfinished(tmp_path / "killed") and n_kills < 200
    assert n_kills > 3 and report == whole and not is_unfinished(tmp_path / "killed")
    files = sorted(path.relative_to(tmp_path / "whole") for path in (tmp_path / "whole").rglob("*.*"))
    assert files == sorted(path.relative_to(tmp_path / "killed") for path in (tmp_path / "killed").rglob("*.*"))
    assert all((tmp_path / "whole" / n).read_bytes() == (tmp_path / "killed" / n).read_bytes() for n in files)


def test_what_was_begun_with_other_settings_is_refused(tmp_path):
    path = write(tmp_path / "in", TEXTS)
    given = {"sources": str(path), "cutoff_len": 16}
    report = prepare(tmp_path / "rows", tiny_tokenizer(), **given)
    assert prepare(tmp_path / "rows", tiny_tokenizer(), **given, preprocessing_num_workers=3) == report
    with pytest.raises(ValueError, match="begun with cutoff_len: 16, but cutoff_len is 32"):
        prepare(tmp_path / "rows", tiny_tokenizer(), **given | {"cutoff_len": 32})
    with pytest.raises(ValueError, match=r"tokenized_path: .*another tokenizer"):
        prepare(tmp_path / "rows", masked(), **given)
    path.write_text(path.read_text() + '{"text": "new"}\n')
    with pytest.raises(ValueError, match="sources: the files have changed"):
        prepare(tmp_path / "rows", tiny_tokenizer(), **given)
    with pytest.raises(ValueError, match=r"tokenized_path: .*not of prepare-data"):
        prepare(tmp_path / "in", tiny_tokenizer(), **given)


@pytest.mark.parametrize(
    ("content", "words"),
    [("{broken", r"prepare_data\.json is damaged"), ("{}", "not of prepare-data"), ("[]", "not of prepare-data")],
)
def test_a_report_that_cannot_be_read(content, words, tmp_path):
    given = {"sources": str(write(tmp_path / "in", TEXTS[:30])), "cutoff_len": 16}
    prepare(tmp_path / "rows", tiny_tokenizer(), **given)
    (tmp_path / "rows" / "prepare_data.json").write_text(content)
    with pytest.raises(ValueError, match=f"tokenized_path: .*{words}"):
        prepare(tmp_path / "rows", tiny_tokenizer(), **given)


def test_a_complete_folder_that_lost_a_file(tmp_path):
    given = {"sources": str(write(tmp_path / "in", TEXTS)), "cutoff_len": 16, "val_size": 0.2}
    prepare(tmp_path / "rows", tiny_tokenizer(), **given)
    next((tmp_path / "rows" / "validation").glob("*.arrow")).unlink()
    with pytest.raises(ValueError, match=r"tokenized_path: .*rows was complete, but .*validation.*\.arrow is gone"):
        prepare(tmp_path / "rows", tiny_tokenizer(), **given)


def test_a_folder_of_blocks_within_that_of_its_corpus(tmp_path):
    """The command may be repeated: what it wrote is no source."""
    write(tmp_path, TEXTS[:50])
    given = {"sources": str(tmp_path), "cutoff_len": 16}
    report = prepare(tmp_path / "rows", tiny_tokenizer(), **given)
    assert prepare(tmp_path / "rows", tiny_tokenizer(), **given) == report


@pytest.mark.parametrize("deduplicate", [False, True])
def test_half_of_a_surrogate_pair_is_dropped_and_counted(deduplicate, tmp_path):
    """No tokenizer takes such a text, and one document must not end a long run."""
    texts = [*TEXTS[:40], "half \ud83d", *TEXTS[40:80], "\udc00 other half"]
    report = prepare(
        tmp_path / "rows",
        tiny_tokenizer(),
        sources=str(write(tmp_path / "in", texts)),
        cutoff_len=16,
        deduplicate=deduplicate,
        val_size=0.1,
    )
    assert report["sources"]["documents"]["dropped"]["invalid Unicode"] == 2


def test_long_documents_are_tokenised_a_few_at_a_time(tmp_path, monkeypatch):
    """The tokenizer's memory grows with the characters that it gets at once."""
    inner, sizes = Encoder.encode, []

    def counted(self, documents):
        sizes.append([len(document) for document in documents])
        return inner(self, documents)

    monkeypatch.setattr(Encoder, "encode", counted)
    monkeypatch.setattr("llamafactory_ddm.data.corpus.shards._CHARACTERS", 500)
    texts = [*TEXTS[:40], "x" * 2000, *TEXTS[40:80]]
    prepare(tmp_path / "rows", tiny_tokenizer(), sources=str(write(tmp_path / "in", texts)), cutoff_len=16)
    assert rows(tmp_path / "rows") == upstream(tiny_tokenizer(), texts, 16)
    assert max(sum(batch[:-1]) for batch in sizes) < 500 and max(map(len, sizes)) > 1


@pytest.mark.parametrize(
    ("texts", "keys", "words"),
    [
        (TEXTS[:3], {"cutoff_len": 5000}, "cutoff_len: 5000 tokens"),
        (TEXTS, {"min_length": 10**6}, "no document is kept"),
        (TEXTS[:30], {"val_size": 0.001, "cutoff_len": 64}, "val_size: 0.001"),
        ([3], {}, "text_column: text .*holds 3, expected text"),
    ],
)
def test_a_corpus_without_a_block_is_refused(texts, keys, words, tmp_path):
    with pytest.raises(ValueError, match=words):
        prepare(tmp_path / "rows", tiny_tokenizer(), sources=str(write(tmp_path / "in", texts)), **keys)
    assert is_unfinished(tmp_path / "rows")


def test_an_error_in_another_process_ends_the_run(tmp_path):
    """What is finished by then stays, and the run goes on once the file is repaired."""
    path = write(tmp_path / "in", TEXTS)
    whole = path.read_bytes()
    path.write_bytes(whole[:-3] + b"\n\n\n")
    keys = {"sources": str(path), "cutoff_len": 16, "shard_size": 0.02, "preprocessing_num_workers": 2}
    with pytest.raises(ValueError, match=r"sources: .*corpus\.jsonl: the line at byte \d+ is not JSON"):
        prepare(tmp_path / "rows", tiny_tokenizer(), **keys)
    assert is_unfinished(tmp_path / "rows")
    path.write_bytes(whole)
    assert prepare(tmp_path / "rows", tiny_tokenizer(), **keys)["sources"]["documents"]["kept"] == len(TEXTS)


def test_a_process_that_was_killed_is_an_error():
    encoder = Encoder.of(tiny_tokenizer(), "<|endoftext|>")
    with pytest.raises(ValueError, match="preprocessing_num_workers"):
        run_jobs(end_process, [1, 2, 3], encoder, 2, 3, "ending")


@pytest.mark.parametrize("dtype", [np.uint16, np.int32])
def test_files_of_blocks_are_read_across_batches_and_files(dtype, tmp_path, monkeypatch):
    monkeypatch.setattr("llamafactory_ddm.data.corpus.blocks._BATCH", 12)
    ids = np.random.default_rng(0).integers(0, 60000, size=4 * 37 + 3).astype(dtype)
    files, start = [], 0
    for index, end in enumerate((40, 40, 41, len(ids))):
        with writing(tmp_path / f"{index}.arrow", 4, dtype) as writer:
            for part in np.array_split(ids[start:end], 3):
                writer.add(part)
        files.append((tmp_path / f"{index}.arrow", writer.n_blocks))
        start = end - writer.n_left
    expected = ids[: len(ids) // 4 * 4].reshape(-1, 4)
    blocks = BlockFiles(files, 4)
    for first, stop in ((0, 37), (0, 1), (9, 11), (36, 37), (5, 30)):
        assert (blocks.read(first, stop) == expected[first:stop]).all()
    write_split(tmp_path, [path.name for path, count in files if count], dtype, "x")
    stored = load_from_disk(str(tmp_path))
    assert (np.array(stored["input_ids"][:]) == expected).all()
    assert stored.cache_files and stored.features["input_ids"].feature.dtype == np.dtype(dtype).name
