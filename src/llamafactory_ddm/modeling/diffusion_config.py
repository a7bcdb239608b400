"""The description of a checkpoint's diffusion process: `diffusion_config.json`, next to the weights."""

from __future__ import annotations

import json
from dataclasses import MISSING, asdict, dataclass, fields
from pathlib import Path
from typing import Any

from ..diffusion.schedules import SCHEDULES
from ..objectives import OBJECTIVES
from ..utils.files import replacing
from .prompt_template import PromptTemplate

FILE_NAME = "diffusion_config.json"
FORMAT_VERSION = 1
ATTENTIONS = ("full", "block")

_TYPES: dict[str, tuple[type, ...]] = {
    "mask_token": (str,),
    "mask_token_id": (int,),
    "shift": (bool,),
    "noise_process": (str,),
    "uniform_ratio": (float, int),
    "noise_schedule": (str,),
    "attention_ratio": (float, int),
    "attention": (str,),
    "train_block_length": (int, type(None)),
    "format_version": (int,),
    "variable_length": (dict, type(None)),
    "train_on_padding": (bool, type(None)),
    "sep_token": (str, type(None)),
    "sep_token_id": (int, type(None)),
    "start_token": (str, type(None)),
    "start_token_id": (int, type(None)),
    "end_tokens": (list, type(None)),
    "end_token_ids": (list, type(None)),
    "template": (dict, type(None)),
    "canvas": (int, type(None)),
}


@dataclass(frozen=True)
class VariableLength:
    """The variable-length format of the rows that a model was trained on.

    Attributes:
        format: `eos_pad`, `eos_eos` or `rainbow`.
        pad_tokens: spellings of the padding tokens after EOS, repeated in turn.
        pad_token_ids: their ids.
        canvas: largest number of tokens in a row.
        block: rows were padded to a multiple of this many tokens; None if to `canvas`.
        extra: largest number of blocks beyond those that a row needs; None if limited by `canvas` alone.
    """

    format: str
    pad_tokens: tuple[str, ...]
    pad_token_ids: tuple[int, ...]
    canvas: int
    block: int | None = None
    extra: int | None = None

    @classmethod
    def read(cls, path: Path, raw: dict[str, Any]) -> VariableLength:
        """Return the value of variable_length in the file at `path`.

        Raises:
            ValueError: if it is not a known format, naming the file.
        """
        try:
            result = cls(
                **{**raw, "pad_tokens": tuple(raw["pad_tokens"]), "pad_token_ids": tuple(raw["pad_token_ids"])}
            )
            is_valid = (
                result.format in ("eos_pad", "eos_eos", "rainbow")
                and len(result.pad_tokens) == len(result.pad_token_ids) > 0
                and all(isinstance(token, str) for token in result.pad_tokens)
                and all(type(number) is int and number >= 0 for number in (*result.pad_token_ids, result.canvas))
                and (result.block is None or (type(result.block) is int and result.block > 0))
                and (result.extra is None or (type(result.extra) is int and result.extra >= 0))
            )
        except (KeyError, TypeError):
            is_valid = False
        if not is_valid:
            raise ValueError(
                f"{path}: variable_length {raw!r} is not a known format; restore the file from a copy of the "
                "checkpoint, or upgrade llamafactory-ddm"
            )
        return result


@dataclass(frozen=True)
class DiffusionConfig:
    """The settings of a checkpoint that sampling, evaluation and further training need.

    Attributes:
        mask_token: spelling of [MASK] in the vocabulary.
        mask_token_id: its id.
        shift: whether logits at i predict token i + 1.
        noise_process: a name in `OBJECTIVES`.
        uniform_ratio: fraction of noised tokens that become random tokens; 0 for masked noise.
        noise_schedule: a name in `SCHEDULES`.
        attention_ratio: probability that a query saw a later key at the last training step; 1 after annealing.
        format_version: version of the file's format.
        attention: a name in `ATTENTIONS`: `full`, or `block` for a model that denoises blocks from left to right, each
            given all blocks before it.
        train_block_length: tokens in a block with `attention: block`, counted from the start of a document; else None.
        variable_length: format of the training rows; None without variable length.
        train_on_padding: whether finetuning padded rows with tokens that the model learned to generate; None before
            finetuning.
        sep_token: spelling of the token between prompt and response in DiffuLLaMA's format; None if there is none.
        sep_token_id: its id.
        start_token: spelling of the token that texts start with; None if none is needed, and in older files, where it
            is the tokenizer's.
        start_token_id: its id.
        end_tokens: spellings of the tokens that end a text, the tokenizer's EOS first; without the padding tokens of
            variable length. None in older files, where it is the tokenizer's EOS.
        end_token_ids: their ids.
        template: the prompt template of finetuning; None before finetuning.
        canvas: largest number of tokens in a row of the last training; None in older files and published models.
    """

    mask_token: str
    mask_token_id: int
    shift: bool
    noise_process: str
    uniform_ratio: float
    noise_schedule: str
    attention_ratio: float
    format_version: int = FORMAT_VERSION
    attention: str = "full"
    train_block_length: int | None = None
    variable_length: VariableLength | None = None
    train_on_padding: bool | None = None
    sep_token: str | None = None
    sep_token_id: int | None = None
    start_token: str | None = None
    start_token_id: int | None = None
    end_tokens: tuple[str, ...] | None = None
    end_token_ids: tuple[int, ...] | None = None
    template: PromptTemplate | None = None
    canvas: int | None = None

    def save(self, folder: str | Path) -> None:
        """Write the file atomically: a reader sees the old file or the complete new one."""
        with replacing(Path(folder) / FILE_NAME) as file:
            json.dump(asdict(self), file, indent=2)
            file.write("\n")

    @classmethod
    def load(cls, folder: str | Path) -> DiffusionConfig:
        """Read `diffusion_config.json` of `folder`.

        Raises:
            ValueError: if the file is not JSON, a key is missing, unknown or of the wrong type, a value is out of
                range, or the format is newer; names the file and the fault.
            FileNotFoundError: if there is no such file.
        """
        path = Path(folder) / FILE_NAME
        try:
            raw = json.loads(path.read_text(encoding="utf-8"))
        except (json.JSONDecodeError, UnicodeDecodeError, RecursionError) as error:
            raise ValueError(
                f"{path} is not valid JSON ({error}); restore it from a copy of the checkpoint"
            ) from error
        if not isinstance(raw, dict):
            raise ValueError(
                f"{path} must hold a JSON object, got {type(raw).__name__}; restore it from a copy of the checkpoint"
            )
        _check(path, raw)
        if raw.get("variable_length") is not None:
            raw["variable_length"] = VariableLength.read(path, raw["variable_length"])
        if raw.get("template") is not None:
            raw["template"] = _template(path, raw["template"])
        for key in ("end_tokens", "end_token_ids"):
            if raw.get(key) is not None:
                raw[key] = tuple(raw[key])
        return cls(**raw)

    @classmethod
    def find(cls, folder: str | Path | None) -> DiffusionConfig | None:
        """Return the config of `folder`, or None where there is no such file."""
        if folder is None or not (Path(folder) / FILE_NAME).is_file():
            return None
        return cls.load(folder)

    def check_against(self, **yaml_values: Any) -> None:
        """Compare values of the YAML with this config; None is a key that the YAML does not set.

        Raises:
            ValueError: if a value contradicts the config, naming the key and both values.
        """
        for key, value in yaml_values.items():
            stored = getattr(self, key)
            if value is not None and value != stored:
                raise ValueError(
                    f"{key}: {value} contradicts the checkpoint, which was trained with {key}: {stored}; "
                    f"remove {key} from the YAML, or start from another checkpoint"
                )


def _template(path: Path, raw: Any) -> PromptTemplate:
    try:
        return PromptTemplate.read(raw)
    except ValueError as error:
        raise ValueError(
            f"{path}: template: {error}; restore the file from a copy of the checkpoint, or upgrade llamafactory-ddm"
        ) from error


def _check_tokens(path: Path, raw: dict[str, Any]) -> None:
    """Check that spellings and ids of tokens are given together, and as many of each."""
    for name in ("sep_token", "start_token"):
        token, index = raw.get(name), raw.get(f"{name}_id")
        if (token is None) != (index is None) or (index or 0) < 0:
            raise ValueError(
                f"{path}: {name} {token!r} with {name}_id {index} is not a token; restore the file from a copy of the "
                "checkpoint"
            )
    tokens, ids = raw.get("end_tokens"), raw.get("end_token_ids")
    is_valid = (tokens is None) == (ids is None) and len(tokens or ()) == len(ids or ())
    is_valid = is_valid and all(isinstance(token, str) for token in tokens or ())
    if not is_valid or not all(type(index) is int and index >= 0 for index in ids or ()):
        raise ValueError(
            f"{path}: end_tokens {tokens!r} with end_token_ids {ids!r} are not tokens; restore the file from a copy "
            "of the checkpoint"
        )


def _check_blocks(path: Path, raw: dict[str, Any]) -> None:
    """Check that a block length is given with block attention, and only then."""
    attention, length = raw.get("attention", "full"), raw.get("train_block_length")
    if attention not in ATTENTIONS:
        raise ValueError(
            f"{path}: attention must be one of {', '.join(ATTENTIONS)}, got {attention!r}; restore the file from a "
            "copy of the checkpoint, or upgrade llamafactory-ddm"
        )
    if (attention == "block") != (length is not None) or (length is not None and length < 1):
        raise ValueError(
            f"{path}: attention: {attention} contradicts train_block_length: {length}; restore the file from a copy "
            "of the checkpoint"
        )


def _check(path: Path, raw: dict[str, Any]) -> None:
    version = raw.get("format_version", FORMAT_VERSION)
    if isinstance(version, int) and version > FORMAT_VERSION:
        raise ValueError(
            f"{path} has format_version {version}, this version reads up to {FORMAT_VERSION}; upgrade llamafactory-ddm"
        )
    if isinstance(version, int) and version < 1:
        raise ValueError(f"{path}: format_version must be at least 1, got {version!r}")
    required = {f.name for f in fields(DiffusionConfig) if f.default is MISSING}
    missing, unknown = sorted(required - raw.keys()), sorted(raw.keys() - _TYPES.keys())
    if missing or unknown:
        faults = [f"lacks {', '.join(missing)}"] if missing else []
        faults += [f"has unknown {', '.join(unknown)}"] if unknown else []
        raise ValueError(f"{path} {' and '.join(faults)}; restore it from a copy of the checkpoint")
    for key, value in raw.items():
        kinds = _TYPES[key]
        if not isinstance(value, kinds) or (isinstance(value, bool) and bool not in kinds):
            names = " or ".join(kind.__name__ for kind in kinds)
            raise ValueError(f"{path}: {key} must be {names}, got {value!r}")
    for key in ("uniform_ratio", "attention_ratio"):
        if not 0.0 <= raw[key] <= 1.0:
            raise ValueError(f"{path}: {key} must lie in [0, 1], got {raw[key]!r}")
    if raw["mask_token_id"] < 0 or not raw["mask_token"]:
        raise ValueError(
            f"{path}: mask_token {raw['mask_token']!r} with mask_token_id {raw['mask_token_id']} is not a token; "
            "restore the file from a copy of the checkpoint"
        )
    if raw.get("canvas") is not None and raw["canvas"] < 1:
        raise ValueError(
            f"{path}: canvas must be at least 1, got {raw['canvas']}; restore the file from a copy of the checkpoint"
        )
    _check_tokens(path, raw)
    _check_blocks(path, raw)
    for key, registry in (("noise_process", OBJECTIVES), ("noise_schedule", SCHEDULES)):
        if raw[key] not in registry:
            raise ValueError(f"{path}: {registry.unknown(raw[key])}, or upgrade llamafactory-ddm")
    if OBJECTIVES.get(raw["noise_process"]).default_uniform_ratio is None and raw["uniform_ratio"] != 0:
        raise ValueError(
            f"{path}: noise_process {raw['noise_process']} contradicts uniform_ratio {raw['uniform_ratio']}; restore "
            "the file from a copy of the checkpoint"
        )
