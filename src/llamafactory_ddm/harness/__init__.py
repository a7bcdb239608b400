"""Evaluation on lm-evaluation-harness: keys, model type, scoring, results on disk, table."""
