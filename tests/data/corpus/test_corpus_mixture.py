"""Mixtures against LLaMA-Factory's merge_dataset."""

import json
from types import SimpleNamespace

import numpy as np
import pytest
from datasets import Dataset, load_from_disk
from llamafactory.data.data_utils import merge_dataset

from llamafactory_ddm.data.corpus.mixture import count_rows
from support.corpus import TEXTS, prepare
from support.tiny import tiny_tokenizer


def upstream(lengths, probabilities, seed, strategy):
    """The (source, row) pairs of upstream's mixture."""
    sets = [Dataset.from_dict({"at": [[index, n] for n in range(length)]}) for index, length in enumerate(lengths)]
    data_args = SimpleNamespace(mix_strategy=strategy, interleave_probs=probabilities, streaming=False)
    return merge_dataset(sets, data_args, seed=seed)["at"][:]


@pytest.mark.parametrize("strategy", ["interleave_under", "interleave_over"])
@pytest.mark.parametrize(
    ("lengths", "probabilities"),
    [((3, 5), (0.69, 0.31)), ((700, 900, 40), (0.5, 0.4, 0.1)), ((2000, 1000), (0.69, 0.31)), ((1, 1), (0.5, 0.5))],
)
def test_the_number_of_rows_is_upstreams(lengths, probabilities, strategy):
    for seed in range(5):
        expected = len(upstream(lengths, probabilities, seed, strategy))
        assert count_rows(lengths, probabilities, seed, repeats=strategy == "interleave_over") == expected


@pytest.mark.parametrize("strategy", ["interleave_under", "interleave_over"])
@pytest.mark.parametrize("count", [1, 2])
def test_the_blocks_are_those_of_upstreams_mixture(strategy, count, tmp_path):
    """In order, over several files, and with the shares that interleave_probs asks for."""
    given = {}
    for name, texts in (("slim", TEXTS[:120]), ("star", TEXTS[120:])):
        given[name] = str(tmp_path / f"{name}.jsonl")
        (tmp_path / f"{name}.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    tokenizer, keys = tiny_tokenizer(), {"cutoff_len": 8, "shard_size": 0.004, "seed": 7}
    parts = []
    for name, path in given.items():
        prepare(tmp_path / name, tokenizer, sources=path, **keys)
        parts.append(load_from_disk(str(tmp_path / name))["train"]["input_ids"][:])
    report = prepare(
        tmp_path / "mixed",
        tokenizer,
        sources=given,
        mix_strategy=strategy,
        interleave_probs="0.69,0.31",
        preprocessing_num_workers=count,
        **keys,
    )
    chosen = upstream([len(part) for part in parts], [0.69, 0.31], 7, strategy)
    assert load_from_disk(str(tmp_path / "mixed"))["train"]["input_ids"][:] == [parts[s][n] for s, n in chosen]
    assert len(list((tmp_path / "mixed" / "train").glob("*.arrow"))) > 2
    counts = np.bincount([source for source, _ in chosen])
    assert report["train"] == {"slim": counts[0], "star": counts[1]}
    n_rows = counts.sum()
    assert abs(counts[0] / n_rows - 0.69) < 3 * np.sqrt(0.69 * 0.31 / n_rows)
