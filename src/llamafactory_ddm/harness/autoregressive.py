"""An autoregressive model, evaluated by the harness's own class under the template of the diffusion models."""

from __future__ import annotations

import logging
from collections import Counter, defaultdict, deque
from collections.abc import Callable, Mapping, Sequence
from importlib import import_module
from pathlib import Path
from typing import Any

import torch
from lm_eval.api.instance import Instance
from lm_eval.models.huggingface import HFLM
from lm_eval.models.utils import normalize_gen_kwargs
from torch import Tensor
from torch.overrides import TorchFunctionMode

from .._version import __version__
from ..diffusion.noise import Stream
from ..diffusion.rng import keyed_uniform
from ..generation.identity import model_identity
from ..modeling.prompt_template import PromptTemplate
from ..utils.result_log import ResultLog, digest
from .model import NO_TEMPLATE, document_id, noise_index

logger = logging.getLogger(__name__)
# Keys of `AR_SAMPLING_KEYS` that have another name in transformers.
_NAMES = {"logits_temp": "temperature", "topp_temp": "top_p"}
# Requests that are computed, and kept, together: this many batches.
_BATCHES = 16
# Number of the form of kept results; 2: the draws of a text do not depend on its batch.
_FORMAT = 2


def load_template(name: str, tokenizer: Any) -> tuple[PromptTemplate, tuple[str, ...]]:
    """Return LLaMA-Factory's template with this name, and the tokens that end its answers.

    Raises:
        ValueError: if there is no such template, or it needs tokens that the tokenizer lacks.
    """
    # Templates are LLaMA-Factory's; nothing else in this folder needs it.
    found: tuple[PromptTemplate, tuple[str, ...]] = import_module(
        "..integration.data.stored_template", __package__
    ).load_template(name, tokenizer)
    return found


class KeyedDraws(TorchFunctionMode):
    """Within this context `torch.multinomial` draws one token a row, with numbers keyed by row and call.

    A row's draw is the first token whose cumulative probability exceeds u; u in [0, 1) depends on the seed, the row's
    index and how often multinomial was called, so it is the same in every batch.
    """

    def __init__(self, seed: int, sample_indices: Sequence[int]) -> None:
        """Key the draws.

        Args:
            seed: of all draws.
            sample_indices: index of each row, below 2**32.
        """
        super().__init__()
        self._seed, self._indices, self._n_calls = seed % 2**64, list(sample_indices), 0

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        """Call `func`, or draw in its place."""
        if func is not torch.multinomial:
            return func(*args, **(kwargs or {}))
        probabilities = args[0].double()
        index = torch.tensor(self._indices, device=probabilities.device)
        step = torch.full_like(index, self._n_calls)
        self._n_calls += 1
        pair = keyed_uniform(self._seed, Stream.SAMPLE_TOKEN, index, 2, steps=step).double()
        u = pair[:, :1] + pair[:, 1:] * 2.0**-24
        cumulative = probabilities.cumsum(dim=1)
        return torch.searchsorted(cumulative, u * cumulative[:, -1:], right=True)


class AutoregressiveLM(HFLM):  # type: ignore[misc]
    """The harness's `hf` model type, with prompts in LLaMA-Factory's template and results that are kept.

    `HFLM` computes likelihoods and texts. Prompts do not go through the tokenizer's chat template, so that they are
    the same text as those of a diffusion model with this template, and the answer is scored from its first token. The
    draws of a text depend on the seed, its document and its number among the document's texts.
    """

    def __init__(
        self,
        pretrained: str,
        *,
        adapter: str | None = None,
        dtype: str = "auto",
        batch_size: int = 16,
        max_new_tokens: int | None = None,
        template: str | None = None,
        results_folder: str | None = None,
        **sampling: Any,
    ) -> None:
        """Load a model.

        Args:
            pretrained: folder or Hub name of a causal language model.
            adapter: folder of a LoRA adapter, or None.
            dtype: of the weights; auto is float32 on a CPU, else the type that they are stored in.
            batch_size: rows in a forward pass.
            max_new_tokens: tokens to generate; by default what the task says, else 256.
            template: name of LLaMA-Factory's template that prompts are put into; None for no template.
            results_folder: where finished requests are kept, so that an interrupted evaluation goes on.
            sampling: keys of generation, those of `AR_SAMPLING_KEYS`; they take precedence over those of a task.
        Raises:
            ValueError: if there is no such template.
            OSError: if the model or the folder of results cannot be opened.
        """
        log = ResultLog(None if results_folder is None else Path(results_folder))
        device = "cuda" if torch.cuda.is_available() else "cpu"
        super().__init__(
            pretrained=pretrained,
            peft=adapter,
            device=device,
            dtype="float32" if dtype == "auto" and device == "cpu" else dtype,
            batch_size=batch_size,
        )
        self._path, self._adapter, self._has_warned = pretrained, adapter, False
        self._max_new_tokens, self._sampling = max_new_tokens, sampling
        self._prompt_template: PromptTemplate | None = None
        self._stops: tuple[str, ...] = ()
        if template is not None:
            self._prompt_template, self._stops = load_template(template, self.tokenizer)
        # Of each prompt of a part, in their order, what keys the draws of its texts.
        self._noise: defaultdict[str, deque[int]] = defaultdict(deque)
        self._batch_noise: list[int] = []
        self._log = log
        log.read_earlier(self._result_settings())

    def loglikelihood(self, requests: list[Instance], disable_tqdm: bool = False) -> list[tuple[float, bool]]:
        """Return the log-likelihood of each continuation in nats, and whether greedy decoding generates it."""

        self._warn_of_template()

        def compute(part: list[Instance], keys: Sequence[str]) -> list[list[Any]]:
            found = super(AutoregressiveLM, self).loglikelihood(part, disable_tqdm)
            return [[round(float(value), 4), bool(is_greedy)] for value, is_greedy in found]

        return [(value, is_greedy) for value, is_greedy in self._finish("likelihood", requests, self._framed, compute)]

    def loglikelihood_rolling(self, requests: list[Instance], disable_tqdm: bool = False) -> list[float]:
        """Return the log-likelihood of each whole text in nats, without the template."""

        def compute(part: list[Instance], keys: Sequence[str]) -> list[float]:
            found = super(AutoregressiveLM, self).loglikelihood_rolling(part, disable_tqdm)
            return [round(float(value), 4) for value in found]

        return self._finish("rolling", requests, lambda request: request.args, compute)

    def generate_until(self, requests: list[Instance], disable_tqdm: bool = False) -> list[str]:
        """Return the text that follows each context, up to the first of its `until`."""

        self._warn_of_template()

        def compute(part: list[Instance], keys: Sequence[str]) -> list[str]:
            self._noise.clear()
            for request, key in zip(part, keys, strict=True):
                self._noise[request.args[0]].append(noise_index(key))
            found: list[str] = super(AutoregressiveLM, self).generate_until(part, disable_tqdm)
            return found

        return self._finish("generate", requests, self._framed_prompt, compute)

    def get_model_info(self) -> dict[str, Any]:
        """Return what is needed to repeat the results."""
        nothing: dict[str, Any] = {}
        return {
            **super().get_model_info(),
            "model_settings": self._result_settings(),
            "forward_passes": nothing,
            "generated_tokens": nothing,
            "likelihood_standard_error": nothing,
        }

    def tok_batch_encode(self, strings: Sequence[str], *args: Any, **options: Any) -> tuple[Tensor, Tensor]:
        """Return ids and attention mask of prompts, [batch, length] each, and note what keys their draws."""
        self._batch_noise = [self._noise[text].popleft() for text in strings if self._noise[text]]
        encoded: tuple[Tensor, Tensor] = super().tok_batch_encode(list(strings), *args, **options)
        return encoded

    def _model_generate(self, context: Tensor, *args: Any, **options: Any) -> Tensor:
        """Return prompts with their continuations, [batch, length]; sampled tokens are drawn with keyed numbers."""
        with KeyedDraws(int(self._sampling.get("seed", 0)), self._batch_noise):
            ids: Tensor = super()._model_generate(context, *args, **options)
        return ids

    def _warn_of_template(self) -> None:
        """Warn once of a model with a chat template whose prompts come without a template."""
        if self._prompt_template is None and self.tokenizer.chat_template and not self._has_warned:
            self._has_warned = True
            logger.warning(NO_TEMPLATE, self._adapter or self._path)

    def _encode_pair(self, context: str, continuation: str) -> tuple[list[int], list[int]]:
        """Return the ids of context and continuation; under a template each is tokenised alone, as in training."""
        if self._prompt_template is None:
            pair: tuple[list[int], list[int]] = super()._encode_pair(context, continuation)
            return pair
        return self.tok_encode(context), self.tok_encode(continuation, add_special_tokens=False)

    def _in_template(self, prompt: str) -> str:
        if self._prompt_template is None:
            return prompt
        parts = self._prompt_template.parts
        return "".join(prompt.join(part.text) if part.token is None else part.token for part in parts)

    def _framed(self, request: Instance) -> tuple[Any, ...]:
        context, continuation = request.args
        is_bare = self._prompt_template is None
        return self._in_template(context), continuation if is_bare else continuation.lstrip()

    def _framed_prompt(self, request: Instance) -> tuple[Any, ...]:
        """Return prompt and options of a request; the user's own keys take precedence over the task's.

        Raises:
            ValueError: if the tokens to generate are too many for the model.
        """
        context, options = request.args
        options = dict(normalize_gen_kwargs(options, self.max_gen_toks))
        if self._max_new_tokens is not None:
            options["max_gen_toks"] = self._max_new_tokens
        if options["max_gen_toks"] >= self.max_length:
            raise ValueError(
                f"task: {request.task_name}, document {request.doc_id}: {options['max_gen_toks']} tokens and a prompt "
                f"do not fit the model's {self.max_length} positions; lower max_new_tokens"
            )
        options["until"] = [*(stop for stop in options["until"] if stop), *self._stops]
        for name, value in self._sampling.items():
            if name != "seed":
                options[_NAMES.get(name, name)] = value
        if "logits_temp" in self._sampling:
            options["do_sample"] = options["temperature"] > 0
        if not options["do_sample"]:  # what the distribution is drawn from has no effect, and transformers warns of it
            options = {name: value for name, value in options.items() if name not in ("top_p", "top_k")}
        return self._in_template(context), options

    def _finish(
        self,
        kind: str,
        requests: Sequence[Instance],
        framed: Callable[[Instance], tuple[Any, ...]],
        compute: Callable[[list[Instance], Sequence[str]], list[Any]],
    ) -> list[Any]:
        """Return the results of requests; those of an earlier run are read, the others computed and kept.

        Requests are computed in parts that depend on the list alone, so that an interruption changes no batch.
        """
        seen: Counter[str] = Counter()
        keys, wanted = [], []
        for request in requests:
            arguments = framed(request)
            key = digest([kind, document_id(request), list(arguments)])
            keys.append(f"{key}-{seen[key]}")
            seen[key] += 1
            wanted.append(
                Instance(request.request_type, request.doc, arguments, request.idx, request.metadata)
                if arguments is not request.args
                else request
            )
        size = _BATCHES * int(self.batch_size)
        for low in range(0, len(keys), size):
            part = keys[low : low + size]
            if any(key not in self._log.results for key in part):
                for key, result in zip(part, compute(wanted[low : low + size], part), strict=True):
                    if key not in self._log.results:
                        self._log.add(key, result)
        return [self._log.results[key] for key in keys]

    def _result_settings(self) -> Mapping[str, Any]:
        """Return the settings that kept results must agree with."""
        return {
            "pretrained": self._path,
            "adapter": self._adapter,
            **model_identity(self.model, self.tokenizer),
            "version": __version__,
            "format": _FORMAT,
            "template": None if self._prompt_template is None else self._prompt_template.name,
            "max_new_tokens": self._max_new_tokens,
            "sampling": self._sampling,
        }
