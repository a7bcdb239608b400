"""Data as users have them: templates, odd files, rows prepared elsewhere."""

import json

import pytest

from llamafactory_ddm.modeling.masked_objective import MaskedObjective
from support.cli import ABSENT

CHAT = {"formatting": "sharegpt", "columns": {"messages": "conversations"}}


def turns(*said):
    return {"conversations": [{"from": ("human", "gpt")[n % 2], "value": text} for n, text in enumerate(said)]}


@pytest.fixture
def write_data(tmp_path):
    """Return a function that writes data sets, name=(rows, entry), and returns their folder."""

    def write(**sets):
        folder = tmp_path / "data"
        folder.mkdir(exist_ok=True)
        info = {}
        for name, (rows, entry) in sets.items():
            (folder / f"{name}.json").write_text(json.dumps(rows, ensure_ascii=False), encoding="utf-8")
            info[name] = {"file_name": f"{name}.json", **entry}
        (folder / "dataset_info.json").write_text(json.dumps(info))
        return folder

    return write


@pytest.fixture
def batches(monkeypatch):
    """What the objective is given and makes of it: pairs of clean and noised batches."""
    seen, inner = [], MaskedObjective.noise

    def noise(self, clean, **keys):
        seen.append((clean, inner(self, clean, **keys)))
        return seen[-1][1]

    monkeypatch.setattr(MaskedObjective, "noise", noise)
    return seen


@pytest.mark.parametrize("form", [{}, {"packing": True}, {"variable_length": "eos_pad"}])
def test_a_template_whose_answers_end_where_the_next_turn_begins(finetune, write_data, tmp_path, batches, form):
    """Breeze: the first token of [INST] has the end-of-text token as label; later turns still come after [INST]."""
    folder = write_data(two=([turns("Tom saw a cat.", "red", "Ben saw a dog.", "blue")] * 8, CHAT))
    keys = {"template": "breeze", "sep_token": ABSENT, "dataset": "two", "dataset_dir": folder, "cutoff_len": 96}
    finetune(tmp_path / "out", **keys, eval_dataset=None, max_steps=2, per_device_train_batch_size=2, **form)
    hidden, left = 0, 0
    for clean, noised in batches:
        where = clean.shown != clean.x_0
        assert bool(where.any()) and bool(clean.maskable[where].all())
        assert set(clean.x_0[where].tolist()) == {0}  # <|endoftext|>
        assert not bool((where & (noised.z_t == clean.x_0)).any())
        left += int((where & (noised.z_t == clean.shown)).sum())
        targets = clean.x_0.clone().fill_(-1)
        targets.view(-1)[noised.head_rows + 1] = noised.scored["targets"]
        hidden += int((targets[where] == 0).sum())
    assert hidden and left and len(batches) == 2
