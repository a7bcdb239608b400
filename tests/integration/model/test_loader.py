"""What LLaMA-Factory's loader gets to see of a run's new tokens."""

from types import SimpleNamespace

from llamafactory_ddm.integration.model.loader import _only_new_tokens
from support.tiny import tiny_tokenizer


def test_keys_name_new_tokens_alone_and_are_restored():
    tokenizer = tiny_tokenizer()
    n_embeddings = len(tokenizer) + 1  # the model has learned <a>; <b> is in its tokenizer alone
    tokenizer.add_tokens(["<a>", "<b>", "<c>", "new"], special_tokens=True)
    described = {"<a>": "first", "<b>": "second", "<c>": "third"}
    keys = {"add_tokens": ["cat", "new"], "add_special_tokens": [*described], "_special_token_descriptions": described}
    args, additions = SimpleNamespace(**keys), SimpleNamespace(ids={"<c>": n_embeddings + 1, "new": n_embeddings + 2})
    with _only_new_tokens(args, tokenizer, additions, n_embeddings):
        assert vars(args) == {
            "add_tokens": ["new"],
            "add_special_tokens": ["<b>", "<c>"],
            "_special_token_descriptions": {"<b>": "second", "<c>": "third"},
        }
    assert vars(args) == keys
    with _only_new_tokens(args, tokenizer, SimpleNamespace(ids={}), len(tokenizer)):
        assert set(vars(args).values()) == {None}


def test_keys_that_were_not_set():
    args = SimpleNamespace(add_tokens=None, add_special_tokens=None)
    with _only_new_tokens(args, tiny_tokenizer(), SimpleNamespace(ids={}), 0):
        assert args.add_tokens is args.add_special_tokens is None
    assert args.add_tokens is args.add_special_tokens is None
