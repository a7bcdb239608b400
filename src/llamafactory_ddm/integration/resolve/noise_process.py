"""The noise process of a run: the YAML's, else the checkpoint's."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from ...modeling.diffusion_config import DiffusionConfig
from ...objectives import OBJECTIVES
from ..logs import get_logger

logger = get_logger(__name__)


def resolve_noise_process(config: DiffusionConfig | None, finetuning_args: Any) -> tuple[str, float]:
    """Return noise process and uniform ratio of a run.

    The YAML may change the checkpoint's noise by naming the process; a ratio without a process must equal the
    checkpoint's.

    Raises:
        ValueError: if the keys contradict each other or the checkpoint, naming them.
    """
    process, ratio = _process_and_ratio(config, finetuning_args.noise_process, finetuning_args.uniform_ratio)
    eos_noise_keys = ["pad_mask_ratio"] if finetuning_args.pad_mask_ratio is not None else []
    eos_noise_keys += ["eos_window_ratio"] if finetuning_args.eos_window_ratio else []
    if eos_noise_keys and not OBJECTIVES.get(process).takes_eos_noise(ratio):
        raise ValueError(
            f"{', '.join(eos_noise_keys)}: not supported with noise_process: {process}; remove one of them"
        )
    return process, ratio


def _process_and_ratio(config: DiffusionConfig | None, process: str | None, ratio: float | None) -> tuple[str, float]:
    stored_process, stored_ratio = ("masked", 0.0) if config is None else (config.noise_process, config.uniform_ratio)
    if process is not None:
        default = OBJECTIVES.get(process).default_uniform_ratio
        if default is not None:
            if ratio is None:
                ratio = stored_ratio if stored_process == process else default
            return process, ratio
        if ratio:
            raise ValueError(
                f"uniform_ratio: {ratio} needs noise_process: mixed, but noise_process is {process}; remove "
                "uniform_ratio (on the command line uniform_ratio=null), or set noise_process: mixed"
            )
        return process, 0.0
    if ratio is None or ratio == stored_ratio:
        return stored_process, stored_ratio
    if config is None:
        raise ValueError(
            f"uniform_ratio: {ratio} has no effect without noise_process: mixed; set it, or remove uniform_ratio"
        )
    raise ValueError(
        f"uniform_ratio: {ratio} contradicts the checkpoint, which was trained with noise_process: {stored_process}, "
        f"uniform_ratio: {stored_ratio}; remove uniform_ratio, or set noise_process: mixed to change the noise"
    )


def with_noise_process(config: DiffusionConfig | None, finetuning_args: Any) -> DiffusionConfig | None:
    """Return the checkpoint's config with the noise process of this run.

    Raises:
        ValueError: as `resolve_noise_process`.
    """
    process, ratio = resolve_noise_process(config, finetuning_args)
    if config is None or (config.noise_process, config.uniform_ratio) == (process, ratio):
        return config
    logger.info_rank0(
        f"The checkpoint was trained with noise_process: {config.noise_process} (uniform_ratio: "
        f"{config.uniform_ratio}); this run uses {process} noise (uniform_ratio: {ratio})."
    )
    return replace(config, noise_process=process, uniform_ratio=ratio)
