"""`llamafactory_ddm`, the model type of lm-evaluation-harness: any diffusion model that `load` loads."""

from __future__ import annotations

import copy
import itertools
import logging
import os
from collections import Counter, defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
from lm_eval.api.instance import Instance
from lm_eval.api.model import LM
from lm_eval.models.utils import normalize_gen_kwargs
from lm_eval.utils import get_rolling_token_windows, make_disjoint_window
from tqdm import tqdm

from .._version import __version__
from ..checkpoints.hub import local_folder
from ..data.canvas import Canvas, canvas_of
from ..generation.generator import Generated, TextGenerator, error_prefix
from ..generation.identity import generator_identity
from ..generation.load import load
from ..modeling.diffusion_config import DiffusionConfig
from ..modeling.model_info import max_positions
from ..sampling import SamplingSettings
from ..sampling.keywords import ALIASES
from ..sampling.settings import KEYS as SAMPLING_KEYS
from ..utils.keys import keys_of
from ..utils.registry import did_you_mean
from ..utils.result_log import ResultLog, digest
from .infilling import check_no_template, reference_length, split_at_gap, take_infill
from .keys import EvalKeys
from .scoring import Answer, AnswerScorer

logger = logging.getLogger(__name__)
# Logged of a model whose tokenizer has a chat template; %s is the model.
NO_TEMPLATE = (
    "%s has a chat template, and prompts come without a template; if it was finetuned to follow instructions, set "
    "template to LLaMA-Factory's name of it"
)
_KEYS = keys_of(EvalKeys)
# Keys of other decoders in tasks; they have no meaning for a diffusion model.
_WITHOUT_MEANING = ("num_beams", "early_stopping", "length_penalty", "num_return_sequences", "use_cache")
# How long a process waits for the slowest one.
_TIMEOUT = timedelta(days=7)
# Answers that are decoded together, in batches: as some end, the others fill the batches.
_GREEDY_BATCHES = 8
# Number of the form of kept results; 2: a generated text has `tokens`.
_FORMAT = 2
# What a computation yields for each finished request: its key and its result.
_Results = Iterator[tuple[str, dict[str, Any]]]


class DiffusionLM(LM):  # type: ignore[misc]
    """Likelihoods and texts of a diffusion model, for lm-evaluation-harness.

    A result depends on the model, the settings and the request alone: its noise is keyed by task and document, not by
    batch, order or process.
    """

    def __init__(
        self,
        pretrained: str | TextGenerator,
        *,
        device: str | None = None,
        dtype: str = "auto",
        batch_size: int | str = 16,
        max_batch_size: int | None = None,
        scoring: str = "bound",
        likelihood_samples: int | None = None,
        max_new_tokens: int | None = None,
        template: str | None = None,
        plugins: str | None = None,
        results_folder: str | None = None,
        hide_progress: bool = False,
        **sampling: Any,
    ) -> None:
        """Load a model.

        Args:
            pretrained: folder or Hub name of a diffusion model, or folder of an adapter; or a loaded model, with its
                device and type.
            device: see `load`; without CUDA, a cuda device is replaced by the CPU.
            dtype: of the weights, one of those of `EvalKeys.infer_dtype`.
            batch_size: rows in a forward pass; results agree for every value, up to rounding.
            max_batch_size: not used.
            scoring: how answers are scored; see `AnswerScorer`.
            likelihood_samples: masks of an answer; see `AnswerScorer`.
            max_new_tokens: tokens to generate; by default what the task says, else 256.
            template: name of the template that prompts are put into, as a single user's turn; None for no template. A
                loaded model has its template already.
            plugins: see `load`.
            results_folder: where finished requests are kept, so that an interrupted evaluation goes on.
            hide_progress: whether no progress bars are shown.
            sampling: keys of generation, by YAML key; they take precedence over those of a task.
        Raises:
            TypeError: for an unknown key.
            ValueError: if a value is not allowed, or the model cannot be loaded.
            OSError: if the folder of results cannot be written.
        """
        super().__init__()
        self.batch_size = int(_KEYS["batch_size"].checked("batch_size", batch_size))
        self.max_new_tokens = _KEYS["max_new_tokens"].checked("max_new_tokens", max_new_tokens)
        dtype = _KEYS["infer_dtype"].checked("dtype", dtype)
        scoring = _KEYS["scoring"].checked("scoring", scoring)
        likelihood_samples = _KEYS["likelihood_samples"].checked("likelihood_samples", likelihood_samples)
        if device is not None and str(device).startswith("cuda") and not torch.cuda.is_available():
            logger.warning("device: %s is not available; the CPU is used", device)
            device = "cpu"
        _join_processes()
        log = ResultLog(None if results_folder is None else Path(results_folder), rank=self.rank)
        self._hide_progress = hide_progress
        self._is_loaded_here = not isinstance(pretrained, TextGenerator)
        self.generator: TextGenerator = (
            pretrained
            if isinstance(pretrained, TextGenerator)
            else load(
                pretrained,
                device=device,
                dtype=None if dtype == "auto" else getattr(torch, dtype),
                template=template,
                plugins=plugins,
            )
        )
        self.path, self.plugins = str(pretrained), plugins
        self._template = None if template is None else self.generator.config.template
        self._template_settled = self._template is not None
        self._scoring, self._likelihood_samples = scoring, likelihood_samples
        self._start(log, sampling)

    def with_sampling(self, sampling: Mapping[str, Any], results_folder: str | None) -> DiffusionLM:
        """Return the same model with other keys of generation and another folder of results; it is not loaded again.

        Raises:
            TypeError: for an unknown key.
            ValueError: if a value is not allowed.
            OSError: if the folder of results cannot be written.
        """
        other = copy.copy(self)
        log = ResultLog(None if results_folder is None else Path(results_folder), rank=self.rank)
        other._start(log, sampling)
        return other

    def _start(self, log: ResultLog, sampling: Mapping[str, Any]) -> None:
        """Set what depends on the keys of generation, read the results that are kept, and count from zero."""
        self._log = log
        self.sampling = {ALIASES.get(name, name): value for name, value in sampling.items()}
        self.settings = self.generator.settings(SamplingSettings(), **sampling)
        self.scorer = AnswerScorer(
            self.generator,
            scoring=self._scoring,
            samples=self._likelihood_samples,
            seed=self.settings.seed,
            batch_size=self.batch_size,
        )
        self._log.read_earlier(self._result_settings())
        self._counted: set[str] = set()
        self._cut_documents: set[tuple[Any, Any]] = set()  # those that were warned of
        self._passes: Counter[str] = Counter()
        self._tokens: Counter[str] = Counter()
        self._squared_errors: Counter[str] = Counter()
        self._n_likelihoods: Counter[str] = Counter()
        self._counters = (self._passes, self._tokens, self._squared_errors, self._n_likelihoods)
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

        Process r of R has documents r, r + R, ..., and the harness concatenates the lists that it gathers. Here they
        are interleaved into the documents' order, so that a bootstrapped error is the same as with one process.
        """
        everything = _gathered(obj)
        return _in_turn(everything) if self.rank == dst else None

    def barrier(self) -> None:
        """Wait for all processes, and add up what they counted."""
        parts = _gathered(self._counters)
        self._totals = tuple(Counter() for _ in parts[0])
        for part in parts:
            for total, count in zip(self._totals, part, strict=True):
                total.update(count)

    @property
    def tokenizer_name(self) -> str:
        """Return the name by which the harness keeps requests."""
        return str(self.path).replace("/", "__")

    def chat_template(self, chat_template: bool | str = False) -> str:
        """Return the tokenizer's chat template, for the harness's record.

        Raises:
            ValueError: if it has none.
        """
        if not chat_template:
            return ""
        text = getattr(self.generator.tokenizer, "chat_template", None)
        if not text:
            raise ValueError(f"{self.path} has no chat template; set template in place of --apply_chat_template")
        return str(text)

    def apply_chat_template(self, chat_history: list[dict[str, str]], add_generation_prompt: bool = True) -> str:
        """Return a conversation under the tokenizer's chat template."""
        self._template_settled = True
        text: str = self.generator.tokenizer.apply_chat_template(
            chat_history,
            tokenize=False,
            add_generation_prompt=add_generation_prompt,
            continue_final_message=not add_generation_prompt,
        )
        return text

    def get_model_info(self) -> dict[str, Any]:
        """Return what is needed to repeat the results, with forward passes and standard errors by task."""
        passes, tokens, squared, count = self._totals if _is_distributed() else self._counters
        return {
            "model_settings": self._result_settings(),
            "forward_passes": dict(sorted(passes.items())),
            "generated_tokens": dict(sorted(tokens.items())),
            "likelihood_standard_error": {task: (squared[task] / n) ** 0.5 for task, n in sorted(count.items())},
        }

    # Requests.

    def loglikelihood(self, requests: list[Instance], disable_tqdm: bool = False) -> list[tuple[float, bool]]:
        """Return the log-likelihood of each continuation in nats, and whether greedy decoding generates it.

        The second value costs forward passes. It is computed where a document has a single request, and else False.
        """
        self._warn_of_template()
        choices = {(self._key("", request), document_id(request)) for request in requests}
        n_choices = Counter(document for _, document in choices)
        keys, answers = [], {}
        for request in requests:
            needs_greedy = n_choices[document_id(request)] == 1
            keys.append(self._key("greedy" if needs_greedy else "likelihood", request))
            if keys[-1] not in answers:
                answers[keys[-1]] = (self._answer(request), needs_greedy)
        found = self._finish(answers, self._score, disable_tqdm)
        for request, key in zip(requests, keys, strict=True):
            self._count(request, key, [found[key]])
        return [(found[key]["value"], found[key]["greedy"]) for key in keys]

    def loglikelihood_rolling(self, requests: list[Instance], disable_tqdm: bool = False) -> list[float]:
        """Return the log-likelihood of each text in nats: the sum over windows of the model's positions."""
        has_start = self.generator.start_id is not None
        limit = (max_positions(self.generator.model.config) or 2**30) - has_start
        keys, answers = [], {}
        for request in requests:
            (text,) = request.args
            parts: list[str] = []
            for window in get_rolling_token_windows(self.generator.codec.encode(text), -1, limit - 1, 1):
                context, ids = make_disjoint_window(window)
                parts.append(f"{self._key('rolling', request)}-{len(parts)}")
                context = self._with_start([token for token in context if token >= 0])
                answers[parts[-1]] = (Answer(tuple(context), tuple(ids), noise_index(document_id(request))), False)
            keys.append(parts)
        found = self._finish(answers, self._score, disable_tqdm)
        for request, parts in zip(requests, keys, strict=True):
            self._count(request, self._key("rolling", request), [found[part] for part in parts])
        return [sum(found[part]["value"] for part in parts) for parts in keys]

    def generate_until(self, requests: list[Instance], disable_tqdm: bool = False) -> list[str]:
        """Return the text that follows each context, or fills its gap, up to the first of its `until`."""
        self._warn_of_template()
        seen: Counter[str] = Counter()
        keys, wanted = [], {}
        for request in requests:
            base = self._key("generate", request)
            # The first `repeats` copies of a request are separate samples. Later copies are the harness's padding,
            # which gives all processes as many requests; they reuse a result.
            keys.append(f"{base}-{seen[base] % (request.repeats or 1)}")
            seen[base] += 1
            wanted[keys[-1]] = request
        found = self._finish(wanted, self._generate, disable_tqdm)
        for key, request in wanted.items():
            self._count(request, key, [found[key]])
        return [found[key]["value"] for key in keys]

    def _finish(
        self, wanted: Mapping[str, Any], compute: Callable[[Mapping[str, Any]], _Results], hide_progress: bool
    ) -> dict[str, Any]:
        """Return the results of requests by key; those of an earlier run are read, the others computed and kept."""
        rest = {key: value for key, value in wanted.items() if key not in self._log.results}
        is_hidden = hide_progress or self._hide_progress or self.rank > 0
        with tqdm(total=len(rest), desc="requests", disable=is_hidden) as progress:
            for key, result in compute(rest):
                self._log.add(key, result)
                progress.update()
        return self._log.results

    def _count(self, request: Instance, key: str, results: Sequence[Mapping[str, Any]]) -> None:
        """Count the forward passes and tokens of a request once, and the squared error of its likelihood."""
        if key in self._counted:
            return
        self._counted.add(key)
        task = str(request.task_name)
        self._passes[task] += sum(result["passes"] for result in results)
        if all("tokens" in result for result in results):
            self._tokens[task] += sum(result["tokens"] for result in results)
        if all("error" in result for result in results):
            self._squared_errors[task] += sum(result["error"] ** 2 for result in results)
            self._n_likelihoods[task] += 1

    def _score(self, wanted: Mapping[str, tuple[Answer, bool]]) -> _Results:
        scored = zip(wanted.items(), self.scorer.score([answer for answer, _ in wanted.values()]), strict=True)
        while part := list(itertools.islice(scored, _GREEDY_BATCHES * self.batch_size)):
            keys = [key for (key, (_, needs_greedy)), _ in part if needs_greedy]
            greedy = dict(zip(keys, self.scorer.are_greedy([wanted[key][0] for key in keys]), strict=True))
            for (key, _), score in part:
                is_greedy, passes = greedy.get(key, (False, 0))
                yield (
                    key,
                    {
                        "value": round(score.log_likelihood, 4),
                        "error": round(score.standard_error, 4),
                        "greedy": is_greedy,
                        "passes": score.passes + passes,
                    },
                )

    def _generate(self, wanted: Mapping[str, Instance]) -> _Results:
        jobs: dict[str, list[tuple[str, Canvas, list[str]]]] = defaultdict(list)
        settings_of: dict[str, SamplingSettings] = {}
        for key, request in wanted.items():
            context, options = request.args
            infill, _ = take_infill(options)
            settings, n_tokens, until = self._task_settings(request, options)
            if infill:
                canvas = self._canvas_with_gap(request, context, infill, n_tokens)
            else:
                canvas = self._canvas(self._context(request, context, n_tokens), n_tokens)
            job = digest(asdict(settings))
            settings_of[job] = settings
            jobs[job].append((key, canvas, until))
        for job, canvases in jobs.items():
            settings = settings_of[job]
            self.generator.check([canvas for _, canvas, _ in canvases], settings)
            canvases.sort(key=lambda job: len(job[1]))
            for low in range(0, len(canvases), self.batch_size):
                keys, batch, untils = zip(*canvases[low : low + self.batch_size], strict=True)
                sized = [each.canvas for each in self.generator.sized(batch, settings)]
                indices = [noise_index(key) for key in keys]
                texts: list[Generated] = self.generator.sample_batch(sized, settings, sample_indices=indices)
                for key, text, until in zip(keys, texts, untils, strict=True):
                    value, n_tokens = self._cut_at_stop(text, until)
                    yield key, {"value": value, "tokens": n_tokens, "passes": text.num_forward_passes}

    def _cut_at_stop(self, text: Generated, until: Sequence[str]) -> tuple[str, int]:
        """Return a text before the first of the stop strings, and the number of its tokens.

        Tokens count up to EOS or the stop string, as in the evaluations of Fast-dLLM and d3LLM: a text that is cut is
        tokenised again.
        """
        end = min((at for at in map(text.predict.find, until) if at >= 0), default=None)
        if end is None:
            return text.predict, text.n_tokens
        value = text.predict[:end]
        return value, len(self.generator.codec.encode(value))

    def _canvas(self, ids: Sequence[int], n_tokens: int) -> Canvas:
        if not ids:
            return self.generator.from_noise(n_tokens + (self.generator.start_id is not None))
        return self.generator.from_prompt(ids, n_tokens, start=self._template is None)

    def _canvas_with_gap(self, request: Instance, context: str, infill: bool | str, n_tokens: int) -> Canvas:
        """Return the canvas of a context with a gap; what is too long loses its beginning.

        The gap's length is that of its marker, else the user's max_new_tokens, else that of the task's reference.

        Raises:
            ValueError: if there is not one gap, it is empty or too long, or the context is to be put into a template.
        """
        codec = self.generator.codec
        with error_prefix(f"task: {request.task_name}, document {request.doc_id}"):
            check_no_template(None if self._template is None else self._template.name)
            before, marked, after = split_at_gap(context)
            length = marked or self.max_new_tokens or reference_length(infill, request.doc, codec)
            length = n_tokens if length is None else length
            if length < 1:
                raise ValueError("the gap is empty; the task's infill must be a reference with at least one token")
        suffix = codec.encode_after(after) if after else []
        prefix = self._cut(request, codec.encode(before), length + len(suffix))
        return canvas_of([prefix, length, suffix], start_id=self.generator.start_id)

    def _task_settings(self, request: Instance, options: Mapping[str, Any]) -> tuple[SamplingSettings, int, list[str]]:
        """Return settings, tokens to generate and stop strings of a request; the user's own keys take precedence.

        Raises:
            ValueError: for a key without effect or a value that is not allowed, naming the task.
        """
        try:
            n_tokens, until, of_task = read_generation_keys(options)
            settings = self.generator.settings(SamplingSettings(), **{**of_task, **self.sampling})
        except ValueError as error:
            raise ValueError(f"task: {request.task_name}: generation_kwargs: {error}") from error
        return settings, self.max_new_tokens or n_tokens, until

    def _answer(self, request: Instance) -> Answer:
        """Return a continuation with its context.

        Without a template the joined text is tokenised. The continuation begins at the first token that differs from
        those of the context without its trailing spaces, so it includes the spaces between, and a token that spans
        both. With a template the continuation is tokenised alone, without leading spaces, as in training.

        Raises:
            ValueError: if the continuation is empty, or too long for the model.
        """
        context, continuation = request.args
        encode = self.generator.codec.encode
        if self._template is not None:
            ids = encode(continuation.lstrip())
            before = self._context(request, context, len(ids))
        else:
            before, whole = encode(context.rstrip()), encode(context + continuation)
            pairs = zip(before, whole, strict=False)  # the joined text may have fewer tokens
            n_common = sum(1 for _ in itertools.takewhile(lambda pair: pair[0] == pair[1], pairs))
            ids = whole[n_common:]
            before = self._cut(request, before[:n_common], len(ids))
        if not ids:
            raise ValueError(
                f"task: {request.task_name}, document {request.doc_id}: the answer {continuation!r} has no tokens; "
                "correct doc_to_target or doc_to_choice in the task's YAML"
            )
        return Answer(tuple(self._with_start(before)), tuple(ids), noise_index(document_id(request)))

    def _with_start(self, context: list[int]) -> list[int]:
        """Return a context with the start token if the model needs one."""
        start = self.generator.start_id
        needs = start is not None and (not context or (self._template is None and context[0] != start))
        return [int(start or 0), *context] if needs else context

    def _context(self, request: Instance, text: str, n_tokens: int) -> list[int]:
        """Return the ids of a context under the template, if there is one; what is too long loses its beginning."""
        encode = self.generator.codec.encode
        if self._template is None:
            return self._cut(request, encode(text), n_tokens)
        token_id = self.generator.tokenizer.convert_tokens_to_ids
        whole = self._template.ids(text, encode=encode, token_id=token_id)
        while excess := len(whole) - len(self._cut(request, whole, n_tokens)):
            shorter = self.generator.codec.decode(encode(text)[excess:], follows=False)
            if len(shorter) >= len(text):
                raise ValueError(self._too_long(request, n_tokens))
            text = shorter
            whole = self._template.ids(text, encode=encode, token_id=token_id)
        return whole

    def _cut(self, request: Instance, context: list[int], n_tokens: int) -> list[int]:
        """Return a context without its beginning if it is too long for `n_tokens` more.

        Raises:
            ValueError: if these alone are too many.
        """
        limit = max_positions(self.generator.model.config)
        if limit is None:
            return context
        needs_start = self.generator.start_id is not None and self._template is None
        excess = len(context) + n_tokens + needs_start - limit
        if excess <= 0:
            return context
        if excess > len(context):
            raise ValueError(self._too_long(request, n_tokens))
        document = (request.task_name, request.doc_id)
        if document in self._cut_documents:
            return context[excess:]
        self._cut_documents.add(document)
        logger.warning(
            "task: %s, document %s: the first %d tokens of the context are left out, as the model has %d positions",
            request.task_name,
            request.doc_id,
            excess,
            limit,
        )
        return context[excess:]

    def _too_long(self, request: Instance, n_tokens: int) -> str:
        return (
            f"task: {request.task_name}, document {request.doc_id}: {n_tokens} tokens, with the start token or "
            f"template before them, do not fit the model's {max_positions(self.generator.model.config)} positions; "
            "lower max_new_tokens for a generated text, or leave the task out"
        )

    def _warn_of_template(self) -> None:
        """Warn once of a finetuned model whose prompts come without its template."""
        if self._template_settled:
            return
        self._template_settled = True
        template = self.generator.config.template
        if template is None:
            # A checkpoint of this package says whether it has a template; a published one does not.
            is_published = self._is_loaded_here and DiffusionConfig.find(local_folder(self.path)) is None
            if is_published and getattr(self.generator.tokenizer, "chat_template", None):
                logger.warning(NO_TEMPLATE, self.path)
        else:
            logger.warning(
                "%s was finetuned with the template %s, and prompts come without it; set template: %s",
                self.path,
                template.name,
                template.name,
            )

    def _result_settings(self) -> dict[str, Any]:
        """Return the settings that kept results must agree with: those of the model, the tokenizer and the keys."""
        generator = self.generator
        tokenizer = getattr(generator.tokenizer, "backend_tokenizer", None)
        encoding = generator.tokenizer.get_vocab() if tokenizer is None else tokenizer.to_str()
        # A model in training is evaluated often, its memory is short, and its results are not kept.
        identity = (
            generator_identity(generator)
            if self._is_loaded_here
            else {"weights": None, "dtype": str(generator.model.dtype)}
        )
        return {
            "pretrained": str(self.path),
            **identity,
            "encoding": digest(encoding),
            "plugins": plugins_digest(self.plugins),
            "version": __version__,
            "format": _FORMAT,
            "template": None if self._template is None else self._template.name,
            "scoring": self.scorer.scoring,
            "likelihood_samples": self.scorer.samples,
            "max_new_tokens": self.max_new_tokens,
            "sampling": asdict(self.settings),
            "sampling_keys": sorted(self.sampling),
        }

    def _key(self, kind: str, request: Instance) -> str:
        """Return the key of a request's result: a digest of kind, document and arguments."""
        return digest([kind, document_id(request), list(request.args)])


def read_generation_keys(options: Mapping[str, Any]) -> tuple[int, list[str], dict[str, Any]]:
    """Return the tokens to generate, the stop strings and the keys of generation of a task's generation_kwargs.

    Raises:
        ValueError: for a key that has no effect, with the nearest one, or a value of another type.
    """
    _, options = take_infill({name: value for name, value in options.items() if value is not None})
    if not isinstance(options.get("do_sample", False), bool):
        raise ValueError(f"do_sample: {options['do_sample']!r} must be true or false")
    try:
        known: dict[str, Any] = dict(normalize_gen_kwargs(options, _KEYS["max_new_tokens"].default or 256))
    except (TypeError, ValueError) as error:
        given = {name: options.get(name) for name in ("temperature", "max_gen_toks")}
        raise ValueError(f"temperature and max_gen_toks must be numbers, got {given}") from error
    n_tokens, until = known.pop("max_gen_toks"), known.pop("until", [])
    if n_tokens < 1:
        raise ValueError(f"max_gen_toks: {n_tokens} must be at least 1")
    if not known.pop("do_sample"):
        known["temperature"] = 0.0
    for name in _WITHOUT_MEANING:
        if known.pop(name, None) not in (None, 1, False):
            logger.warning("generation_kwargs: %s has no meaning for a diffusion model, and is not used", name)
    keys = {ALIASES.get(name, name): value for name, value in known.items()}
    for name in keys:
        if name not in SAMPLING_KEYS:
            raise ValueError(f"{name} is not a key of generation{did_you_mean(name, SAMPLING_KEYS)}")
    return n_tokens, [stop for stop in until if stop], keys


def document_id(request: Instance) -> str:
    """Return what identifies a request's document: its task, number and content."""
    return digest([request.task_name, request.doc_id, request.doc])


def noise_index(key: str) -> int:
    """Return a number of 31 bits that keys the noise of a request."""
    return int(digest(key)[:8], 16) >> 1


def plugins_digest(plugins: str | Sequence[str] | None) -> str | None:
    """Return a digest of the plugins' names, and of the files among them."""
    if not plugins:
        return None
    names = plugins.split(",") if isinstance(plugins, str) else list(plugins)
    return digest([[name, Path(name).read_text(encoding="utf-8") if name.endswith(".py") else ""] for name in names])


def _is_distributed() -> bool:
    return torch.distributed.is_available() and torch.distributed.is_initialized()


def _join_processes() -> None:
    """Join the processes that torchrun started."""
    if int(os.environ.get("WORLD_SIZE", "1")) > 1 and not _is_distributed():
        if torch.cuda.is_available():
            torch.cuda.set_device(int(os.environ.get("LOCAL_RANK", "0")))
        torch.distributed.init_process_group("gloo", timeout=_TIMEOUT)


def _gathered(value: Any) -> list[Any]:
    """Return the values of all processes."""
    if not _is_distributed():
        return [value]
    values: list[Any] = [None] * torch.distributed.get_world_size()
    torch.distributed.all_gather_object(values, value)
    return values


def _in_turn(parts: Sequence[Any]) -> list[Any]:
    """Interleave the lists of all ranks into the order of one process.

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
