"""The YAML keys of generation: those of `SamplingSettings`, and what is generated from what."""

from __future__ import annotations

from dataclasses import dataclass, field, make_dataclass
from typing import Any

from ...modeling.special_tokens import escape_hint
from ...sampling import SamplingSettings
from ...sampling.keywords import ALIASES, with_keywords
from ...sampling.settings import KEYS
from ...sampling.state import MAX_SAMPLES
from ...utils.keys import Key, key

# Upstream's keys of generation that are honoured -> ours of the same meaning, or None.
UPSTREAM_KEYS: dict[str, str | None] = {
    **{theirs: ours for theirs, ours in ALIASES.items() if theirs in ("temperature", "top_p")},
    **dict.fromkeys(("top_k", "repetition_penalty", "max_new_tokens")),
}
_OURS = {name: one for name, one in KEYS.items() if not one.is_upstream}
_TYPES = {"integer": int, "number": float, "boolean": bool}


def _yaml_field(name: str, one: Key) -> tuple[str, Any, Any]:
    """Return the field of a key for upstream's parser, which takes one type; YAML may hold another."""
    kind = _TYPES.get(one.kind, str)
    return name, kind if one.default is not None else kind | None, field(default=one.default, metadata={"key": one})


SettingsKeys: Any = make_dataclass("SettingsKeys", [_yaml_field(name, one) for name, one in _OURS.items()])
SettingsKeys.__module__ = __name__


@dataclass
class SamplingArguments(SettingsKeys):
    """Arguments of `do_predict: true`."""

    generate_from: str | None = key(
        None,
        "What generation starts from: noise (num_samples texts), prefix (each text of the data set is continued), "
        "infill (markers such as <|infill:8|> in the texts are filled) or prompt. Defaults to prompt with stage: "
        "ddm-sft, which takes nothing else, and to noise with stage: ddm.",
        choices=("noise", "prefix", "infill", "prompt"),
    )
    num_samples: int = key(8, "Texts that are generated from noise.", low=1, high=MAX_SAMPLES)
    prefix_length: int | None = key(
        None,
        "With generate_from: prefix, tokens of a text that are given; the rest is the label. Defaults to the whole "
        "text.",
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
            raise ValueError(
                f"generate_from: {source} does not go with stage: {stage}; stage: ddm-sft answers prompts, stage: ddm "
                "takes noise, prefix or infill"
            )
        if self.prefix_length is not None and source != "prefix":
            raise ValueError("prefix_length needs generate_from: prefix; set it or remove prefix_length")
        if self.guidance_scale != 1.0 and source == "noise":
            raise ValueError(
                f"guidance_scale: {self.guidance_scale} needs a prompt to guide by, but generate_from is noise; set "
                "generate_from: prefix or infill, or remove guidance_scale"
            )

    def _changed_settings(self) -> dict[str, Any]:
        """Return the keys of `SamplingSettings` that differ from their defaults."""
        return {name: value for name, one in _OURS.items() if (value := getattr(self, name)) != one.default}

    def generation_source(self) -> str:
        """Return `generate_from`, or what the stage starts from where it is not set."""
        ours = getattr(self, "diffusion_stage", None) or getattr(self, "stage", "ddm")
        return self.generate_from or ("prompt" if ours == "ddm-sft" else "noise")

    def sampling_settings(
        self, generating_args: Any, user_keys: frozenset[str], *, seed: int, tokenizer: Any
    ) -> SamplingSettings:
        """Return what the sampler wants.

        Args:
            generating_args: upstream's, of which the keys in `user_keys` count.
            user_keys: keys that the user wrote.
            seed: of the run.
            tokenizer: finds suppress_tokens.
        Raises:
            ValueError: if two keys of the same meaning differ, or a token does not exist.
        """
        values = {**self._changed_settings(), "seed": seed}
        if self.suppress_tokens is not None:
            values["suppress_tokens"] = _token_ids(self.suppress_tokens, tokenizer)
        for theirs, ours in UPSTREAM_KEYS.items():
            if theirs == "max_new_tokens" or theirs not in user_keys:
                continue
            value = getattr(generating_args, theirs)
            if ours in user_keys and value != getattr(self, ours):
                raise ValueError(
                    f"{theirs}: {value} and {ours}: {getattr(self, ours)} mean the same and differ; remove one of them"
                )
            values.pop(ours or theirs, None)
            values[theirs] = value
        return with_keywords(SamplingSettings(), values)


def _token_ids(words: str | None, tokenizer: Any) -> tuple[int, ...]:
    """Return the ids of the tokens in a list separated by commas.

    Raises:
        ValueError: naming what is no token.
    """
    if words is None:
        return ()
    vocabulary = tokenizer.get_vocab()
    ids = []
    for word in (part.strip() for part in str(words).split(",")):
        if word in vocabulary:
            ids.append(vocabulary[word])
        elif word.isdigit() and int(word) < len(tokenizer):
            ids.append(int(word))
        else:
            raise ValueError(
                f"suppress_tokens: {word!r} is neither a token of the vocabulary nor an id"
                f"{escape_hint('suppress_tokens', word)}"
            )
    return tuple(ids)
