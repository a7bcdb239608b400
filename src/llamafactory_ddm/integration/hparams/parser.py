"""Upstream's finetuning arguments with the diffusion keys, and the checks of keys that need other arguments too.

No `from __future__ import annotations` here: upstream's parser reads the annotations, which must not be strings.
"""

import os
from dataclasses import dataclass, field, fields
from typing import Any, Literal, get_args, get_type_hints

from llamafactory.hparams.finetuning_args import FinetuningArguments

from ...utils.plugins import load_plugins
from ...utils.registry import did_you_mean, unknown_choice
from .diffusion import DiffusionArguments
from .sft import KEYS as FINETUNING_KEYS
from .stages import STAGES, requested_stage

UPSTREAM_STAGES: tuple[str, ...] = get_args(get_type_hints(FinetuningArguments)["stage"])
_STAGES = (*UPSTREAM_STAGES, *STAGES)
# Environment variables that select another trainer of upstream, which would train autoregressively.
_ENVIRONMENT = {
    "USE_MCA": "Megatron",
    "USE_MEGATRON_BRIDGE": "Megatron Bridge",
    "USE_V1": "LLaMA-Factory's v1 trainer",
}
# Keys of upstream that the diffusion stages do not support -> why.
_REFUSED = {
    "use_mca": "Megatron trains autoregressively only",
    "use_megatron_bridge": "Megatron trains autoregressively only",
    "use_hyper_parallel": "HyperParallel's trainer is autoregressive",
    "hyper_parallel_args": "HyperParallel's trainer is autoregressive",
    "hyper_parallel_cp_size": "HyperParallel's trainer is autoregressive",
    "ulysses_context_parallel_size": "its trainer is autoregressive (use sequence_parallel_size instead)",
    "num_mtp_layers": "multi-token prediction is autoregressive",
    "mtp_loss_weight": "multi-token prediction is autoregressive",
    "use_unsloth": "its kernels are causal",
    "use_unsloth_gc": "its kernels are causal",
    "use_kt": "its kernels are causal",
    "enable_liger_kernel": "its fused loss computes the autoregressive loss over all positions",
    "shift_attn": "S^2 attention is causal",
    "mixture_of_depths": "its routing is causal",
    "moe_aux_loss_coef": "a router's loss is not a sum over tokens, so it would depend on how a batch is split",
    "compute_accuracy": "it measures next-token accuracy",
    "use_dft_loss": "it is a loss of autoregressive training",
    "use_asft_loss": "it is a loss of autoregressive training",
    "use_eaft_loss": "it is a loss of autoregressive training",
    "neat_packing": "rows of this stage are continuous text, which packing: true makes",
    "label_smoothing_factor": "the diffusion loss is a likelihood bound, which smoothing would invalidate",
}
# Values that leave a key without effect, besides None, 0, False and "".
_NEUTRAL = {"hyper_parallel_cp_size": 1, "ulysses_context_parallel_size": 1}


@dataclass
class Parsed:
    """What upstream's parser does not pass on to a diffusion stage; kept in `finetuning_args.parsed`.

    Attributes:
        user_keys: the keys that the user wrote.
        resume: `resume_from_checkpoint` as the user wrote it; upstream replaces it by the checkpoint that it finds.
        generating_args: upstream's, which it passes to some of its own stages only.
        hidden: training arguments that are hidden from upstream's checks, with the values to restore after them.
    """

    user_keys: frozenset[str] = frozenset()
    resume: Any = None
    generating_args: Any = None
    hidden: dict[str, Any] = field(default_factory=dict)


@dataclass
class DiffusionFinetuningArguments(DiffusionArguments, FinetuningArguments):
    """The dataclass that replaces upstream's FinetuningArguments in every parser.

    Under one of our stages, `stage` is set to the upstream stage that it is based on, so that upstream's checks and
    data processing apply; `diffusion_stage` is the stage that the user set.
    """

    stage: Literal[_STAGES] = field(  # type: ignore[valid-type]
        default="sft",
        metadata={"help": f"Which stage to run; {', '.join(STAGES)}: diffusion language models."},
    )

    def __post_init__(self) -> None:
        """Check the diffusion keys, and set `diffusion_stage` and `parsed`.

        Raises:
            ValueError: for an unknown stage, a wrong value, or a diffusion key under another stage.
        """
        self.diffusion_stage: str | None = None
        self.parsed = Parsed()
        if self.stage not in _STAGES:
            raise ValueError(unknown_choice("stage", self.stage, _STAGES))
        stage = STAGES.get(self.stage)
        if stage is None:
            load_plugins(self.plugins)
            changed = self.changed_keys()
            if changed:
                raise ValueError(
                    f"{', '.join(changed)} {'belongs' if len(changed) == 1 else 'belong'} to the diffusion stages "
                    f"({', '.join(STAGES)}), but stage is {self.stage}; set stage: ddm or remove "
                    f"{'it' if len(changed) == 1 else 'them'}"
                )
        else:
            self.validate()
            if self.finetuning_type not in stage.finetuning_types:
                raise ValueError(
                    f"{unknown_choice('finetuning_type', self.finetuning_type, stage.finetuning_types)} (with stage: "
                    f"{stage.name})"
                )
            self.diffusion_stage, self.stage = stage.name, stage.base
        super().__post_init__()

    def to_dict(self) -> dict[str, Any]:
        """Return every key with its value, for loggers; `stage` is the one that the user set."""
        return {**super().to_dict(), "stage": self.diffusion_stage or self.stage}


def user_keys(args: Any) -> list[str]:
    """Return the keys that the user wrote: those of a dict, or the options of a command line."""
    if isinstance(args, dict):
        return [str(key) for key in args]
    options = [str(arg)[2:].partition("=")[0] for arg in args or () if str(arg).startswith("--")]
    return [option.replace("-", "_") for option in options if option != "help"]


def check_keys(parser: Any, args: Any) -> None:
    """Check that every key is a field of one of the parser's dataclasses.

    Command-line options are checked under our stages only, because argparse allows abbreviations under the others.

    Raises:
        ValueError: listing each unknown key with the nearest known one.
    """
    known = {f.name for kind in parser.dataclass_types for f in fields(kind) if f.init}
    if not isinstance(args, dict):
        if requested_stage(args) not in STAGES:
            return
        known |= {f"no_{name}" for name in known}
    unknown = [key for key in user_keys(args) if key not in known]
    if unknown:
        raise ValueError(
            "; ".join(f"unknown key {key!r}{did_you_mean(key, known).replace(';', ',', 1)}" for key in unknown)
        )


def check_environment() -> None:
    """Refuse environment variables under which upstream would not run a diffusion stage.

    Raises:
        ValueError: naming the variable.
    """
    for name, trainer in _ENVIRONMENT.items():
        if os.environ.get(name, "0").lower() in ("true", "y", "1"):
            raise ValueError(
                f"{name}={os.environ[name]} selects {trainer}, which has no diffusion stages; unset {name}"
            )


def check_supported(finetuning_args: Any, *other_args: Any) -> None:
    """Refuse keys of any dataclass that the diffusion stage does not support.

    Raises:
        ValueError: naming the key and the reason.
    """
    stage = STAGES[finetuning_args.diffusion_stage]
    for arguments in (finetuning_args, *other_args):
        for key, reason in _REFUSED.items():
            value = getattr(arguments, key, None)
            is_set = bool(value) and value != _NEUTRAL.get(key)
            if is_set and not (key == "neat_packing" and stage.base == "sft"):
                raise ValueError(f"{key}: {value} does not work with stage: {stage.name}, as {reason}; remove it")
    sft_keys = [key for key in FINETUNING_KEYS if getattr(finetuning_args, key) is not None]
    if sft_keys and stage.base != "sft":
        raise ValueError(f"{', '.join(sft_keys)}: read by stage: ddm-sft only, but stage is {stage.name}; remove it")
    if finetuning_args.random_truncate_ratio and stage.base == "sft":
        raise ValueError(
            f"random_truncate_ratio: {finetuning_args.random_truncate_ratio} works with stage: ddm only, but stage is "
            f"{stage.name}, whose answers it would cut off; remove it"
        )
