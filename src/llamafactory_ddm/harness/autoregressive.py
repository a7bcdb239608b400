"""An autoregressive model, evaluated by the harness's own class under the template of the diffusion models."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from importlib import import_module
from pathlib import Path
from typing import Any

import torch
from lm_eval.api.instance import Instance
from lm_eval.models.huggingface import HFLM
from lm_eval.models.utils import normalize_gen_kwargs

from .._version import __version__
from ..generation.identity import model_identity
from ..modeling.prompt_template import PromptTemplate
from ..utils.result_log import ResultLog, digest
from .model import document_id

# Keys of `AR_SAMPLING_KEYS` that have another name in transformers.
_NAMES = {"logits_temp": "temperature", "topp_temp": "top_p"}
# Requests that are computed, and kept, together: this many batches.
_BATCHES = 16


class AutoregressiveLM(HFLM):  # type: ignore[misc]
    """The harness's `hf` model type, with prompts in LLaMA-Factory's template and results that are kept.

    `HFLM` computes likelihoods and texts. Prompts do not go through the tokenizer's chat template, so that they are
    the same text as those of a diffusion model with this template, and the answer is scored from its first token.
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
        self._path, self._adapter = pretrained, adapter
        self._max_new_tokens, self._sampling = max_new_tokens, sampling
        self._prompt_template: PromptTemplate | None = None
        self._stops: tuple[str, ...] = ()
        if template is not None:
            # Templates are LLaMA-Factory's; nothing else in this folder needs it.
            load_template = import_module("..integration.data.stored_template", __package__).load_template
            self._prompt_template, self._stops = load_template(template, self.tokenizer)
        self._log = log
        log.read_earlier(self._result_settings())

    def loglikelihood(self, requests: list[Instance], disable_tqdm: bool = False) -> list[tuple[float, bool]]:
        """Return the log-likelihood of each continuation in nats, and whether greedy decoding generates it."""

        def compute(part: list[Instance]) -> list[list[Any]]:
            found = super(AutoregressiveLM, self).loglikelihood(part, disable_tqdm)
            return [[round(float(value), 4), bool(is_greedy)] for value, is_greedy in found]

        return [(value, is_greedy) for value, is_greedy in self._finish("likelihood", requests, self._framed, compute)]

    def loglikelihood_rolling(self, requests: list[Instance], disable_tqdm: bool = False) -> list[float]:
        """Return the log-likelihood of each whole text in nats, without the template."""

        def compute(part: list[Instance]) -> list[float]:
            found = super(AutoregressiveLM, self).loglikelihood_rolling(part, disable_tqdm)
            return [round(float(value), 4) for value in found]

        return self._finish("rolling", requests, lambda request: request.args, compute)

    def generate_until(self, requests: list[Instance], disable_tqdm: bool = False) -> list[str]:
        """Return the text that follows each context, up to the first of its `until`."""

        def compute(part: list[Instance]) -> list[str]:
            torch.manual_seed(int(digest([self._sampling.get("seed", 0), *map(document_id, part)])[:8], 16))
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
        """Return prompt and options of a request; the user's own keys take precedence over the task's."""
        context, options = request.args
        options = dict(normalize_gen_kwargs(options, self.max_gen_toks))
        if self._max_new_tokens is not None:
            options["max_gen_toks"] = self._max_new_tokens
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
        compute: Callable[[list[Instance]], list[Any]],
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
                for key, result in zip(part, compute(wanted[low : low + size]), strict=True):
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
            "template": None if self._prompt_template is None else self._prompt_template.name,
            "max_new_tokens": self._max_new_tokens,
            "sampling": self._sampling,
        }
