"""Control tokens, [MASK] and padding: their spelling in a user's text is encoded as ordinary characters."""

from __future__ import annotations

import copy
import json
from collections.abc import Sequence
from typing import Any

# A Unicode noncharacter. A token whose spelling is wrapped in it matches no text.
HIDDEN = "\ufdd0"


def control_texts(tokenizer: Any, tokens: Sequence[str]) -> list[str]:
    """Return those of `tokens` that are control tokens: added tokens other than bos, eos and ordinary words.

    Args:
        tokenizer: a Hugging Face tokenizer.
        tokens: spellings.
    """
    added = tokenizer.get_added_vocab()
    ordinary = {tokenizer.eos_token, tokenizer.bos_token}
    candidates = [token for token in dict.fromkeys(tokens) if token in added and token not in ordinary]
    words = words_among(tokenizer, candidates)
    return [token for token in candidates if token not in words]


def words_among(tokenizer: Any, tokens: Sequence[str]) -> set[str]:
    """Return those of `tokens` that are also ordinary words of the vocabulary: some models pad with "!"."""
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is None or not set(tokens) & set(backend.get_vocab(with_added_tokens=False)):
        return set()
    merges = json.loads(backend.to_str())["model"].get("merges") or ()
    pairs = [merge.split(" ") if isinstance(merge, str) else merge for merge in merges]
    merged = {"".join(pair) for pair in pairs}.union(*pairs)
    return {token for token in tokens if len(token) == 1 or token in merged}


def reading_as_text(tokenizer: Any, tokens: Sequence[str]) -> Any:
    """Return a copy of the tokenizer that encodes the spelling of control tokens as ordinary characters.

    Ids do not change. If none of the tokens exists, or the tokenizer is a slow one, it is returned unchanged.

    Args:
        tokenizer: a Hugging Face tokenizer.
        tokens: spellings of control tokens.
    """
    backend = getattr(tokenizer, "backend_tokenizer", None)
    added = tokenizer.get_added_vocab()
    new_spelling = {token: f"{HIDDEN}{token}{HIDDEN}" for token in tokens if token in added}
    if backend is None or not new_spelling:
        return tokenizer
    state = json.loads(backend.to_str())
    for entry in state["added_tokens"]:
        entry["content"] = new_spelling.get(entry["content"], entry["content"])
    unknown = state["model"].get("unk_token")
    if unknown in new_spelling:
        state["model"]["unk_token"] = new_spelling[unknown]
    vocabulary = state["model"].get("vocab")
    if isinstance(vocabulary, dict):
        state["model"]["vocab"] = {new_spelling.get(token, token): index for token, index in vocabulary.items()}
    elif isinstance(vocabulary, list):  # of pieces with their scores
        state["model"]["vocab"] = [[new_spelling.get(piece, piece), score] for piece, score in vocabulary]
    result = copy.deepcopy(tokenizer)
    result._tokenizer = type(backend).from_str(json.dumps(state))
    return result
