"""Loading of models and adapters, with a check that no weight is missing and so initialised at random."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from .families import detect_family, raw_config
from .weights import ADAPTER_PREFIX, abbreviated, keys_of, verify_checkpoint, weight_files

_logger = logging.getLogger(__name__)
_REPORT = "LOAD REPORT"  # transformers' table of loaded weights, replaced by one line


def load_whole(auto_class: Any, **kwargs: Any) -> Any:
    """Call `auto_class.from_pretrained`, and check that the files hold every weight of the model, in its shape.

    Tied weights, and buffers that the model computes from its config, may be absent. Unexpected weights are logged in
    one line.

    Args:
        auto_class: a class of transformers, such as AutoModelForCausalLM.
        kwargs: arguments of from_pretrained, with pretrained_model_name_or_path.
    Raises:
        ValueError: if a weight is missing or of another shape, or a file is truncated, naming the folder.
    """
    name = kwargs["pretrained_model_name_or_path"]
    if Path(name).is_dir() and not kwargs.get("subfolder"):
        verify_checkpoint(name)
    with _without_report():
        model, info = auto_class.from_pretrained(
            **{"ignore_mismatched_sizes": True, **kwargs}, output_loading_info=True
        )
    buffers = dict(model.named_buffers())
    missing = sorted(key for key in info["missing_keys"] if not _follows_from_config(key, buffers.get(key)))
    mismatched = sorted(map(_describe_mismatch, info["mismatched_keys"]))
    if missing or mismatched:
        faults = [f"missing: {abbreviated(missing)}"] if missing else []
        faults += [f"wrong shape: {abbreviated(mismatched)}"] if mismatched else []
        raise ValueError(
            f"the weights in {name} do not fit the {type(model).__name__} of its config.json: {'; '.join(faults)}; "
            "copy or save the model again, with the config.json of these weights"
        )
    family = detect_family(raw_config(name))
    if info["unexpected_keys"] and family is not None:
        raise ValueError(
            f"{name} holds weights that no {family.title} has: {abbreviated(sorted(info['unexpected_keys']))}; it is "
            "another model, which this package does not know"
        )
    if info["unexpected_keys"]:
        _logger.warning(
            "%s holds weights that its %s does not have; they are not used: %s",
            name,
            type(model).__name__,
            abbreviated(sorted(info["unexpected_keys"])),
        )
    return model


def _describe_mismatch(entry: Any) -> str:
    """Describe an entry of mismatched_keys: a key with two shapes, or under transformers 4 the key alone."""
    if isinstance(entry, str):
        return entry
    key, stored, expected = entry
    return f"{key} {tuple(stored)} instead of {tuple(expected)}"


def load_whole_adapter(peft_class: Any, model: Any, folder: str | Path, **kwargs: Any) -> Any:
    """Call `peft_class.from_pretrained`, and check that the folder holds every weight of the adapter.

    Args:
        peft_class: PEFT's PeftModel.
        model: the base model.
        folder: the adapter's folder; a Hub name is loaded without the check.
        kwargs: arguments of from_pretrained.
    Raises:
        ValueError: if a weight is missing, naming the folder and the weights.
    """
    from peft import get_peft_model_state_dict

    adapter_folder = Path(folder) / (kwargs.get("subfolder") or "")
    if not adapter_folder.is_dir():
        return peft_class.from_pretrained(model, folder, **kwargs)
    stored = {key for path in weight_files(adapter_folder) for key in keys_of(path)}
    try:
        adapted = peft_class.from_pretrained(model, folder, **kwargs)
    except KeyError as error:  # PEFT looks up each weight of modules_to_save
        if error.args[0] in stored or not str(error.args[0]).startswith(ADAPTER_PREFIX):
            raise
        missing = [str(error.args[0])]
    else:
        expected = get_peft_model_state_dict(
            adapted, adapter_name=kwargs.get("adapter_name", "default"), save_embedding_layers=False
        )
        missing = sorted(expected.keys() - stored)
    if missing:
        raise ValueError(
            f"the weights of the adapter {folder} lack {abbreviated(missing)}; copy or save the adapter again, with "
            "the adapter_config.json of these weights"
        )
    return adapted


def _follows_from_config(key: str, buffer: Any) -> bool:
    """Tell whether a key is a buffer that the model computes itself: rotary angles, positions or a causal mask."""
    return buffer is not None and (not buffer.is_floating_point() or key.endswith(("inv_freq", "masked_bias")))


@contextmanager
def _without_report() -> Iterator[None]:
    """Suppress transformers' table of missing and unexpected weights within the block."""

    def is_not_report(record: logging.LogRecord) -> bool:
        return _REPORT not in str(record.msg)

    logger = logging.getLogger("transformers.modeling_utils")
    logger.addFilter(is_not_report)
    try:
        yield
    finally:
        logger.removeFilter(is_not_report)
