"""Autoregressive models, with which diffusion models are compared: loading, and sampling with a KV cache."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from ..checkpoints.adapters import ADAPTER_CONFIG, base_of
from ..checkpoints.kind import check_kind
from ..checkpoints.load_model import load_whole, load_whole_adapter
from ..checkpoints.weights import first_line
from ..diffusion.noise import Stream
from ..diffusion.rng import keyed_uniform
from ..modeling.special_tokens import resolve_tokens
from ..sampling.keywords import with_keywords
from ..sampling.logits import LogitsConfig, penalise_repetition
from ..sampling.settings import SamplingSettings
from ..sampling.state import TRIES
from ..sampling.tokens import draw_tokens
from ..utils.devices import check_float64


@dataclass(frozen=True)
class Continuation:
    """A text of an autoregressive model.

    Attributes:
        text: the text up to EOS, without special tokens.
        n_tokens: number of its tokens.
        num_forward_passes: forward passes that it took, one a token; EOS takes one too.
    """

    text: str
    n_tokens: int
    num_forward_passes: int


class AutoregressiveModel:
    """A causal language model with its tokenizer."""

    def __init__(self, model: Any, tokenizer: Any) -> None:
        """Wrap a model.

        Raises:
            ValueError: if the tokenizer has no token to start with.
        """
        self.model, self.tokenizer = model.eval(), tokenizer
        start = tokenizer.bos_token_id if tokenizer.bos_token_id is not None else tokenizer.eos_token_id
        if start is None:
            raise ValueError("the tokenizer has neither a bos nor an eos token to start a text with; add one to it")
        self.start_id = int(start)
        self.eos_ids = () if tokenizer.eos_token_id is None else (int(tokenizer.eos_token_id),)
        self.n_ids = max(tokenizer.get_vocab().values()) + 1  # the model may have more embeddings
        self._special = {*tokenizer.all_special_ids, *self.eos_ids}

    def settings(self, keywords: Mapping[str, Any]) -> SamplingSettings:
        """Return settings of generation from YAML keys.

        Raises:
            ValueError: if a value is not allowed, or a token to suppress does not exist.
        """
        given = dict(keywords)
        if "suppress_tokens" in given:
            given["suppress_tokens"] = resolve_tokens(self.tokenizer, "suppress_tokens", given["suppress_tokens"])
        return with_keywords(SamplingSettings(), given)

    @torch.inference_mode()
    def sample(
        self, n_tokens: int, config: LogitsConfig, *, seed: int, sample_indices: Sequence[int]
    ) -> list[Continuation]:
        """Sample texts from the start token, all in one batch.

        The random numbers of a text depend on the seed and its index alone.

        Args:
            n_tokens: largest number of tokens of a text.
            config: temperature, filters and penalties.
            seed: of every draw.
            sample_indices: index of each text.
        Raises:
            ValueError: if logits are NaN or infinite or allow no token, or if the model has no KV cache.
        """
        device = self.model.device
        index = torch.tensor(sample_indices, dtype=torch.int64, device=device)
        ids = torch.empty(len(index), 0, dtype=torch.int64, device=device)
        inputs, cache = torch.full((len(index), 1), self.start_id, device=device), None
        eos = torch.tensor(self.eos_ids, dtype=torch.int64, device=device)
        has_ended = torch.zeros(len(index), dtype=torch.bool, device=device)
        tries = TRIES if config.top_p < 1.0 and config.top_k is None else 1
        for step in range(n_tokens):
            past: dict[str, Any] = {} if cache is None else {"past_key_values": cache}
            output = self.model(input_ids=inputs, use_cache=True, **past)
            cache, logits = getattr(output, "past_key_values", None), output.logits[:, -1, : self.n_ids]
            if config.repetition_penalty != 1.0:
                logits = penalise_repetition(logits, ids, config.repetition_penalty)
            if config.eos_penalty and len(eos):
                penalty = torch.full((len(ids), len(eos)), -config.eos_penalty, device=device)
                logits = logits.float().index_add(1, eos, penalty)
            pair = keyed_uniform(
                seed % 2**64, Stream.SAMPLE_TOKEN, index, 2 * tries, steps=torch.full_like(index, step)
            ).double()
            draws = draw_tokens(logits, config, pair[:, 0::2] + pair[:, 1::2] * 2.0**-24)
            if bool(draws.bad.any()):
                raise ValueError("the model's logits are NaN or infinite, or suppress_tokens leaves no token")
            ids = torch.cat([ids, draws.ids[:, None]], dim=1)
            has_ended |= torch.isin(draws.ids, eos)
            if bool(has_ended.all()):
                break
            if cache is None:
                raise ValueError(f"{type(self.model).__name__} has no KV cache; such a model is not supported")
            inputs = draws.ids[:, None]
        return [self._continuation(row) for row in ids.tolist()]

    def _continuation(self, ids: Sequence[int]) -> Continuation:
        ends = [at for at, token in enumerate(ids) if token in self.eos_ids]
        kept = list(ids[: ends[0]] if ends else ids)
        text = self.tokenizer.decode([token for token in kept if token not in self._special])
        return Continuation(text, len(kept), len(kept) + bool(ends))


def load_autoregressive(path: str, *, device: str | None = None, dtype: Any = None) -> AutoregressiveModel:
    """Load an autoregressive model, or a LoRA adapter with its model.

    Args:
        path: a folder or Hub name.
        device: by default the first GPU if there is one, else the CPU.
        dtype: of the weights; by default float32 on a CPU, else the one that they are stored in.
    Raises:
        ValueError: if there is no such model, it has no tokenizer, or its attention is bidirectional.
    """
    check_kind(path, "ar")
    place = torch.device(device if device is not None else "cuda" if torch.cuda.is_available() else "cpu")
    check_float64(place, "generation")
    dtype = dtype if dtype is not None else torch.float32 if place.type == "cpu" else "auto"
    is_adapter = (Path(path) / ADAPTER_CONFIG).is_file()
    base = base_of(path) if is_adapter else path
    try:
        tokenizer = AutoTokenizer.from_pretrained(path)
        model = load_whole(AutoModelForCausalLM, pretrained_model_name_or_path=base, dtype=dtype)
        if is_adapter:
            from peft import PeftModel

            model = load_whole_adapter(PeftModel, model, path).merge_and_unload()
    except (OSError, ValueError) as error:
        raise ValueError(f"{path} cannot be loaded: {first_line(error)}") from error
    if not tokenizer.encode("a", add_special_tokens=False):
        raise ValueError(f"{path} holds no tokenizer; save the model's tokenizer there")
    model.to(place)
    model.config.pad_token_id = None  # without padding no warning of it is wanted
    _check_causal(model.eval(), path)
    return AutoregressiveModel(model, tokenizer)


@torch.inference_mode()
def _check_causal(model: Any, path: str) -> None:
    """Check with a forward pass that the first logits do not depend on the second token.

    Raises:
        ValueError: if they do.
    """
    ids = torch.tensor([[0, 0], [0, 1]], device=model.device)
    first, other = model(input_ids=ids, attention_mask=torch.ones_like(ids)).logits[:, 0].float()
    tolerance = 10 * torch.finfo(model.dtype).eps * float(first.abs().max())
    if not torch.allclose(first, other, rtol=0.0, atol=tolerance, equal_nan=True):
        raise ValueError(
            f"{path} is no autoregressive model: its attention is bidirectional; name an autoregressive one"
        )
