"""Data sets that LLaMA-Factory cannot find: the message names the entry or the folder that was meant."""

import re
from types import SimpleNamespace

import pytest

from support.cli import ROOT


@pytest.mark.parametrize(
    ("name", "folder", "words"),
    [
        (
            "tiny_corpus_trian",
            ROOT / "data",
            r"dataset: tiny_corpus_trian: .*dataset_info.json .*'tiny_corpus_train'\?",
        ),
        (
            "tiny_corpus_train",
            ROOT / "nowhere",
            r"dataset: tiny_corpus_train: .*nowhere.*dataset_info.json .*dataset_dir",
        ),
    ],
    ids=["name", "folder"],
)
def test_a_data_set_that_is_not_listed(name, folder, words):
    from llamafactory.data.parser import get_dataset_list

    from llamafactory_ddm.integration.data.faults import explain_dataset_errors

    data_args = SimpleNamespace(dataset=[name], eval_dataset=None, dataset_dir=str(folder))
    with pytest.raises(ValueError, match=words) as error, explain_dataset_errors(data_args):
        get_dataset_list([name], str(folder))
    assert not re.search(r"\n", str(error.value))
