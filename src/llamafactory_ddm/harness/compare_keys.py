"""The keys of `llamafactory-ddm compare`, and the evaluations that they ask for."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

from ..checkpoints.kind import KINDS
from ..generation.generator import error_prefix
from ..sampling.keywords import ALIASES, split_keys, with_keywords, yaml_names
from ..sampling.settings import KEYS as SAMPLING_KEYS
from ..sampling.settings import SamplingSettings
from ..utils.keys import key, keys_of
from ..utils.registry import did_you_mean
from .keys import EvalKeys, read_keys

# Names of LLaMA-Factory's and of transformers' keys of sampling that an autoregressive model has too.
AR_SAMPLING_KEYS = ("logits_temp", "topp_temp", "top_k", "repetition_penalty", "seed")
_DIFFUSION_ONLY = ("scoring", "likelihood_samples")
# Keys that say which prompts are answered, and where results go; they are the same for all models.
_COMMON_ONLY = ("task", "task_dir", "task_data", "n_shot", "max_samples", "save_dir", "run_generated_code")
_EVAL_KEYS = tuple(field.name for field in fields(EvalKeys))
FILES = ("comparison.json", "comparison.md", "parallelism.png")


@dataclass
class CompareKeys:
    """The keys of a comparison, beside those of an evaluation."""

    models: Any = key(
        None,
        "Required. A name for each model, with the keys that differ for it, such as model_name_or_path, template or "
        "diffusion_steps; `null` takes a common key away. The first model is the baseline.",
        kind="mapping",
    )
    sweep: Any = key(
        None,
        "One key of generation with a list of values, such as `{diffusion_steps: [4, 8, 16]}`. Each diffusion model "
        "is evaluated with each value.",
        kind="mapping",
    )


@dataclass
class ModelKeys:
    """The keys of a single model in `models`, beside those that it shares with an evaluation."""

    kind: str = key(
        "diffusion",
        "In an entry of models. ar: an autoregressive model, evaluated by the harness's own class hf.",
        choices=KINDS,
    )


@dataclass(frozen=True)
class Evaluation:
    """One model under one value of the swept key.

    Attributes:
        model: the user's name for the model.
        kind: "diffusion" or "ar".
        value: of the swept key; None if nothing is swept for this model.
        keys: of the evaluation; save_dir is its own folder.
        sampling: keys of generation, without their aliases.
    """

    model: str
    kind: str
    value: Any
    keys: EvalKeys
    sampling: Mapping[str, Any]


@dataclass(frozen=True)
class Comparison:
    """What the user asks for.

    Attributes:
        common: the common keys, with the tasks.
        evaluations: model by model, and value by value.
        sweep: the swept key, or None.
        save_dir: folder of the results.
    """

    common: EvalKeys
    evaluations: tuple[Evaluation, ...]
    sweep: str | None
    save_dir: Path


def read_comparison(values: Mapping[str, Any]) -> Comparison:
    """Return the evaluations that the keys ask for.

    Raises:
        ValueError: for an unknown key, a value that is not allowed, or keys that contradict each other.
    """
    if "kind" in values:
        raise ValueError("kind belongs to a single model; write it in the entry of that model under models")
    own, generation = split_keys(values, [*_EVAL_KEYS, *keys_of(CompareKeys)], "llamafactory-ddm compare")
    rest = yaml_names({**own, **generation})
    models, sweep_key = rest.pop("models", None), rest.pop("sweep", None)
    entries = _models(models)
    sweep, swept = _sweep(sweep_key)
    if sweep in rest:
        raise ValueError(f"{sweep} is set by sweep, and as a common key too; remove one of them")
    if rest.get("save_dir") is None:
        raise ValueError("save_dir is missing; name the folder of the results")
    common, _ = read_keys({"model_name_or_path": "-", **rest})
    evaluations: list[Evaluation] = []
    for name, entry in entries.items():
        with error_prefix(f"models: {name}"):
            evaluations += _evaluations(name, entry, rest, sweep, swept)
    if sweep is not None and all(evaluation.kind == "ar" for evaluation in evaluations):
        raise ValueError(f"sweep: {sweep} needs a diffusion model, and all models are of kind: ar")
    return Comparison(common, tuple(evaluations), sweep, Path(str(common.save_dir)))


def folder_name(text: str) -> str:
    """Return a name for a folder: letters, digits, `.`, `_` and `-` are kept, other characters become `-`."""
    return re.sub(r"[^\w.-]+", "-", text).strip(".-")


def _models(models: Any) -> dict[str, dict[str, Any]]:
    """Return the entries of models by name.

    Raises:
        ValueError: if there are none, an entry is no mapping, or two names give one folder.
    """
    if not models:
        raise ValueError("models is missing; name one or more, such as models: {mine: {model_name_or_path: FOLDER}}")
    if not isinstance(models, Mapping):
        raise ValueError(f"models: {models!r} must be a mapping of names to keys: {{mine: {{model_name_or_path: X}}}}")
    names: dict[str, str] = {}
    for name, entry in models.items():
        if not isinstance(name, str):
            raise ValueError(f"models: the name {name!r} is not text; write it in quotes")
        if not isinstance(entry, Mapping):
            raise ValueError(f"models: {name}: {entry!r} must be keys, such as {{model_name_or_path: FOLDER}}")
        folder = folder_name(name).lower()
        if not folder or folder in FILES:
            raise ValueError(f"models: {name!r} cannot name a folder; choose a name with letters or digits")
        if folder in names:
            raise ValueError(
                f"models: {names[folder]} and {name} would have the same folder of results ({folder}); choose names "
                "that differ in more than case and punctuation"
            )
        names[folder] = name
    return dict(models)


def _sweep(sweep: Any) -> tuple[str | None, list[Any]]:
    """Return the swept key and its values.

    Raises:
        ValueError: if there are several keys, the key is none of generation, or a value is not allowed.
    """
    if sweep is None:
        return None, []
    if not isinstance(sweep, Mapping) or len(sweep) != 1:
        given = ", ".join(map(str, sweep)) if isinstance(sweep, Mapping) else repr(sweep)
        raise ValueError(f"sweep: {given or 'nothing'}: a sweep varies one key, such as {{diffusion_steps: [4, 8]}}")
    ((given_name, values),) = sweep.items()
    name = ALIASES.get(given_name, given_name)
    if name not in SAMPLING_KEYS:
        raise ValueError(
            f"sweep: {given_name} is not a key of generation{did_you_mean(given_name, {*SAMPLING_KEYS, *ALIASES})}"
        )
    if not isinstance(values, list) or not values:
        raise ValueError(f"sweep: {name}: {values!r} must be a list of values, such as [4, 8]")
    if None in values:
        raise ValueError(f"sweep: {name}: {values} has an empty value; remove it")
    with error_prefix("sweep"):
        spec = SAMPLING_KEYS[name]
        checked = [value if name == "suppress_tokens" else spec.checked(name, value) for value in values]
    if len({_folder_of_value(name, value).lower() for value in checked}) < len(checked):
        raise ValueError(f"sweep: {name}: {values} names a value twice")
    return name, checked


def _folder_of_value(sweep: str, value: Any) -> str:
    return folder_name(f"{sweep}-{value}")


def _evaluations(
    name: str, entry: Mapping[str, Any], common: Mapping[str, Any], sweep: str | None, swept: list[Any]
) -> Iterator[Evaluation]:
    """Yield the evaluations of a model.

    Raises:
        ValueError: for an unknown key, or one that has no effect on this model.
    """
    kind = ModelKeys.__dataclass_fields__["kind"].metadata["key"].checked("kind", entry.get("kind", "diffusion"))
    known = {*_EVAL_KEYS, *SAMPLING_KEYS, *ALIASES, "kind"}
    for word in entry:
        if word in _COMMON_ONLY:
            raise ValueError(f"{word} is the same for all models; write it outside models")
        if word not in known:
            raise ValueError(f"{word} is not a key of a model{did_you_mean(word, known - {*_COMMON_ONLY})}")
        if ALIASES.get(word, word) == sweep:
            raise ValueError(f"{word} is set by sweep; remove it here")
        if kind == "ar" and not _applies_to_ar(word):
            raise ValueError(f"{word} has no effect on kind: ar; remove it, or kind: ar for a diffusion model")
    own = yaml_names({word: value for word, value in entry.items() if word != "kind"})
    merged = {word: value for word, value in {**common, **own}.items() if own.get(word, value) is not None}
    if kind == "ar":
        merged = {word: value for word, value in merged.items() if _applies_to_ar(word)}
    for value in [None] if kind == "ar" or sweep is None else swept:
        folder = Path(str(common["save_dir"])) / folder_name(name)
        settings = dict(merged)
        if value is not None:
            settings[str(sweep)] = value
            folder /= _folder_of_value(str(sweep), value)
        keys, sampling = read_keys({**settings, "save_dir": str(folder)})
        with_keywords(SamplingSettings(), {word: v for word, v in sampling.items() if word != "suppress_tokens"})
        yield Evaluation(name, kind, value, keys, sampling)


def _applies_to_ar(word: str) -> bool:
    is_shared = word in _EVAL_KEYS and word not in _DIFFUSION_ONLY
    return is_shared or word == "kind" or ALIASES.get(word, word) in AR_SAMPLING_KEYS
