"""Upstream's finetuning arguments with the diffusion keys mixed in, and the checks that need the other arguments too.

The annotations of this module are evaluated at once (no `from __future__ import annotations`): upstream's parser
reads them.
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
# Environment variables that send upstream down another path, where `stage` would train autoregressively.
_ENVIRONMENT = {
    "USE_MCA": "Megatron",
    "USE_MEGATRON_BRIDGE": "Megatron Bridge",
    "USE_V1": "LLaMA-Factory's v1 trainer",
}
# Keys that stage: ddm cannot honour -> why.
_REFUSED = {
    "use_mca": "Megatron trains autoregressively only",
    "use_megatron_bridge": "Megatron trains autoregressively only",
    "use_hyper_parallel": "its trainer is autoregressive",
    "use_unsloth": "its kernels are causal",
    "use_unsloth_gc": "its kernels are causal",
    "use_kt": "its kernels are causal",
    "enable_liger_kernel": "its fused loss computes the autoregressive loss over all positions",
    "shift_attn": "S^2 attention is causal",
    "mixture_of_depths": "its routing is causal",
    "moe_aux_loss_coef": "a router's loss is no sum over tokens, so that it would change with how a batch is split",
    "compute_accuracy": "it measures next-token accuracy",
    "use_dft_loss": "it is a loss of autoregressive training",
    "use_asft_loss": "it is a loss of autoregressive training",
    "use_eaft_loss": "it is a loss of autoregressive training",
    "neat_packing": "its rows are continuous text, which packing: true makes",
    "label_smoothing_factor": "the diffusion loss is a likelihood bound, which smoothing would falsify",
}


@dataclass
class Parsed:
    """What the parser knows of a run and upstream hands to nobody; it travels on the finetuning arguments.

    Attributes:
        user_keys: the keys that the user wrote.
        resume: `resume_from_checkpoint` as it was written, which upstream replaces by what it finds.
        generating_args: upstream's, which it hands to its own stages alone.
        hidden: training arguments that upstream's checks must not see; they are put back after these.
    """

    user_keys: frozenset[str] = frozenset()
    resume: Any = None
    generating_args: Any = None
    hidden: dict[str, Any] = field(default_factory=dict)


@dataclass
class DiffusionFinetuningArguments(DiffusionArguments, FinetuningArguments):
    """What replaces upstream's FinetuningArguments in every parser.

    For one of our stages `stage` becomes the upstream stage that it is based on, so that upstream's checks and data
    processing apply; `diffusion_stage` holds the real one, and `parsed` what upstream would lose.
    """

    stage: Literal[_STAGES] = field(  # type: ignore[valid-type]
        default="sft",
        metadata={
            "help": "Which stage will be performed in training. " + ", ".join(STAGES) + ": diffusion language models."
        },
    )

    def __post_init__(self) -> None:
        """Check the diffusion keys, and set `diffusion_stage` and `parsed`.

        Raises:
            ValueError: for an unknown stage, a wrong value, or diffusion keys under another stage.
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
    options = [str(word)[2:].partition("=")[0] for word in args or () if str(word).startswith("--")]
    return [option.replace("-", "_") for option in options if option != "help"]


def check_keys(parser: Any, args: Any) -> None:
    """Check that every key is known to one of the parser's dataclasses.

    Words of the command line are checked for our stages alone: argparse lets the others abbreviate.

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
    """Refuse environment variables under which upstream would not run our stage.

    Raises:
        ValueError: naming the variable.
    """
    for name, what in _ENVIRONMENT.items():
        if os.environ.get(name, "0").lower() in ("true", "y", "1"):
            raise ValueError(f"{name}={os.environ[name]} selects {what}, which does not know diffusion; unset {name}")


def check_together(finetuning_args: Any, *others: Any) -> None:
    """Refuse keys of any dataclass that a diffusion stage cannot honour.

    Raises:
        ValueError: naming the key and the reason.
    """
    stage = STAGES[finetuning_args.diffusion_stage]
    for holder in (finetuning_args, *others):
        for key, why in _REFUSED.items():
            if getattr(holder, key, None) and not (key == "neat_packing" and stage.base == "sft"):
                raise ValueError(
                    f"{key}: {getattr(holder, key)} does not work with stage: {stage.name}: {why}; remove the key"
                )
    foreign = [key for key in FINETUNING_KEYS if getattr(finetuning_args, key) is not None]
    if foreign and stage.base != "sft":
        raise ValueError(f"{', '.join(foreign)}: a key of stage: ddm-sft, but stage is {stage.name}; remove it")
    if finetuning_args.random_truncate_ratio and stage.base == "sft":
        raise ValueError(
            f"random_truncate_ratio: {finetuning_args.random_truncate_ratio} cuts texts of stage: ddm, but stage is "
            f"{stage.name}, whose answers it would break; remove it"
        )
