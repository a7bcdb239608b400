"""The YAML keys of generation: the fields of `SamplingSettings`, and what generation starts from."""

from __future__ import annotations

from dataclasses import dataclass, field, make_dataclass
from typing import Any

from ...modeling.special_tokens import escape_hint
from ...sampling import SamplingSettings
from ...sampling.keywords import ALIASES, with_keywords
from ...sampling.settings import KEYS
from ...sampling.state import MAX_SAMPLES
from ...utils.keys import Key, key

# Upstream's keys of generation that are used -> our key of the same meaning, or None.
UPSTREAM_KEYS: dict[str, str | None] = {
    **{alias: name for alias, name in ALIASES.items() if alias in ("temperature", "top_p")},
    **dict.fromkeys(("top_k", "repetition_penalty", "max_new_tokens")),
}
SETTINGS_KEYS = {name: spec for name, spec in KEYS.items() if not spec.is_upstream}
_TYPES = {"integer": int, "number": float, "boolean": bool}


def _yaml_field(name: str, spec: Key) -> tuple[str, Any, Any]:
    """Return the field of a key with the one type that upstream's parser allows; a YAML may give another."""
    hint = _TYPES.get(spec.kind, str)
    return name, hint if spec.default is not None else hint | None, field(default=spec.default, metadata={"key": spec})


SettingsKeys: Any = make_dataclass("SettingsKeys", [_yaml_field(name, spec) for name, spec in SETTINGS_KEYS.items()])
SettingsKeys.__module__ = __name__


@dataclass
class SamplingArguments(SettingsKeys):
    """Keys of `do_predict: true`."""

    generate_from: str | None = key(
        None,
        "What generation starts from: noise (num_samples fully masked texts), prefix (continues each text of the data "
        "set), infill (fills markers such as <|infill:8|> in each text) or prompt (answers each prompt). Defaults to "
        "prompt with stage: ddm-sft, which allows nothing else, and to noise with stage: ddm.",
        choices=("noise", "prefix", "infill", "prompt"),
    )
    num_samples: int = key(8, "With generate_from: noise, number of texts.", low=1, high=MAX_SAMPLES)
    prefix_length: int | None = key(
        None,
        "With generate_from: prefix, number of tokens of each text to continue from; the rest is the label. Defaults "
        "to the whole text.",
        kind="integer",
        low=1,
    )
    save_trace: bool = key(False, "Write generated_predictions.html, a page that replays the denoising of each text.")

    def check_sampling(self) -> None:
        """Check the keys that depend on each other.

        Raises:
            ValueError: naming both keys.
        """
        changed = self._changed_settings()
        changed.pop("suppress_tokens", None)
        with_keywords(SamplingSettings(), changed)
        stage, source = str(getattr(self, "stage", "ddm")), self.generation_source()
        if (source == "prompt") != (stage == "ddm-sft"):
            allowed = "prompt" if stage == "ddm-sft" else "noise, prefix or infill"
            raise ValueError(
                f"generate_from: {source} does not work with stage: {stage}; set generate_from: {allowed}"
            )
        if self.prefix_length is not None and source != "prefix":
            raise ValueError(
                f"prefix_length: {self.prefix_length} is read by generate_from: prefix only, but generate_from is "
                f"{source}; set generate_from: prefix, or remove prefix_length"
            )
        if self.guidance_scale != 1.0 and source == "noise":
            raise ValueError(
                f"guidance_scale: {self.guidance_scale} needs a prompt, but generate_from is noise; set "
                "generate_from: prefix or infill, or remove guidance_scale"
            )

    def _changed_settings(self) -> dict[str, Any]:
        """Return the keys of `SamplingSettings` that differ from their defaults."""
        return {name: value for name, spec in SETTINGS_KEYS.items() if (value := getattr(self, name)) != spec.default}

    def generation_source(self) -> str:
        """Return `generate_from`, or the default of the stage."""
        stage = getattr(self, "diffusion_stage", None) or getattr(self, "stage", "ddm")
        return self.generate_from or ("prompt" if stage == "ddm-sft" else "noise")

    def sampling_settings(
        self, generating_args: Any, user_keys: frozenset[str], *, seed: int, tokenizer: Any
    ) -> SamplingSettings:
        """Return the settings of the sampler.

        Args:
            generating_args: upstream's, of which only the keys in `user_keys` are used.
            user_keys: keys that the user wrote.
            seed: the run's seed.
            tokenizer: gives the ids of suppress_tokens.
        Raises:
            ValueError: if two keys of the same meaning differ, or a token does not exist.
        """
        values = {**self._changed_settings(), "seed": seed}
        if self.suppress_tokens is not None:
            values["suppress_tokens"] = self.suppressed_ids(tokenizer)
        for upstream_key, our_key in UPSTREAM_KEYS.items():
            if upstream_key == "max_new_tokens" or upstream_key not in user_keys:
                continue
            value = getattr(generating_args, upstream_key)
            if our_key in user_keys and value != getattr(self, our_key):
                raise ValueError(
                    f"{upstream_key}: {value} and {our_key}: {getattr(self, our_key)} set the same thing to different "
                    "values; remove one of them"
                )
            values.pop(our_key or upstream_key, None)
            values[upstream_key] = value
        return with_keywords(SamplingSettings(), values)

    def suppressed_ids(self, tokenizer: Any) -> tuple[int, ...]:
        """Return the ids of `suppress_tokens`.

        Raises:
            ValueError: if one is not in the vocabulary.
        """
        return () if self.suppress_tokens is None else _token_ids(self.suppress_tokens, tokenizer)


def _token_ids(tokens: str, tokenizer: Any) -> tuple[int, ...]:
    """Return the ids of tokens or ids that are separated by commas.

    Raises:
        ValueError: naming the first that is neither.
    """
    vocabulary = tokenizer.get_vocab()
    ids = []
    for token in (part.strip() for part in str(tokens).split(",")):
        if token in vocabulary:
            ids.append(vocabulary[token])
        elif token.isdigit() and int(token) < len(tokenizer):
            ids.append(int(token))
        else:
            raise ValueError(
                f"suppress_tokens: {token!r} is neither a token of the vocabulary nor an id"
                f"{escape_hint('suppress_tokens', token)}"
            )
    return tuple(ids)
