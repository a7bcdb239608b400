"""Infilling tasks: contexts with a gap, which is generated with a view of what follows it.

The `generation_kwargs` of such a task have the key `infill`, and its `doc_to_text` marks the gap: <|infill|>, or
<|infill:8|> for 8 tokens. `infill` is a Jinja template of a reference, such as "{{canonical_solution}}", whose number
of tokens is the length of the gap; or `true`, for max_gen_toks.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from lm_eval.utils import apply_template

from ..data.canvas import MARKER, split_at_markers
from ..data.text_codec import TextCodec


def take_infill(options: Mapping[str, Any]) -> tuple[bool | str, dict[str, Any]]:
    """Return the key `infill` of generation_kwargs, False if it is absent, and the other keys.

    Raises:
        ValueError: if it is neither true nor a template.
    """
    infill = options.get("infill", False)
    if not isinstance(infill, bool | str):
        raise ValueError(f"infill: {infill!r} must be true, or the template of a reference as long as the gap")
    return infill, {name: value for name, value in options.items() if name != "infill"}


def check_no_template(template: str | None) -> None:
    """Raise ValueError if a task with gaps is to be put into a template."""
    if template is not None:
        raise ValueError(
            f"template: {template} formats prompts to answer, and this task fills gaps; remove template, or leave the "
            "task out"
        )


def split_at_gap(context: str) -> tuple[str, int | None, str]:
    """Return the text before the gap, its length if the marker states one, and the text after it.

    Raises:
        ValueError: if the context does not have exactly one gap.
    """
    n_gaps = len(MARKER.findall(context))
    if n_gaps != 1:
        raise ValueError(
            f"the context has {n_gaps} gaps in place of one; mark it with <|infill|> in doc_to_text, without few-shot "
            "examples (num_fewshot: 0)"
        )
    parts = split_at_markers(context)
    at = next(number for number, part in enumerate(parts) if not isinstance(part, str))
    length = parts[at]
    before, after = ("".join(map(str, side)) for side in (parts[:at], parts[at + 1 :]))
    return before, None if length is None else int(length), after


def reference_length(infill: bool | str, document: Mapping[str, Any], codec: TextCodec) -> int | None:
    """Return the number of tokens of a document's reference, None if `infill` names none."""
    return len(codec.encode_after(apply_template(infill, document))) if isinstance(infill, str) else None
