"""Families of diffusion models that were published with code of their own, loaded as plain transformers models.

`register_family` makes transformers' Auto classes load the published files: the config is translated, the weights are
renamed while they are read, and the result is an instance of `ModelFamily.model_class`.
"""

from __future__ import annotations

import copy
import json
import re
from collections.abc import Iterable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, ClassVar, TypeVar

from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, GenerationConfig, PretrainedConfig
from transformers.models.auto.configuration_auto import CONFIG_MAPPING_NAMES

from ...modeling.diffusion_config import FILE_NAME, DiffusionConfig
from ...utils.registry import Registry
from ..weights import BrokenCheckpointError, first_line, stored_dtype

F = TypeVar("F", bound="type[ModelFamily]")


@dataclass(frozen=True)
class WeightNames:
    """The published names of weights, and the names in the transformers model.

    Attributes:
        name: name of the family in messages.
        prefixes: pairs of a published prefix and transformers' prefix; `{n}` stands for the index of a layer.
    """

    name: str
    prefixes: tuple[tuple[str, str], ...]

    def __post_init__(self) -> None:
        """Refuse pairs of which one would rename the result of another, as transformers applies them in turn.

        Raises:
            ValueError: naming both.
        """
        renaming = [pair for pair in self.prefixes if pair[0] != pair[1]]
        for published, standard in renaming:
            for other, _ in renaming:
                if other != published and (other.startswith(standard) or standard.startswith(other)):
                    raise ValueError(
                        f"weight_names of {self.name}: {published!r} becomes {standard!r}, which {other!r} would "
                        "rename again; choose longer prefixes"
                    )

    def to_standard(self, key: str) -> str:
        """Return transformers' name for a published name.

        Raises:
            ValueError: if it is not a published name.
        """
        return self._renamed(key, self.prefixes)

    def to_published(self, key: str) -> str:
        """Return the published name for transformers' name.

        Raises:
            ValueError: if the model has no weight of that name.
        """
        return self._renamed(key, [(standard, published) for published, standard in self.prefixes])

    def key_mapping(self) -> dict[str, str]:
        """Return the renaming as regular expressions with replacements, for `from_pretrained(key_mapping=...)`."""
        return {_pattern(old): new.replace("{n}", r"\1") for old, new in self.prefixes}

    def is_published(self, keys: Iterable[str]) -> bool:
        """Tell whether one of the keys is a published name that the transformers model does not use."""
        published_only = [_pattern(published) for published, standard in self.prefixes if published != standard]
        return any(re.match(pattern, key) for key in keys for pattern in published_only)

    def _renamed(self, key: str, prefixes: Iterable[tuple[str, str]]) -> str:
        for old, new in prefixes:
            match = re.match(_pattern(old), key)
            if match:
                layer = match[1] if "{n}" in old else ""
                return new.replace("{n}", layer) + key[match.end() :]
        raise ValueError(f"{key} is not a name of the published layout of {self.name}")


def _pattern(prefix: str) -> str:
    return "^" + re.escape(prefix).replace(re.escape("{n}"), r"(\d+)")


class ModelFamily:
    """Base class of published families; decorate a subclass with `register_family`.

    Attributes:
        name: model_type in the published config.json.
        title: the family's name in messages.
        model_class: the class of transformers that computes the same function.
        shift: whether logits at i predict token i + 1.
        attention: `full` or `block`, as in `DiffusionConfig`.
        weight_names: the published names of weights; None if they are those of `model_class`.
        tokenizer_class: the class of transformers to load the tokenizer with, if the published tokenizer_config.json
            names a class of the published code; None otherwise.
        published_code: files that `llamafactory-ddm convert --published` copies beside config.json.
    """

    name: ClassVar[str]
    title: ClassVar[str]
    model_class: ClassVar[Any]
    shift: ClassVar[bool]
    attention: ClassVar[str] = "full"
    weight_names: ClassVar[WeightNames | None] = None
    tokenizer_class: ClassVar[Any] = None
    published_code: ClassVar[tuple[Path, ...]] = ()

    @classmethod
    def standard_config(cls, raw: dict[str, Any]) -> PretrainedConfig:
        """Return the config of `model_class` for the content of a published config.json.

        Raises:
            KeyError: if a setting is missing.
            ValueError: if `model_class` does not support a setting.
        """
        raise NotImplementedError

    @classmethod
    def complete(cls, raw: dict[str, Any], tokenizer: Any, folder: Path) -> dict[str, Any]:
        """Return `raw` with the settings that a published config.json lacks and the rest of the folder tells.

        Args:
            raw: content of config.json.
            tokenizer: tokenizer in the same folder.
            folder: the published folder.
        Raises:
            ValueError: if a setting is invalid.
        """
        return raw

    @classmethod
    def published_config(cls, config: Any, diffusion_config: DiffusionConfig) -> dict[str, Any]:
        """Return the content of a published config.json, for `llamafactory-ddm convert --published`.

        Args:
            config: config of `model_class`.
            diffusion_config: config of the model, which `check_publishable` accepts.
        Raises:
            NotImplementedError: if models cannot be converted back to the family's layout.
        """
        raise NotImplementedError

    @classmethod
    def published_generation_config(cls, config: Any, diffusion_config: DiffusionConfig) -> dict[str, Any] | None:
        """Return the content of a published generation_config.json; None if the family has no such file."""
        return None

    @classmethod
    def can_be_written(cls) -> bool:
        """Tell whether the family defines `published_config`."""
        return cls.published_config.__func__ is not ModelFamily.published_config.__func__  # type: ignore[attr-defined]

    @classmethod
    def check_publishable(cls, source: Path, model_type: str, diffusion_config: DiffusionConfig | None) -> None:
        """Check that a plain model has the family's architecture, shift and attention.

        Args:
            source: folder of the model, for messages.
            model_type: model_type of its config.json.
            diffusion_config: its diffusion config, if any.
        Raises:
            ValueError: naming what differs.
        """
        asked = f"--published {cls.name}"
        if not cls.can_be_written():
            raise ValueError(f"{asked}: models cannot be converted to the layout of {cls.title}")
        plain = cls.model_class.config_class.model_type
        if model_type != plain:
            raise ValueError(
                f"{asked}: {source} has model_type {model_type}, but {cls.title} is a {plain}; train a {plain} model"
            )
        if diffusion_config is None:
            raise ValueError(f"{asked}: {source} holds no {FILE_NAME}, so it is no diffusion model; train it first")
        if diffusion_config.shift != cls.shift:
            token = {True: "i + 1", False: "i"}
            raise ValueError(
                f"{asked}: {source} was trained with shift: {str(diffusion_config.shift).lower()}, so its logits at "
                f"position i predict token {token[diffusion_config.shift]}, but those of {cls.title} predict token "
                f"{token[cls.shift]}; train with shift: {str(cls.shift).lower()}"
            )
        if diffusion_config.attention != cls.attention:
            raise ValueError(
                f"{asked}: {source} was trained with attention: {diffusion_config.attention}, but {cls.title} has "
                f"attention: {cls.attention}; train with attention: {cls.attention}"
            )

    @classmethod
    def checked_config(cls, raw: dict[str, Any]) -> PretrainedConfig:
        """Return `standard_config`, with a ValueError for a missing setting.

        Raises:
            ValueError: if a setting is missing or not supported.
        """
        try:
            return cls.standard_config(raw)
        except KeyError as error:
            raise ValueError(f"config.json of this {cls.title} model lacks {error}; download it again") from error

    @classmethod
    def diffusion_config(cls, raw: dict[str, Any], tokenizer: Any) -> DiffusionConfig:
        """Return the diffusion config of a published model.

        A document ends with the tokenizer's EOS, a turn with the end token of the chat template.

        Args:
            raw: content of config.json.
            tokenizer: tokenizer in the same folder.
        Raises:
            ValueError: if config.json names no mask token, or one that the tokenizer lacks.
        """
        mask = mask_of(raw, tokenizer)
        if mask is None:
            raise ValueError(
                f"mask_token_id in config.json of this {cls.title} model is {raw.get('mask_token_id')!r}, which must "
                "be the id of a token of the tokenizer; name the mask token with llamafactory-ddm convert IN OUT "
                "--mask-token"
            )
        config = DiffusionConfig(*mask, cls.shift, "masked", 0.0, "linear", 1.0, attention=cls.attention)
        return with_start_and_end(config, tokenizer)


MODEL_FAMILIES: Registry[type[ModelFamily]] = Registry("model_type")


def register_family(family: F) -> F:
    """Add a family, and have transformers' Auto classes load its published files.

    Without `trust_remote_code` these do not run the published code; runs of this package never do.

    Raises:
        ValueError: if the name is taken.
    """
    MODEL_FAMILIES.register(family)
    _register_auto_classes(family)
    return family


def detect_family(raw: dict[str, Any]) -> type[ModelFamily] | None:
    """Return the family named by model_type in a config.json, or None for a model of transformers."""
    name = raw.get("model_type")
    if name in CONFIG_MAPPING_NAMES and name not in tuple(MODEL_FAMILIES):
        return None  # without importing installed plugins in search of it
    return MODEL_FAMILIES.get(name) if name in MODEL_FAMILIES else None


def families_of_plain(model_type: str) -> list[type[ModelFamily]]:
    """Return the families to whose layout plain models of this model_type convert, if shift and attention fit."""
    families = map(MODEL_FAMILIES.get, MODEL_FAMILIES)
    return [
        family
        for family in families
        if family.can_be_written() and family.model_class.config_class.model_type == model_type
    ]


def family_of_converted(model_type: str, shift: bool, attention: str = "full") -> type[ModelFamily] | None:
    """Return the family to whose layout a plain model with this model_type, shift and attention converts, or None."""
    families = families_of_plain(model_type)
    return next((family for family in families if (family.shift, family.attention) == (shift, attention)), None)


def raw_config(folder: str | Path) -> dict[str, Any]:
    """Return the content of a folder's config.json, or an empty dict if there is none.

    Raises:
        ValueError: if it is not a JSON object.
    """
    path = Path(folder) / "config.json"
    if not path.is_file():
        return {}
    try:
        raw = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{path} is not valid JSON ({error}); download it again") from error
    if not isinstance(raw, dict):
        raise ValueError(f"{path} must hold a JSON object, got {type(raw).__name__}; download it again")
    return raw


def mask_of(raw: dict[str, Any], tokenizer: Any) -> tuple[str, int] | None:
    """Return the mask token that a published config.json names, and its id; None if the tokenizer has no such id."""
    mask_id: Any = raw.get("mask_token_id")
    if not isinstance(mask_id, int) or isinstance(mask_id, bool) or mask_id < 0:
        return None
    mask = tokenizer.convert_ids_to_tokens(mask_id)
    return None if mask is None else (mask, mask_id)


def find_diffusion_config(folder: str | Path) -> DiffusionConfig | None:
    """Return the config in diffusion_config.json, else that of a published family, else None.

    Raises:
        ValueError: if a file is not readable, or names a mask token that the tokenizer lacks.
    """
    config = DiffusionConfig.find(folder)
    raw = raw_config(folder) if config is None else {}
    family = detect_family(raw)
    if family is None:
        return config
    tokenizer = load_tokenizer(folder)
    return family.diffusion_config(family.complete(raw, tokenizer, Path(folder)), tokenizer)


def load_tokenizer(folder: str | Path) -> Any:
    """Return the tokenizer of a folder.

    Raises:
        ValueError: if the folder has no readable tokenizer.
    """
    try:
        return without_code(AutoTokenizer.from_pretrained(folder))
    except (OSError, ValueError) as error:
        raise ValueError(
            f"{folder} has no readable tokenizer ({first_line(error)}); copy tokenizer.json and "
            "tokenizer_config.json of the published model into it, or name the model that the weights were trained "
            "from: llamafactory-ddm convert IN OUT --base"
        ) from error


def without_code(tokenizer: Any) -> Any:
    """Have a tokenizer of transformers forget the published code that its files name, which is not saved with it."""
    tokenizer.init_kwargs.pop("auto_map", None)
    return tokenizer


_TURN_ENDS = ("<|eot_id|>", "<|im_end|>")  # of LLaDA and of Dream


def with_start_and_end(config: DiffusionConfig, tokenizer: Any) -> DiffusionConfig:
    """Return `config` with the tokenizer's start and end tokens, unless it names end tokens already."""
    if config.end_tokens is not None:
        return config
    vocabulary = tokenizer.get_vocab()
    chat_template = str(getattr(tokenizer, "chat_template", None) or "")
    turn_ends = [token for token in _TURN_ENDS if token in vocabulary and token in chat_template]
    end_tokens = [str(token) for token in (tokenizer.eos_token, *turn_ends) if token is not None]
    end_tokens = list(dict.fromkeys(end_tokens))
    start = (tokenizer.bos_token or tokenizer.eos_token) if config.shift else None
    return replace(
        config,
        start_token=None if start is None else str(start),
        start_token_id=None if start is None else int(vocabulary[start]),
        end_tokens=tuple(end_tokens),
        end_token_ids=tuple(int(vocabulary[token]) for token in end_tokens),
    )


def rope_theta(config: Any) -> float:
    """Return the base of the rotary embedding, which transformers 5 keeps in rope_parameters."""
    parameters = getattr(config, "rope_parameters", None)
    return float(parameters["rope_theta"] if parameters else config.rope_theta)


def _register_auto_classes(family: type[ModelFamily]) -> None:
    """Register a config, a model and, if the family needs one, a tokenizer that load as those of `model_class`."""
    model_class = family.model_class
    config_class = model_class.config_class
    mapping = None if family.weight_names is None else family.weight_names.key_mapping()

    class PublishedConfig(config_class):  # type: ignore[misc,valid-type]
        model_type = family.name

        def to_dict(self) -> dict[str, Any]:
            return {**super().to_dict(), "model_type": config_class.model_type}  # as its other settings are

        @classmethod
        def from_dict(cls, config_dict: dict[str, Any], **kwargs: Any) -> Any:
            if config_dict.get("model_type") != family.name:
                return super().from_dict(config_dict, **kwargs)
            config = family.checked_config(config_dict)
            config.dtype = _dtype(config_dict, kwargs.get("name_or_path"))
            # to_dict() sets the plain model_type on the instance; LLaMA-Factory selects its patches by it.
            return super().from_dict(config.to_dict(), **kwargs)

    def to_plain(config: Any) -> Any:
        """Return the config as a `config_class`, with all changes that were made to it after loading."""
        if isinstance(config, PublishedConfig):
            config = copy.deepcopy(config)
            config.__class__ = config_class
        return config

    class PublishedModel(model_class):  # type: ignore[misc,valid-type]
        config_class = PublishedConfig

        @classmethod
        def from_pretrained(cls, name: Any, *args: Any, config: Any = None, **kwargs: Any) -> Any:
            config = to_plain(PublishedConfig.from_pretrained(name) if config is None else config)
            if mapping is not None:
                kwargs["key_mapping"] = mapping
            loaded = model_class.from_pretrained(name, *args, config=config, **kwargs)
            model = loaded[0] if isinstance(loaded, tuple) else loaded
            # transformers 5 saves under the published names otherwise; the entries of key_mapping come first.
            conversions = getattr(model, "_weight_conversions", None)
            if mapping is not None and conversions:
                model._weight_conversions = conversions[len(mapping) :]
            # A published generation_config.json belongs to the published code.
            model.generation_config = GenerationConfig.from_model_config(model.config)
            return loaded

        @classmethod
        def _from_config(cls, config: Any, **kwargs: Any) -> Any:
            return model_class._from_config(to_plain(config), **kwargs)

    for auto_class, title in ((PublishedConfig, "Config"), (PublishedModel, "ForCausalLM")):
        auto_class.__name__ = auto_class.__qualname__ = f"{family.title}{title}"
        globals()[auto_class.__name__] = auto_class  # where pickle looks for it
    AutoConfig.register(family.name, PublishedConfig, exist_ok=True)
    AutoModelForCausalLM.register(PublishedConfig, PublishedModel, exist_ok=True)
    tokenizer_class = family.tokenizer_class
    if tokenizer_class is None:
        return

    class PublishedTokenizer(tokenizer_class):  # type: ignore[misc,valid-type]
        @classmethod
        def from_pretrained(cls, *args: Any, **kwargs: Any) -> Any:
            return without_code(tokenizer_class.from_pretrained(*args, **kwargs))

    PublishedTokenizer.__name__ = PublishedTokenizer.__qualname__ = f"{family.title}Tokenizer"
    AutoTokenizer.register(PublishedConfig, fast_tokenizer_class=PublishedTokenizer, exist_ok=True)


def _dtype(raw: dict[str, Any], name: Any) -> Any:
    """Return the dtype of published weights: that in config.json, else that of local files; None if unknown."""
    declared = raw.get("dtype") or raw.get("torch_dtype")
    if declared is not None:
        return declared
    try:
        return stored_dtype(name)
    except (TypeError, OSError, BrokenCheckpointError):
        return None
