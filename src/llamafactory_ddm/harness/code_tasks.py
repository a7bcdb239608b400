"""Metrics of tasks whose generated programs run: pass@1 in the sandbox, not by the metric that the harness loads."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from .sandbox import run_program


def humaneval(document: Mapping[str, Any], results: Sequence[str]) -> dict[str, float]:
    """Return whether the prompt with its completion passes the tests of HumanEval (Chen et al. 2021)."""
    return _passes(f"{document['prompt']}{results[0]}\n{_check(document)}")


def humaneval_infilling(document: Mapping[str, Any], results: Sequence[str]) -> dict[str, float]:
    """Return whether a program with its gap filled passes the tests of HumanEval (Bavarian et al. 2022)."""
    return _passes(f"{document['prompt']}{results[0]}{document['suffix']}\n{_check(document)}")


def mbpp(document: Mapping[str, Any], results: Sequence[str]) -> dict[str, float]:
    """Return whether a program passes the three tests of MBPP (Austin et al. 2021)."""
    setup = document.get("test_setup_code") or ""
    return _passes("\n".join((results[0], setup, *document["test_list"])))


def _check(document: Mapping[str, Any]) -> str:
    return f"{document['test']}\ncheck({document['entry_point']})"


def _passes(program: str) -> dict[str, float]:
    return {"pass@1": float(run_program(program).has_passed)}
