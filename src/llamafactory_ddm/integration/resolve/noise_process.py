"""The noise process of a run: the YAML's, else the checkpoint's."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from ...modeling.diffusion_config import FILE_NAME, DiffusionConfig
from ...objectives import OBJECTIVES
from ..logs import get_logger

logger = get_logger(__name__)


def resolve_noise_process(config: DiffusionConfig | None, finetuning_args: Any) -> tuple[str, float]:
    """Return noise process and uniform ratio of a run.

    A checkpoint can be trained with other noise if the YAML names the process; a ratio without a process must equal
    the checkpoint's.

    Raises:
        ValueError: if the keys contradict each other or the checkpoint, naming them.
    """
    process, ratio = _process_and_ratio(config, finetuning_args.noise_process, finetuning_args.uniform_ratio)
    given = ["pad_mask_ratio"] if finetuning_args.pad_mask_ratio is not None else []
    given += ["eos_window_ratio"] if finetuning_args.eos_window_ratio else []
    if given and not OBJECTIVES.get(process).takes_eos_noise(ratio):
        raise ValueError(f"{', '.join(given)}: is not supported with noise_process: {process}; remove one of them")
    return process, ratio


def _process_and_ratio(config: DiffusionConfig | None, process: str | None, ratio: float | None) -> tuple[str, float]:
    stored = ("masked", 0.0) if config is None else (config.noise_process, config.uniform_ratio)
    if process is not None:
        default = OBJECTIVES.get(process).default_uniform_ratio
        if default is not None:
            return process, ratio if ratio is not None else stored[1] if stored[0] == process else default
        if ratio:
            raise ValueError(
                f"uniform_ratio: {ratio} needs noise_process: mixed, but that is {process}; remove uniform_ratio (on "
                "the command line uniform_ratio=null), or set noise_process: mixed"
            )
        return process, 0.0
    if ratio is None or ratio == stored[1]:
        return stored
    if config is None:
        raise ValueError(f"uniform_ratio: {ratio} has no effect without noise_process: mixed; set it too")
    raise ValueError(
        f"uniform_ratio: {ratio} contradicts the checkpoint, whose {FILE_NAME} says noise_process: {stored[0]}, "
        f"uniform_ratio: {stored[1]}; to go on under other noise set noise_process: mixed too, else remove "
        "uniform_ratio"
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
