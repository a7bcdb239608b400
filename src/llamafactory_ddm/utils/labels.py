"""Names that a user chose, in tables and plots."""

from __future__ import annotations


def legend_label(name: str) -> str:
    """Return a name as matplotlib shows it: a dollar starts a formula, and a leading underscore hides a curve."""
    return (" " if name.startswith("_") else "") + name.replace("$", r"\$")


def table_cell(text: str) -> str:
    """Return a text as a cell of a Markdown table: on one line, with its bars escaped."""
    return " ".join(text.split()).replace("|", r"\|")
