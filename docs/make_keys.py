"""Write docs/keys.md, every YAML key of the plugin, from the definitions of the keys: python docs/make_keys.py."""

from __future__ import annotations

from pathlib import Path

from llamafactory_ddm.data.corpus.keys import PrepareKeys
from llamafactory_ddm.generation.quality_keys import QualityKeys
from llamafactory_ddm.harness.compare_keys import CompareKeys, ModelKeys
from llamafactory_ddm.harness.keys import EvalKeys
from llamafactory_ddm.integration.hparams.diffusion import KEYS
from llamafactory_ddm.integration.hparams.length import LengthKeys
from llamafactory_ddm.integration.hparams.monitoring import MonitoringKeys
from llamafactory_ddm.integration.hparams.sampling import SamplingArguments
from llamafactory_ddm.integration.hparams.serving import ServingKeys
from llamafactory_ddm.integration.hparams.sft import FinetuningKeys
from llamafactory_ddm.utils.keys import Key, keys_of

PAGE = Path(__file__).with_name("keys.md")
HEAD = """# Keys

Every YAML key that the plugin adds to LLaMA-Factory's own, under `stage: ddm` and `stage: ddm-sft`, and those of
`llamafactory-ddm eval`, `compare`, `quality` and `prepare-data`.
Written by `python docs/make_keys.py` from the code; a test compares.

- A key without a default takes what its text says, mostly what the checkpoint's `diffusion_config.json` holds.
  A YAML that contradicts the checkpoint is an error that names both.
- An unknown key or value is an error that names the nearest one. On a command line, `key=null` leaves a key unset.
- DiffuLLaMA's names are kept: `shift`, `anneal_steps`, `diffusion_steps`, `logits_temp`, `topp_temp`,
  `checkpoint_dir`.
"""
GENERATION = """`do_predict: true`, `sample_steps` and `eval_tasks` read these; for servers they are request defaults.
`llamafactory-ddm generate` takes them as options, such as `--block-length`; `--steps`, `--strategy`, `--temperature`
and `--top-p` are short for four of them. Python's `generate()` takes them as keyword arguments.
`temperature`, `top_p`, `top_k`, `repetition_penalty` and `max_new_tokens` are LLaMA-Factory's own keys, and count
where the YAML sets them. [sampling_edits.md](sampling_edits.md) explains the edit keys,
and [extending.md](extending.md) a `denoising_strategy` of your own.
"""

STRATEGIES = """| strategy | a step commits | from |
|---|---|---|
| `random` | each token with the same probability, drawn before the forward pass; the cheapest | DiffuLLaMA |
| `low_confidence` | its share of the tokens, the most probable first | LLaDA |
| `margin` | its share, the largest lead over the second token first | Kim et al. 2025 |
| `entropy` | its share, the least entropy first | Dream |
| `topk` | all but the lowest scores, with committed tokens competing | DiffuLLaMA's GSM8K sampler |
| `confidence_threshold` | every token at least so probable; several a step | Fast-dLLM |
| `entropy_bound` | the largest set of bounded joint uncertainty; several a step | Ben-Hamu et al. 2025 |
| `remdm` | as `random`, and remasks committed tokens with a small probability | ReMDM |
"""
EVALUATION = """## Evaluation

`llamafactory-ddm eval x.yaml` reads these and the keys of generation, which take precedence over a task's
`generation_kwargs`. Temperature is 0 unless the task samples (`do_sample: true`) or you set it.
[evaluation.md](evaluation.md) explains the method.

| key | default | allowed | meaning |
|---|---|---|---|
"""
COMPARISON = """## Comparison

`llamafactory-ddm compare x.yaml` reads these, and those of an evaluation and of generation as common keys.
[comparing.md](comparing.md) explains the results.

| key | default | allowed | meaning |
|---|---|---|---|
"""
QUALITY = """## Quality of texts

`llamafactory-ddm quality x.yaml` reads these and the keys of generation. Of the latter `denoising_strategy`,
`diffusion_steps` and `seed` may be lists, and every combination is a setting. Keys that only one strategy reads count
for that strategy. [generation_quality.md](generation_quality.md) explains the numbers.

| key | default | allowed | meaning |
|---|---|---|---|
"""
PREPARATION = """## Preparing data

`llamafactory-ddm prepare-data x.yaml` reads these, and LLaMA-Factory's and this package's keys of the model and its
tokenizer: `model_name_or_path`, `mask_token`, `template`, `add_special_tokens` … Those that LLaMA-Factory has too keep
their meaning. [data.md](data.md) explains the result.

| key | default | allowed | meaning |
|---|---|---|---|
"""


def page() -> str:
    """Return the page as Markdown."""
    sections = {
        "Training and models": ("Both stages read these.", ()),
        "Finetuning": ("`stage: ddm-sft` reads these.", (FinetuningKeys,)),
        "Variable length": (
            "Both stages read these; see [variable_length.md](variable_length.md).",
            (LengthKeys,),
        ),
        "During training": (
            "Both stages read these; see [training.md](training.md#texts-and-tasks-during-training).",
            (MonitoringKeys,),
        ),
        "Serving": (
            "`llamafactory-cli chat`, `api`, `webchat` and `webui` read these; see [serving.md](serving.md).",
            (ServingKeys,),
        ),
        "Generation": (GENERATION.rstrip(), (SamplingArguments,)),
    }
    own = {
        title: [name for kind in kinds for name in kind.__dataclass_fields__] for title, (_, kinds) in sections.items()
    }
    own["Training and models"] = [name for name in KEYS if not any(name in found for found in own.values())]
    parts = []
    for title, (text, _) in sections.items():
        rows = "\n".join(_row(name, KEYS[name]) for name in own[title])
        parts.append(f"## {title}\n\n{text}\n\n| key | default | allowed | meaning |\n|---|---|---|---|\n{rows}\n")
    evaluation = "\n".join(_row(name, key) for name, key in keys_of(EvalKeys).items())
    comparison = "\n".join(_row(name, key) for name, key in {**keys_of(CompareKeys), **keys_of(ModelKeys)}.items())
    quality = "\n".join(_row(name, key) for name, key in keys_of(QualityKeys).items())
    preparation = "\n".join(_row(name, key) for name, key in keys_of(PrepareKeys).items())
    rows = (EVALUATION + evaluation, COMPARISON + comparison, QUALITY + quality, PREPARATION + preparation)
    return "\n".join([HEAD, *parts, STRATEGIES, *(f"{text}\n" for text in rows)])


def _row(name: str, key: Key) -> str:
    default = "" if key.default is None else f"`{str(key.default).lower() if key.kind == 'boolean' else key.default}`"
    needs = "" if key.needs is None else f"Of `{key.needs[0]}: {'` or `'.join(key.needs[1])}`. "
    return f"| `{name}` | {default} | {_cell(key.allowed)} | {needs}{_cell(key.help)} |"


def _cell(text: str) -> str:
    return text.replace("|", "\\|").replace("<", "&lt;") if "`" not in text else text


if __name__ == "__main__":
    PAGE.write_text(page(), encoding="utf-8")
