"""Evaluation on lm-evaluation-harness: its model type, tasks, tables and plots."""
