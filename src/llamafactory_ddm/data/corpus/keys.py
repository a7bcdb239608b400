"""The keys of `llamafactory-ddm prepare-data`; a key that LLaMA-Factory also has keeps its name and meaning."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

from ...utils.keys import check_fields, key, keys_of, texts
from ...utils.registry import did_you_mean
from .filters import Filters

_SOURCE_KEYS = ("text_column", "filters", "min_length", "max_length")


@dataclass(frozen=True)
class Source:
    """Where documents come from, and which are kept.

    Attributes:
        name: its name in reports.
        paths: files, folders, globs or URLs.
        text_column: the column with the text.
        filters: which documents are kept.
    """

    name: str
    paths: tuple[str, ...]
    text_column: str
    filters: Filters


@dataclass
class PrepareKeys:
    """The keys of `prepare-data`, beside LLaMA-Factory's for the model and its tokenizer."""

    sources: Any = key(
        None,
        "Required. The documents: a file, a folder, a glob or a URL (`hf://datasets/…`, `s3://…`), or a list of them; "
        "or a mapping of names to these. An entry may be a mapping with path, text_column, filters, min_length and "
        "max_length, which take precedence over the keys of the same name. Files are `.parquet`, or `.jsonl` or "
        "`.json` with one object per line, also as `.gz`, `.bz2` or `.zst`.",
        kind="sources",
    )
    tokenized_path: str | None = key(
        None, "Required. Folder of the blocks, which training reads with the same key.", kind="path"
    )
    text_column: str = key("text", "Column with the text of a document.")
    filters: Any = key(
        None,
        "Comparisons that a document must pass, such as `language == en` or `score >= 0.65`: a column, one of `==`, "
        "`!=`, `>=`, `<=`, `>` and `<`, and a value. A document without the column is dropped.",
        kind="texts",
    )
    min_length: int = key(1, "Smallest number of characters of a document; shorter ones are dropped.", low=0)
    max_length: int | None = key(
        None, "Largest number of characters of a document; longer ones are dropped.", kind="integer", low=1
    )
    deduplicate: bool = key(
        False, "Keep only the first of several documents with the same text. Reads the text once more beforehand."
    )
    cutoff_len: int = key(2048, "Tokens in a block.", low=2)
    val_size: float = key(
        0.0,
        "Fraction of the documents that go to the validation split. A hash of its text decides where a document goes.",
        low=0,
        high=1,
        below_high=True,
    )
    mix_strategy: str = key(
        "concat",
        "How the blocks of several sources are combined, as LLaMA-Factory combines examples. interleave_under: drawn "
        "with interleave_probs until the first source ends. interleave_over: until the last ends, the others repeat.",
        choices=("concat", "interleave_under", "interleave_over"),
    )
    interleave_probs: str | None = key(
        None,
        "Probability of each source to give the next block, separated by commas. As blocks have one length, these are "
        "fractions of the tokens.",
        kind="names",
        needs=("mix_strategy", ("interleave_under", "interleave_over")),
    )
    seed: int = key(42, "Seed of interleave_probs.", low=0)
    preprocessing_num_workers: int = key(1, "Number of processes. The blocks do not depend on it.", low=1)
    shard_size: float = key(
        256.0,
        "Megabytes of input that become a file of blocks, and that a kill loses at most in each process.",
        low=0,
        above_low=True,
    )

    def __post_init__(self) -> None:
        if isinstance(self.interleave_probs, int | float):
            self.interleave_probs = str(self.interleave_probs)
        elif isinstance(self.interleave_probs, list):
            self.interleave_probs = ",".join(map(str, self.interleave_probs))
        sources, self.sources = self.sources, None  # read by `all_sources`
        check_fields(self)
        self.sources = sources
        if self.tokenized_path is None:
            raise ValueError("tokenized_path is missing; name the folder of the blocks")
        if Path(self.tokenized_path).is_file():
            raise ValueError(f"tokenized_path: {self.tokenized_path} is a file; name a folder")
        if self.max_length is not None and self.max_length < self.min_length:
            raise ValueError(f"max_length: {self.max_length} is less than min_length: {self.min_length}")
        self.all_sources()
        self.probabilities()

    def all_sources(self) -> list[Source]:
        """Return the sources.

        Raises:
            ValueError: if there is none, or an entry is wrong.
        """
        if not self.sources:
            raise ValueError("sources is missing; name files, folders, globs or URLs")
        if isinstance(self.sources, Mapping):
            return [self._source(str(name), f"sources.{name}", entry) for name, entry in self.sources.items()]
        return [self._source("documents", "sources", self.sources)]

    def _source(self, name: str, subject: str, entry: Any) -> Source:
        entry = dict(entry) if isinstance(entry, Mapping) else {"path": entry}
        if not name or "/" in name or name.startswith("."):
            raise ValueError(f"{subject}: the name must not be empty, hold a slash or start with a dot")
        paths = entry.pop("path", None)
        if paths is None:
            raise ValueError(f"{subject} lacks path; name files, folders, globs or URLs")
        specs, values = keys_of(PrepareKeys), {sub: getattr(self, sub) for sub in _SOURCE_KEYS}
        for sub, value in entry.items():
            if sub not in _SOURCE_KEYS:
                raise ValueError(f"{subject}.{sub} is not a key of a source{did_you_mean(sub, _SOURCE_KEYS)}")
            values[sub] = specs[sub].checked(f"{subject}.{sub}", value)
        if values["max_length"] is not None and values["max_length"] < values["min_length"]:
            raise ValueError(f"{subject}: max_length is less than min_length: {values['min_length']}")
        filters = Filters.parse(values["filters"] or (), values["min_length"], values["max_length"], subject)
        return Source(name, tuple(texts(subject, paths)), values["text_column"], filters)

    def probabilities(self) -> list[float] | None:
        """Return the probabilities of the sources, or None for concat.

        Raises:
            ValueError: if they do not fit the sources or mix_strategy.
        """
        n_sources = len(self.all_sources())
        if self.mix_strategy == "concat":
            if self.interleave_probs is not None:
                raise ValueError("interleave_probs has no effect with mix_strategy: concat; set interleave_under")
            return None
        if self.interleave_probs is None:
            raise ValueError(f"mix_strategy: {self.mix_strategy} needs interleave_probs, one for each source")
        try:
            found = [float(word) for word in self.interleave_probs.split(",")]
        except ValueError as error:
            raise ValueError(f"interleave_probs: {self.interleave_probs} must be numbers, as in 0.69,0.31") from error
        if len(found) != n_sources or n_sources < 2:
            raise ValueError(f"interleave_probs names {len(found)} probabilities, but there are {n_sources} sources")
        if not all(0 < value < 1 for value in found) or abs(sum(found) - 1) > 1e-6:
            raise ValueError(f"interleave_probs: {self.interleave_probs} must lie in (0, 1) and add up to 1")
        return found


def split_own(values: Mapping[str, Any]) -> tuple[PrepareKeys, dict[str, Any]]:
    """Return the keys of `prepare-data`, and the others, which are LLaMA-Factory's."""
    own = {field.name for field in fields(PrepareKeys)}
    mine = {name: value for name, value in values.items() if name in own}
    return PrepareKeys(**mine), {name: value for name, value in values.items() if name not in own}
