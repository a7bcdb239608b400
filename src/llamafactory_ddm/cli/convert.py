"""`llamafactory-ddm convert IN OUT`: published checkpoints into ordinary folders, and back."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

EPILOG = """examples:
  llamafactory-ddm convert downloads/diffugpt-m saves/diffugpt-m --base gpt2-medium
  llamafactory-ddm convert downloads/diffullama saves/diffullama
  llamafactory-ddm convert downloads/LLaDA-8B-Instruct saves/llada-8b-instruct
  llamafactory-ddm convert downloads/diffullama-gsm saves/diffullama-gsm --base saves/diffullama
  llamafactory-ddm convert saves/gpt2-medium/full/ddm diffugpt-mine --published
"""


def main(words: list[str]) -> int:
    """Run the command; returns the exit status."""
    parser = argparse.ArgumentParser(
        prog="llamafactory-ddm convert",
        description="Turn a published diffusion checkpoint (DiffuGPT, DiffuLLaMA, its LoRA adapters, LLaDA, Dream) "
        "into an ordinary Hugging Face folder with diffusion_config.json.",
        epilog=EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("source", metavar="IN", help="folder of the checkpoint")
    parser.add_argument("target", metavar="OUT", help="folder to write; it must not exist")
    parser.add_argument("--base", help="the model it was trained from: its config, and the tokenizer that IN lacks")
    parser.add_argument("--published", action="store_true", help="the other way: write the published names")
    parser.add_argument("--mask-token", help="spelling or id of [MASK] (default: the published model's)")
    parser.add_argument("--sep-token", help="of the token between prompt and response (default: the same)")
    parser.add_argument("--pad-token", help="of padding (default: the same)")
    parser.add_argument("--no-shift", action="store_true", help="logits at i predict token i")
    parser.add_argument("--plugins", help="modules or .py files that register IN's noise schedule or process")
    arguments = parser.parse_args(words)
    from transformers.utils import logging

    from ..checkpoints.adapters import ADAPTER_CONFIG
    from ..checkpoints.convert import convert
    from ..checkpoints.layouts import unreadable_layout
    from ..utils.plugins import load_plugins

    logging.set_verbosity_error()
    try:
        load_plugins(arguments.plugins)
        convert(
            arguments.source,
            arguments.target,
            base=arguments.base,
            to_published=arguments.published,
            mask_token=arguments.mask_token,
            sep_token=arguments.sep_token,
            pad_token=arguments.pad_token,
            shift=not arguments.no_shift,
        )
    except (ValueError, OSError) as error:
        print(f"llamafactory-ddm convert: {error}", file=sys.stderr)
        return 1
    layout = unreadable_layout(arguments.target)
    is_adapter = (Path(arguments.target) / ADAPTER_CONFIG).is_file()
    if layout is None:
        print(f"{arguments.target} is ready: use it as model_name_or_path (an adapter as adapter_name_or_path)")
    else:
        print(
            f"{arguments.target} is ready, in the layout of {layout.name}; to use it here, name it as checkpoint_dir "
            "with its base as model_name_or_path, or convert it back"
            if not is_adapter
            else f"{arguments.target} is ready, in the layout of {layout.name}; to use it here, convert it back"
        )
    return 0
