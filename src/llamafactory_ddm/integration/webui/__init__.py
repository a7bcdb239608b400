"""LLaMA-Factory's web pages for diffusion models: chat with live denoising, prediction, fields of the training tab.

No module here imports gradio when it is loaded; the pages are built by functions that upstream calls.
"""
