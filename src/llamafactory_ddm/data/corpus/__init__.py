"""`llamafactory-ddm prepare-data`: turns parquet and JSON lines into packed blocks of tokens, without LLaMA-Factory."""
