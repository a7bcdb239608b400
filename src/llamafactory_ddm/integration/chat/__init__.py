"""Chat, API and web chat of diffusion models, in place of LLaMA-Factory's autoregressive engine."""
