"""Tokenises documents exactly as LLaMA-Factory's pre-training does, without loading transformers in each process."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

Ids = npt.NDArray[Any]


@dataclass
class Encoder:
    """A tokenizer that can be sent to other processes.

    Attributes:
        eos_token: appended to each document, as text.
        bos_id: id that replaces the first one of each block, for tokenizers that begin with it; else None.
        n_ids: number of ids.
        split_special: whether special tokens in documents are encoded as ordinary text.
        backend: a fast tokenizer's backend, or None.
        slow: a slow tokenizer, or None.
    """

    eos_token: str
    bos_id: int | None
    n_ids: int
    split_special: bool
    backend: Any
    slow: Any

    @classmethod
    def of(cls, tokenizer: Any, eos_token: str) -> Encoder:
        """Return the encoder of a Hugging Face tokenizer."""
        backend = getattr(tokenizer, "backend_tokenizer", None)
        begins = getattr(tokenizer, "add_bos_token", False) and tokenizer.bos_token_id is not None
        return cls(
            eos_token,
            int(tokenizer.bos_token_id) if begins else None,
            max(tokenizer.get_vocab().values()) + 1,
            bool(tokenizer.split_special_tokens),
            backend,
            tokenizer if backend is None else None,
        )

    @property
    def dtype(self) -> npt.DTypeLike:
        """The smallest type of a block's ids."""
        return np.uint16 if self.n_ids <= 1 << 16 else np.int32

    def digest(self) -> str:
        """Return a hash that tells tokenizers apart."""
        state = self.slow.get_vocab() if self.backend is None else json.loads(self.backend.to_str())
        whole = [state, self.eos_token, self.bos_id, self.split_special]
        return hashlib.sha256(json.dumps(whole, sort_keys=True).encode()).hexdigest()[:16]

    def start(self) -> None:
        """Prepare the tokenizer in the process that uses it."""
        if self.backend is not None:
            self.backend.no_truncation()
            self.backend.no_padding()
            self.backend.encode_special_tokens = self.split_special

    def encode(self, documents: Sequence[str]) -> list[Ids]:
        """Return the ids of each document, EOS included."""
        ended = [document + self.eos_token for document in documents]
        if self.backend is None:
            ids = self.slow(ended, add_special_tokens=False)["input_ids"]
        else:
            ids = [encoding.ids for encoding in self.backend.encode_batch_fast(ended, add_special_tokens=False)]
        return [np.array(row, dtype=self.dtype) for row in ids]
