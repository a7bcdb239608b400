"""The keys of `llamafactory-ddm quality`; a key that LLaMA-Factory also has keeps its name."""

from __future__ import annotations

import itertools
from collections.abc import Mapping
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

from ..checkpoints.kind import KINDS
from ..sampling.keywords import ALIASES, split_keys, yaml_names
from ..sampling.settings import KEYS as SAMPLING_KEYS
from ..utils.keys import check_fields, key, keys_of
from ..utils.registry import did_you_mean

# Keys of generation that may be lists: every combination is a setting.
LISTS = ("denoising_strategy", "diffusion_steps", "seed")
# Keys of generation that an autoregressive model reads.
AR_KEYS = ("logits_temp", "topp_temp", "top_k", "repetition_penalty", "eos_penalty", "suppress_tokens", "seed")


@dataclass(frozen=True)
class Source:
    """A model that generates.

    Attributes:
        name: its name in the results.
        model: folder or Hub name; None if the adapter names it.
        adapter: folder of an adapter, or None.
        kind: one of `KINDS`.
        key: how messages call it.
    """

    name: str
    model: str | None
    adapter: str | None
    kind: str
    key: str

    @property
    def path(self) -> str:
        """Return what to load: the adapter, which names its model, or the model."""
        return str(self.adapter or self.model)


@dataclass
class QualityKeys:
    """The keys of a comparison, beside those of generation."""

    models: Any = key(
        None,
        "The models by the name that tables and plots show. Each is a folder, or a mapping with model_name_or_path, "
        "adapter_name_or_path and kind.",
        kind="mapping",
    )
    model_name_or_path: str | None = key(
        None, "Folder or Hub name of the model, if there is one alone; else set models.", kind="path"
    )
    adapter_name_or_path: str | None = key(None, "Folder of an adapter. It names its model.", kind="path")
    kind: str = key(
        "diffusion",
        "diffusion: the model fills a canvas. ar: it is autoregressive, and samples from left to right with a KV "
        "cache.",
        choices=KINDS,
    )
    judge_model: str | None = key(
        None,
        "Required. Folder or Hub name of the autoregressive model under which perplexities are computed, such as "
        "gpt2-large.",
        kind="path",
    )
    n_texts: int = key(64, "Number of texts of each setting.", low=1)
    length: int = key(
        64, "Largest number of tokens of a text, in its model's tokens; of a diffusion model the canvas.", low=1
    )
    batch_size: int = key(16, "Rows in a forward pass. Results agree for every value, up to rounding.", low=1)
    infer_dtype: str = key(
        "auto",
        "Type of the weights, the judge's included. auto: float32 on a CPU, else the type that they are stored in.",
        choices=("auto", "float16", "bfloat16", "float32"),
    )
    save_dir: str | None = key(
        None,
        "Required. Folder of the results. Finished texts are kept there, and the same command goes on where it was "
        "interrupted.",
        kind="path",
    )
    plugins: str | None = key(None, "Your own modules or .py files to import first.", kind="modules")

    def __post_init__(self) -> None:
        check_fields(self)
        if self.judge_model is None:
            raise ValueError("judge_model is missing; name an autoregressive model, such as judge_model: gpt2-large")
        if self.save_dir is None:
            raise ValueError("save_dir is missing; name the folder of the results")
        if Path(self.save_dir).exists() and not Path(self.save_dir).is_dir():
            raise ValueError(f"save_dir: {self.save_dir} is not a folder")
        self.sources()

    def sources(self) -> list[Source]:
        """Return the models.

        Raises:
            ValueError: if there is none, or an entry is wrong.
        """
        single = [name for name in ("model_name_or_path", "adapter_name_or_path") if getattr(self, name) is not None]
        if self.models is None:
            if not single:
                raise ValueError("model_name_or_path is missing; set it, or name several models under models")
            path = str(self.adapter_name_or_path or self.model_name_or_path)
            name = Path(path).name or path
            return [Source(name, self.model_name_or_path, self.adapter_name_or_path, self.kind, single[-1])]
        if single or self.kind != "diffusion":
            given = (*single, "kind")[0]
            raise ValueError(f"models and {given} exclude each other; write {given} into an entry of models")
        return [_source(str(name), entry) for name, entry in self.models.items()]


def _source(name: str, entry: Any) -> Source:
    """Return one entry of `models`.

    Raises:
        ValueError: if it is wrong, naming it.
    """
    if not name.strip():
        raise ValueError("models: a name is empty; give each model a name")
    subject = f"models.{name}"
    values = {"model_name_or_path": entry} if isinstance(entry, str) else entry
    if not isinstance(values, Mapping):
        raise ValueError(f"{subject}: {entry!r} must be a folder, or a mapping with model_name_or_path")
    specs = keys_of(QualityKeys)
    allowed = ("model_name_or_path", "adapter_name_or_path", "kind")
    for sub in values:
        if sub not in allowed:
            raise ValueError(f"{subject}.{sub} is not a key of a model{did_you_mean(sub, allowed)}")
    found = {sub: specs[sub].checked(f"{subject}.{sub}", value) for sub, value in values.items()}
    model, adapter = found.get("model_name_or_path"), found.get("adapter_name_or_path")
    if model is None and adapter is None:
        raise ValueError(f"{subject} lacks model_name_or_path; set it, or adapter_name_or_path")
    return Source(name, model, adapter, found.get("kind", "diffusion"), subject)


@dataclass(frozen=True)
class Sampling:
    """The keys of generation: some are lists, of which every combination is a setting.

    Attributes:
        lists: values of `LISTS`.
        rest: the other keys, by YAML key.
    """

    lists: Mapping[str, tuple[Any, ...]]
    rest: Mapping[str, Any]

    def settings(self, kind: str) -> list[dict[str, Any]]:
        """Return the keys of each setting of a model; those that its strategy does not read are left out."""
        if kind == "ar":
            shared = {name: value for name, value in self.rest.items() if name in AR_KEYS}
            return [{**shared, "seed": seed} for seed in self.lists["seed"]]
        combined = [
            dict(zip(LISTS, values, strict=True))
            for values in itertools.product(*(self.lists[name] for name in LISTS))
        ]
        return [
            {**{name: value for name, value in self.rest.items() if _reads(each, name)}, **each} for each in combined
        ]


def _reads(setting: Mapping[str, Any], name: str) -> bool:
    """Tell whether the strategy of a setting reads a key."""
    needs = SAMPLING_KEYS[name].needs
    return needs is None or needs[0] != "denoising_strategy" or setting["denoising_strategy"] in needs[1]


def read_keys(values: Mapping[str, Any]) -> tuple[QualityKeys, Sampling]:
    """Return the keys of a comparison, and those of generation.

    Raises:
        ValueError: for an unknown key or a value that is not allowed.
    """
    own, generation = split_keys(values, [field.name for field in fields(QualityKeys)], "llamafactory-ddm quality")
    keys, given = QualityKeys(**own), yaml_names(generation)
    lists = {name: _list(name, given.pop(name, SAMPLING_KEYS[name].default)) for name in LISTS}
    for name, value in given.items():
        if isinstance(value, list | tuple) and name != "suppress_tokens":
            raise ValueError(f"{name}: {value} is a list; only {', '.join(LISTS)} may be lists")
    if all(source.kind == "ar" for source in keys.sources()):
        for name in generation:
            if ALIASES.get(name, name) not in AR_KEYS:
                raise ValueError(f"{name} is read by diffusion models alone, and all models are kind: ar; remove it")
    for name in given:
        needs = SAMPLING_KEYS[name].needs
        if needs is not None and needs[0] == "denoising_strategy" and not {*needs[1]} & {*lists[needs[0]]}:
            raise ValueError(
                f"{name} is read by denoising_strategy: {' and '.join(needs[1])} only; add it, or remove {name}"
            )
    return keys, Sampling(lists, given)


def _list(name: str, value: Any) -> tuple[Any, ...]:
    """Return the values of a key that may be a list.

    Raises:
        ValueError: if one is not allowed, there is none, or one is there twice.
    """
    given = list(value) if isinstance(value, list | tuple) else [value]
    found = tuple(SAMPLING_KEYS[name].checked(name, each) for each in given)
    if not found:
        raise ValueError(f"{name} is an empty list; name at least one value")
    if len({*found}) < len(found):
        raise ValueError(f"{name}: {list(found)} names a value twice")
    return found
