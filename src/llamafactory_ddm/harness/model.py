"""`llamafactory_ddm`, the model type of lm-evaluation-harness: any diffusion model that `load` loads."""

from __future__ import annotations

import logging
import os
from collections import Counter, defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from lm_eval.api.instance import Instance
from lm_eval.api.model import LM
from lm_eval.utils import get_rolling_token_windows, make_disjoint_window
from tqdm import tqdm

from ..data.canvas import Canvas
from ..generation.generator import Generated, TextGenerator
from ..generation.load import load
from ..modeling.model_info import max_positions
from ..sampling import SamplingSettings
from ..sampling.keywords import ALIASES
from ..sampling.settings import KEYS
from ..utils.registry import did_you_mean, unknown_choice
from .result_log import ResultLog, digest
from .scoring import SAMPLES, Answer, AnswerScorer, Scoring

logger = logging.getLogger(__name__)
_MAX_NEW_TOKENS = 256
# Finished requests are written to disk after so many.
_REQUESTS_AT_ONCE = 512
_TASK_KEYS = ("temperature", "top_p", "top_k", "repetition_penalty")


class DiffusionLM(LM):  # type: ignore[misc]
    """Likelihoods and texts of a diffusion model, for lm-evaluation-harness.

    A result depends on the model, the settings and the request alone: its noise is keyed by task and document, not by
    batch, order or rank.
    """

    def __init__(
        self,
        pretrained: str,
        *,
        device: str | None = None,
        dtype: str | None = None,
        batch_size: int | str = 16,
        max_batch_size: int | None = None,
        scoring: Scoring = "bound",
        likelihood_samples: int | None = None,
        max_new_tokens: int | None = None,
        template: str | None = None,
        plugins: str | None = None,
        results_folder: str | None = None,
        **sampling: Any,
    ) -> None:
        """Load a model.

        Args:
            pretrained: folder or Hub name of a diffusion model, or folder of an adapter.
            device: see `load`; a GPU that does not exist is replaced by the CPU.
            dtype: of the weights; see `load`.
            batch_size: rows in a forward pass. It does not change results.
            max_batch_size: not used.
            scoring: how answers are scored; see `AnswerScorer`.
            likelihood_samples: masks of an answer, at least 8; see `AnswerScorer`.
            max_new_tokens: tokens to generate; by default what the task says (max_gen_toks), else 256.
            template: name of the template that prompts are put into, as a single user's turn; None for no template.
            plugins: see `load`.
            results_folder: where finished requests are kept, so that an interrupted evaluation goes on.
            sampling: keys of generation, by YAML key; they count before those of a task.
        Raises:
            TypeError: for an unknown key.
            ValueError: if a value is not allowed, or the model cannot be loaded.
        """
        super().__init__()
        if not str(batch_size).isdigit() or int(batch_size) < 1:
            raise ValueError(f"batch_size: {batch_size} must be an integer from 1")
        if scoring not in SAMPLES:
            raise ValueError(unknown_choice("scoring", scoring, SAMPLES))
        if likelihood_samples is not None and likelihood_samples < 8:
            raise ValueError(f"likelihood_samples: {likelihood_samples} must be at least 8, to state an error")
        if device is not None and str(device).startswith("cuda") and not torch.cuda.is_available():
            logger.warning("device: %s is not available; the CPU is used", device)
            device = "cpu"
        _join_processes()
        self.generator: TextGenerator = load(
            pretrained, device=device, dtype=dtype and getattr(torch, str(dtype), dtype), template=template,
            plugins=plugins,
        )  # fmt: skip
        self.batch_size = int(batch_size)
        self.max_new_tokens = max_new_tokens
        self.sampling = dict(sampling)
        self.settings = self.generator.settings(SamplingSettings(), **sampling)
        self.scorer = AnswerScorer(
            self.generator, scoring=scoring, samples=likelihood_samples, batch_size=self.batch_size
        )
        self.path = pretrained
        self._template = None if template is None else self.generator.config.template
        self._template_applied = self._template is not None
        self._results_folder = Path(results_folder) if results_folder else None
        self._log: ResultLog | None = None
        self._counted: set[str] = set()
        self._passes: Counter[str] = Counter()
        self._squared_errors: Counter[str] = Counter()
        self._n_requests: Counter[str] = Counter()
        self._totals: tuple[Counter[str], ...] = ()

    # What the harness asks for, beside results.

    @property
    def device(self) -> torch.device:
        """Return the model's device."""
        return torch.device(self.generator.model.device)

    @property
    def rank(self) -> int:
        """Return the number of this process."""
        return torch.distributed.get_rank() if _is_distributed() else 0

    @property
    def world_size(self) -> int:
        """Return the number of processes."""
        return torch.distributed.get_world_size() if _is_distributed() else 1

    def all_gather(self, tensor: torch.Tensor) -> torch.Tensor:
        """Return the tensors of all processes, concatenated."""
        return torch.cat([each.reshape(-1) for each in _gathered(tensor.cpu())])

    def gather_object(self, obj: Any, dst: int = 0) -> list[Any] | None:
        """Return the objects of all processes on process `dst`, None on the others.

        The harness deals documents out in turn and joins the lists that it gathers. They are returned in the
        documents' order, so that what depends on it, such as a bootstrapped error, is that of one process.
        """
        everything = _gathered(obj)
        return _in_turn(everything) if self.rank == dst else None

    def barrier(self) -> None:
        """Wait for all processes, and add up what they counted."""
        parts = _gathered((self._passes, self._squared_errors, self._n_requests))
        self._totals = tuple(Counter() for _ in parts[0])
        for part in parts:
            for total, count in zip(self._totals, part, strict=True):
                total.update(count)

    @property
    def tokenizer_name(self) -> str:
        """Return the name by which the harness keeps requests."""
        return str(self.path).replace("/", "__")

    def chat_template(self, chat_template: bool | str = False) -> str:
        """Return the chat template, for the harness's record.

        Raises:
            ValueError: if the model has none.
        """
        if not chat_template:
            return ""
        text = getattr(self.generator.tokenizer, "chat_template", None)
        if not text:
            raise ValueError(f"{self.path} has no chat template; drop --apply_chat_template")
        return str(text)

    def apply_chat_template(self, chat_history: list[dict[str, str]], add_generation_prompt: bool = True) -> str:
        """Return a conversation under the model's chat template."""
        self._template_applied = True
        text: str = self.generator.tokenizer.apply_chat_template(
            chat_history,
            tokenize=False,
            add_generation_prompt=add_generation_prompt,
            continue_final_message=not add_generation_prompt,
        )
        return text

    def get_model_info(self) -> dict[str, Any]:
        """Return what is needed to repeat the results, with forward passes and standard errors by task."""
        self._totals = self._totals if _is_distributed() else (self._passes, self._squared_errors, self._n_requests)
        passes, squared, count = self._totals
        return {
            "model_settings": self._fingerprint(),
            "forward_passes": dict(sorted(passes.items())),
            "likelihood_standard_error": {
                task: (total / count[task]) ** 0.5 for task, total in sorted(squared.items())
            },
        }

    # Requests.

    def loglikelihood(self, requests: list[Instance], disable_tqdm: bool = False) -> list[tuple[float, bool]]:
        """Return the log-likelihood of each continuation in nats, and whether greedy decoding generates it.

        The second value costs forward passes; it is computed where a document has a single request, and else False.
        """
        self._warn_of_template()
        choices = {(self._key("loglikelihood", request), _document(request)) for request in requests}
        n_choices = Counter(document for _, document in choices)
        answers = {}
        for request in requests:
            key = self._key("loglikelihood", request)
            if key not in answers:
                context, ids = self._encode_pair(*request.args)
                answers[key] = (request, self._answer(request, context, ids), n_choices[_document(request)] == 1)
        found = self._finish(answers, self._score, hide_progress=disable_tqdm)
        return [tuple(found[self._key("loglikelihood", request)]["value"]) for request in requests]

    def loglikelihood_rolling(self, requests: list[Instance], disable_tqdm: bool = False) -> list[float]:
        """Return the log-likelihood of each text in nats: the sum over windows of the model's positions."""
        limit = (max_positions(self.generator.model.config) or 2**30) - (self.generator.start_id is not None)
        keys, answers = [], {}
        for request in requests:
            (text,) = request.args
            windows = get_rolling_token_windows(self.generator.codec.encode(text), -1, limit, 1)
            parts = []
            for number, window in enumerate(windows):
                context, ids = make_disjoint_window(window)
                answer = self._answer(request, [token for token in context if token >= 0], ids)
                parts.append(f"{self._key('rolling', request)}-{number}")
                answers[parts[-1]] = (request, answer, False)
            keys.append(parts)
        found = self._finish(answers, self._score, hide_progress=disable_tqdm)
        return [sum(found[part]["value"][0] for part in parts) for parts in keys]

    def generate_until(self, requests: list[Instance], disable_tqdm: bool = False) -> list[str]:
        """Return the text that follows each context, up to the first of its `until`."""
        self._warn_of_template()
        seen: Counter[str] = Counter()
        keys, wanted = [], {}
        for request in requests:
            base = self._key("generate", request)
            key = f"{base}-{seen[base]}"  # repeats of a request are further samples
            seen[base] += 1
            keys.append(key)
            wanted[key] = request
        found = self._finish(wanted, self._generate, hide_progress=disable_tqdm)
        return [found[key]["value"] for key in keys]

    def _finish(
        self,
        wanted: Mapping[str, Any],
        compute: Callable[[Mapping[str, Any]], Iterator[dict[str, Any]]],
        *,
        hide_progress: bool = False,
    ) -> dict[str, Any]:
        """Return the results of requests by key; those of an earlier run are read, the others computed and kept."""
        if self._log is None:
            self._log = ResultLog(self._results_folder, self._fingerprint(), rank=self.rank)
        rest = {key: value for key, value in wanted.items() if key not in self._log.found}
        names = list(rest)
        with tqdm(total=len(names), desc="requests", disable=hide_progress or self.rank > 0) as progress:
            for low in range(0, len(names), _REQUESTS_AT_ONCE):
                part = {name: rest[name] for name in names[low : low + _REQUESTS_AT_ONCE]}
                self._log.add(dict(zip(part, compute(part), strict=True)))
                progress.update(len(part))
        for key in wanted:
            if key in self._counted:
                continue
            self._counted.add(key)
            result = self._log.found[key]
            self._passes[result["task"]] += result["passes"]
            self._n_requests[result["task"]] += 1
            if "error" in result:
                self._squared_errors[result["task"]] += result["error"] ** 2
        return self._log.found

    def _score(self, part: Mapping[str, tuple[Instance, Answer, bool]]) -> Iterator[dict[str, Any]]:
        scored = self.scorer.score([answer for _, answer, _ in part.values()])
        for (request, answer, needs_greedy), score in zip(part.values(), scored, strict=True):
            is_greedy, passes = False, score.passes
            if needs_greedy:
                is_greedy, more = self.scorer.is_greedy(answer)
                passes += more
            value = [round(score.log_likelihood, 4), is_greedy]
            yield {
                "task": str(request.task_name),
                "value": value,
                "error": round(score.standard_error, 4),
                "passes": passes,
            }

    def _generate(self, part: Mapping[str, Instance]) -> Iterator[dict[str, Any]]:
        jobs: dict[str, list[tuple[str, Canvas]]] = defaultdict(list)
        settings_of: dict[str, SamplingSettings] = {}
        untils: dict[str, list[str]] = {}
        for key, request in part.items():
            context, options = request.args
            settings, n_tokens, untils[key] = self._task_settings(dict(options))
            ids = self._fitting(request, self._context_ids(context), n_tokens)
            job = digest(asdict(settings))
            settings_of[job] = settings
            canvas = self.generator.from_prompt(ids, n_tokens, start=self._template is None)
            jobs[job].append((key, canvas))
        texts: dict[str, Generated] = {}
        for job, canvases in jobs.items():
            settings = settings_of[job]
            self.generator.check([canvas for _, canvas in canvases], settings)
            canvases.sort(key=lambda job: len(job[1]))
            for low in range(0, len(canvases), self.batch_size):
                keys, batch = zip(*canvases[low : low + self.batch_size], strict=True)
                sized = [each.canvas for each in self.generator.sized(batch, settings)]
                indices = [_number(key) for key in keys]
                texts.update(
                    zip(keys, self.generator.sample_batch(sized, settings, sample_indices=indices), strict=True)
                )
        for key, request in part.items():
            text = texts[key].predict
            for stop in untils[key]:
                text = text.partition(stop)[0] if stop else text
            yield {"task": str(request.task_name), "value": text, "passes": texts[key].num_forward_passes}

    def _task_settings(self, options: dict[str, Any]) -> tuple[SamplingSettings, int, list[str]]:
        """Return settings, tokens to generate and stop strings of a request; the user's own keys come first."""
        until = options.pop("until", [])
        n_tokens = options.pop("max_gen_toks", _MAX_NEW_TOKENS)
        if not options.pop("do_sample", False):
            options["temperature"] = 0.0
        unknown = [name for name in options if name not in (*_TASK_KEYS, *KEYS, *ALIASES)]
        if unknown:
            hint = did_you_mean(unknown[0], (*_TASK_KEYS, *KEYS))
            raise ValueError(f"generation_kwargs: {unknown[0]} is not a key of generation{hint}")
        settings = self.generator.settings(SamplingSettings(), **{**options, **self.sampling})
        return settings, self.max_new_tokens or int(n_tokens), [until] if isinstance(until, str) else list(until)

    def _context_ids(self, text: str) -> list[int]:
        """Return the ids of a context, under the template if there is one."""
        encode = self.generator.codec.encode
        if self._template is None:
            return encode(text)
        return self._template.ids(text, encode=encode, token_id=self.generator.tokenizer.convert_tokens_to_ids)

    def _encode_pair(self, context: str, continuation: str) -> tuple[list[int], list[int]]:
        """Return the ids of a context and of its continuation.

        They are those of the joined text, and the spaces between belong to the continuation. Under a template the
        continuation is an answer of its own, without a space before it, as in training.
        """
        encode = self.generator.codec.encode
        if self._template is not None:
            return self._context_ids(context), encode(continuation.lstrip())
        stripped = context.rstrip()
        before, whole = encode(stripped), encode(context + continuation)
        return before, whole[len(before) :]

    def _answer(self, request: Instance, context: Sequence[int], ids: Sequence[int]) -> Answer:
        context = self._fitting(request, context, len(ids))
        start = self.generator.start_id
        if start is not None and (not context or (self._template is None and context[0] != start)):
            context = [start, *context]
        return Answer(tuple(context), tuple(ids), _number(_document(request)))

    def _fitting(self, request: Instance, context: Sequence[int], n_tokens: int) -> list[int]:
        """Return the context, without its beginning if it is too long for `n_tokens` more.

        Raises:
            ValueError: if these alone are too many.
        """
        limit = max_positions(self.generator.model.config)
        if limit is None:
            return list(context)
        excess = len(context) + n_tokens + (self.generator.start_id is not None) - limit
        if excess <= 0:
            return list(context)
        if excess > len(context):
            raise ValueError(
                f"{request.task_name}, document {request.doc_id}: {n_tokens} tokens exceed the model's {limit} "
                "positions; lower max_new_tokens, or take a model with more positions"
            )
        logger.warning(
            "%s, document %s: the first %d tokens of the context are left out, as the model has %d positions",
            request.task_name,
            request.doc_id,
            excess,
            limit,
        )
        return list(context)[excess:]

    def _warn_of_template(self) -> None:
        if self.generator.config.template is not None and not self._template_applied:
            self._template_applied = True  # once
            logger.warning(
                "%s was finetuned with the template %s, and prompts come without it; set template: %s",
                self.path,
                self.generator.config.template.name,
                self.generator.config.template.name,
            )

    def _fingerprint(self) -> dict[str, Any]:
        return {
            "pretrained": str(self.path),
            "weights": _weights_digest(self.generator.model),
            "dtype": str(self.generator.model.dtype),
            "template": None if self._template is None else self._template.name,
            "scoring": self.scorer.scoring,
            "likelihood_samples": self.scorer.samples,
            "likelihood_seed": self.scorer.seed,
            "max_new_tokens": self.max_new_tokens,
            "sampling": asdict(self.settings),
        }

    def _key(self, kind: str, request: Instance) -> str:
        return digest([kind, _document(request), list(request.args)])


def _document(request: Instance) -> str:
    """Return what identifies a request's document: the task and its content."""
    return digest([request.task_name, request.doc])


def _number(key: str) -> int:
    """Return a number of 31 bits for a key."""
    return int(digest(key)[:8], 16) >> 1


def _weights_digest(model: Any) -> str:
    """Return a digest of the weights: of each one's name, shape and sum."""
    return digest(
        [[name, list(value.shape), float(value.detach().double().sum())] for name, value in model.named_parameters()]
    )


def _is_distributed() -> bool:
    return torch.distributed.is_available() and torch.distributed.is_initialized()


def _join_processes() -> None:
    """Join the processes that torchrun started."""
    if int(os.environ.get("WORLD_SIZE", "1")) > 1 and not _is_distributed():
        if torch.cuda.is_available():
            torch.cuda.set_device(int(os.environ.get("LOCAL_RANK", "0")))
        torch.distributed.init_process_group("gloo")


def _gathered(value: Any) -> list[Any]:
    """Return the values of all processes."""
    if not _is_distributed():
        return [value]
    values: list[Any] = [None] * torch.distributed.get_world_size()
    torch.distributed.all_gather_object(values, value)
    return values


def _in_turn(parts: Sequence[Any]) -> list[Any]:
    """Return the lists in `parts`, which hold the items of rank 0, 1, ... in turn, as those of one process.

    Args:
        parts: of each rank, a list or a mapping of such values.
    Returns:
        One value of the same form for each rank; the first holds all items, the others none.
    """
    if isinstance(parts[0], Mapping):
        columns = {name: _in_turn([part[name] for part in parts]) for name in parts[0]}
        return [{name: column[rank] for name, column in columns.items()} for rank in range(len(parts))]
    longest = max(map(len, parts))
    return [[part[i] for i in range(longest) for part in parts if i < len(part)], *([] for _ in parts[1:])]
