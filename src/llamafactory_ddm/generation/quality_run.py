"""`llamafactory-ddm quality`: texts of several models and settings, and their quality under a judge."""

from __future__ import annotations

import json
import platform
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from importlib import metadata
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm
from transformers import AutoConfig

from .._version import __version__
from ..checkpoints.adapters import ADAPTER_CONFIG, base_of
from ..checkpoints.hub import local_folder
from ..checkpoints.kind import check_kind, model_or_adapter
from ..checkpoints.weights import first_line
from ..evaluation.quality import Estimate, Judge, JudgedText, quality
from ..modeling.model_info import max_positions
from ..sampling.keywords import with_keywords
from ..sampling.settings import SamplingSettings
from ..utils.files import replacing
from ..utils.plugins import load_plugins
from ..utils.result_log import ResultLog, digest
from .autoregressive import AutoregressiveModel, load_autoregressive
from .generator import TextGenerator, error_prefix
from .identity import generator_identity, model_identity
from .load import load
from .quality_keys import QualityKeys, Sampling, Source

_PACKAGES = ("llamafactory-ddm", "transformers", "torch")


@dataclass(frozen=True)
class Text:
    """A generated text.

    Attributes:
        text: the text up to EOS.
        forwards: forward passes that it took.
    """

    text: str
    forwards: int


@dataclass(frozen=True)
class Outcome:
    """Texts of one model in one setting, and their quality.

    Attributes:
        model: name of the model.
        kind: "diffusion" or "ar".
        strategy: the denoising strategy; None for an autoregressive model.
        steps: the largest number of denoising steps; None for an autoregressive model.
        seed: of the draws.
        texts: the texts, in the order of their index.
        judged: their scores.
        numbers: see `evaluation.quality.quality`.
    """

    model: str
    kind: str
    strategy: str | None
    steps: int | None
    seed: int
    texts: tuple[Text, ...]
    judged: tuple[JudgedText, ...]
    numbers: Mapping[str, Estimate | None]

    @property
    def forwards(self) -> float:
        """Return the mean number of forward passes of a text."""
        return sum(text.forwards for text in self.texts) / len(self.texts)


def compare(keys: QualityKeys, sampling: Sampling) -> tuple[list[Outcome], dict[str, Any]]:
    """Generate, judge, and return the outcomes with the record of the run; finished texts are kept in save_dir.

    Raises:
        ValueError: if a model cannot be loaded, or keys and models do not fit.
        OSError: if save_dir cannot be written.
    """
    plugins = {
        name: Path(name).read_text(encoding="utf-8") if name.endswith(".py") else ""
        for name in load_plugins(keys.plugins)
    }
    sources = keys.sources()
    for source in sources:
        check_source(source, keys, sampling)
    judge_path = str(keys.judge_model)
    with error_prefix("judge_model"):
        check_kind(judge_path, "ar")
        _positions(judge_path)
    log = ResultLog(Path(str(keys.save_dir)))
    log.read_earlier({"version": __version__})
    dtype = None if keys.infer_dtype == "auto" else getattr(torch, keys.infer_dtype)
    models: dict[str, Any] = {}
    generated: list[tuple[Source, dict[str, Any], tuple[Text, ...]]] = []
    total = keys.n_texts * sum(len(sampling.settings(source.kind)) for source in sources)
    with tqdm(total=total, desc="texts") as progress:
        for source in sources:
            with error_prefix(source.key):
                writer = _writer(source, keys, dtype)
                identity = writer.identity()
                models[source.name] = {**asdict(source), **identity}
                for setting in sampling.settings(source.kind):
                    texts = _texts(writer, setting, keys, log, [identity, plugins], progress)
                    generated.append((source, setting, texts))
            del writer
    with error_prefix("judge_model"):
        loaded = load_autoregressive(judge_path, dtype=dtype)
        judge = Judge(loaded.model, loaded.tokenizer, batch_size=keys.batch_size)
        different = list(dict.fromkeys(text.text for _, _, each in generated for text in each))
        judged = dict(zip(different, judge.score(different), strict=True))
    identity = model_identity(loaded.model, loaded.tokenizer)
    outcomes = [_outcome(source, setting, each, judged) for source, setting, each in generated]
    record = {
        "keys": {**asdict(keys), **sampling.rest, **sampling.lists},
        "models": models,
        "judge": {
            "judge_model": judge_path,
            **identity,
            "bos_token": loaded.tokenizer.bos_token,
            "positions": judge.max_positions,
            "tokens": "the judge's, of the decoded text",
            "shares_tokenizer_with": [
                name for name, model in models.items() if model["tokenizer"] == identity["tokenizer"]
            ],
        },
        "versions": {name: metadata.version(name) for name in _PACKAGES},
        "machine": {"device": str(loaded.model.device), "platform": platform.platform()},
    }
    return outcomes, record


def check_source(source: Source, keys: QualityKeys, sampling: Sampling) -> None:
    """Check a model and its settings before any weights are read.

    Raises:
        ValueError: if there is no such model, it is of the other kind, its positions are too few, or a key of
            generation is wrong.
    """
    subject = source.key
    with error_prefix(subject):
        config = check_kind(model_or_adapter(source.model, source.adapter), source.kind)
    folder = Path(local_folder(source.path))
    with error_prefix(subject):
        limit = _positions(str(folder) if folder.is_dir() else source.path)
    needed = keys.length + bool(config is not None and config.shift)
    if limit is not None and needed > limit:
        start = ", the start token included" if needed > keys.length else ""
        raise ValueError(f"length: {keys.length} needs {needed} positions{start}, but {subject} has {limit}; lower it")
    for setting in sampling.settings(source.kind):
        try:
            _settings(setting)
        except TypeError as error:
            raise ValueError(str(error)) from error


def _settings(setting: Mapping[str, Any]) -> SamplingSettings:
    """Return the settings of generation, without tokens to suppress, which need a tokenizer."""
    keywords = {name: value for name, value in setting.items() if name != "suppress_tokens"}
    return with_keywords(SamplingSettings(), keywords)


def _positions(path: str) -> int | None:
    """Return the positions of a model or an adapter's model, from its config.

    Raises:
        ValueError: if the config cannot be read.
    """
    base = base_of(path) if (Path(path) / ADAPTER_CONFIG).is_file() else path
    try:
        return max_positions(AutoConfig.from_pretrained(local_folder(base)))
    except (OSError, ValueError) as error:
        raise ValueError(f"the config of {base} cannot be read: {first_line(error)}") from error


class _DiffusionWriter:
    """Texts of a diffusion model."""

    kind = "diffusion"

    def __init__(self, generator: TextGenerator, length: int) -> None:
        self.generator, self.length = generator, length
        self.canvas = generator.from_noise(length + (generator.start_id is not None))

    def identity(self) -> dict[str, Any]:
        """Return what identifies the model."""
        return generator_identity(self.generator)

    def settings(self, setting: Mapping[str, Any]) -> SamplingSettings:
        """Return the checked settings of generation."""
        settings = self.generator.settings(SamplingSettings(), **setting)
        self.generator.check([self.canvas], settings)
        return settings

    def write(self, settings: SamplingSettings, indices: Sequence[int]) -> list[Text]:
        """Return the texts of some indices."""
        canvases = [each.canvas for each in self.generator.sized([self.canvas] * len(indices), settings)]
        found = self.generator.sample_batch(canvases, settings, sample_indices=indices)
        return [Text(each.predict, each.num_forward_passes) for each in found]


class _AutoregressiveWriter:
    """Texts of an autoregressive model."""

    kind = "ar"

    def __init__(self, model: AutoregressiveModel, length: int) -> None:
        self.model, self.length = model, length

    def identity(self) -> dict[str, Any]:
        """Return what identifies the model."""
        return model_identity(self.model.model, self.model.tokenizer)

    def settings(self, setting: Mapping[str, Any]) -> SamplingSettings:
        """Return the checked settings of generation."""
        return self.model.settings(setting)

    def write(self, settings: SamplingSettings, indices: Sequence[int]) -> list[Text]:
        """Return the texts of some indices."""
        found = self.model.sample(self.length, settings.logits, seed=settings.seed, sample_indices=indices)
        return [Text(each.text, each.num_forward_passes) for each in found]


def _writer(source: Source, keys: QualityKeys, dtype: Any) -> _DiffusionWriter | _AutoregressiveWriter:
    if source.kind == "ar":
        return _AutoregressiveWriter(load_autoregressive(source.path, dtype=dtype), keys.length)
    return _DiffusionWriter(load(source.path, dtype=dtype), keys.length)


def _texts(
    writer: _DiffusionWriter | _AutoregressiveWriter,
    setting: Mapping[str, Any],
    keys: QualityKeys,
    log: ResultLog,
    identity: Sequence[Any],
    progress: Any,
) -> tuple[Text, ...]:
    """Return the texts of a setting; those of an earlier run are read, the others generated and kept."""
    settings = writer.settings(setting)
    job = digest([writer.kind, *identity, asdict(settings), keys.length])
    names = [f"{job}-{index}" for index in range(keys.n_texts)]
    todo = [index for index, name in enumerate(names) if name not in log.results]
    progress.update(keys.n_texts - len(todo))
    for batch in _parts(todo, keys.batch_size):
        for index, text in zip(batch, writer.write(settings, batch), strict=True):
            log.add(names[index], asdict(text))
        progress.update(len(batch))
    return tuple(Text(**log.results[name]) for name in names)


def _parts(items: Sequence[int], size: int) -> Iterator[Sequence[int]]:
    return (items[low : low + size] for low in range(0, len(items), size))


def _outcome(
    source: Source, setting: Mapping[str, Any], texts: tuple[Text, ...], judged: Mapping[str, JudgedText]
) -> Outcome:
    scores = tuple(judged[text.text] for text in texts)
    return Outcome(
        source.name,
        source.kind,
        setting.get("denoising_strategy"),
        setting.get("diffusion_steps"),
        setting["seed"],
        texts,
        scores,
        quality(scores),
    )


def save(outcomes: Sequence[Outcome], record: Mapping[str, Any], folder: Path) -> None:
    """Write `texts.jsonl`, `quality.json`, `quality.md` and `quality.png` into a folder."""
    from .quality_report import figure, page

    results = [
        {
            **_setting_of(outcome),
            "forwards": outcome.forwards,
            **{name: None if each is None else asdict(each) for name, each in outcome.numbers.items()},
        }
        for outcome in outcomes
    ]
    with replacing(folder / "quality.json") as file:
        file.write(json.dumps({**record, "results": results}, indent=2, default=str) + "\n")
    with replacing(folder / "texts.jsonl") as file:
        for outcome in outcomes:
            for index, (text, score) in enumerate(zip(outcome.texts, outcome.judged, strict=True)):
                scored = {"nll": score.nll, "scored_tokens": score.n_scored, "tokens": len(score.ids)}
                row = {**_setting_of(outcome), "index": index, **asdict(text), **scored}
                file.write(json.dumps(row, ensure_ascii=False) + "\n")
    with replacing(folder / "quality.md") as file:
        file.write(page(outcomes, record))
    with replacing(folder / "quality.png", "wb") as file:
        figure(outcomes).savefig(file, format="png", dpi=80, pil_kwargs={"optimize": True})


def _setting_of(outcome: Outcome) -> dict[str, Any]:
    return {name: getattr(outcome, name) for name in ("model", "kind", "strategy", "steps", "seed")}
