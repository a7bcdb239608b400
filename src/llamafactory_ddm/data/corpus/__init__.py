"""`llamafactory-ddm prepare-data`: makes packed blocks of tokens of parquet and JSON lines, without LLaMA-Factory."""
