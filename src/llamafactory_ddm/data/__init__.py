"""Sequence formats and collators."""
