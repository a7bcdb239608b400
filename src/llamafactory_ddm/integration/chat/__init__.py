"""Serving through LLaMA-Factory's own commands: its engine, and its API."""
