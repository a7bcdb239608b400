"""`llamafactory-ddm convert IN OUT`: convert published checkpoints to Hugging Face folders, and back."""

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
  llamafactory-ddm convert saves/qwen3-4b/full/ddm sdar-mine --published sdar
"""


def main(argv: list[str]) -> int:
    """Run the command; returns the exit status."""
    parser = argparse.ArgumentParser(
        prog="llamafactory-ddm convert",
        description="Convert a published diffusion checkpoint (DiffuGPT, DiffuLLaMA, its LoRA adapters, LLaDA, Dream, "
        "SDAR) to an ordinary Hugging Face folder with diffusion_config.json.",
        epilog=EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("source", metavar="IN", help="folder of the checkpoint")
    parser.add_argument("target", metavar="OUT", nargs="?", help="folder to write; it must not exist")
    parser.add_argument("--base", help="model that IN was trained from, for its config and a missing tokenizer")
    parser.add_argument(
        "--published",
        metavar="FAMILY",
        nargs="?",
        const=True,
        default=False,
        help="convert back, to the published layout: of FAMILY (llada, Dream, sdar), by default of the one that fits",
    )
    parser.add_argument("--mask-token", help="token or id used as [MASK] (default: the published model's)")
    parser.add_argument("--sep-token", help="token or id between prompt and response (default: the published model's)")
    parser.add_argument("--pad-token", help="token or id of padding (default: the published model's)")
    parser.add_argument("--no-shift", action="store_true", help="logits at position i predict token i, not i + 1")
    parser.add_argument("--plugins", help="modules or .py files that register IN's noise schedule or process")
    arguments = parser.parse_intermixed_args(argv)
    if arguments.target is None and arguments.published in argv:  # `--published IN OUT`
        arguments.source, arguments.target = sorted((arguments.source, arguments.published), key=argv.index)
        arguments.published = True
    if arguments.target is None:
        parser.error("the following arguments are required: OUT")
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
        key = "adapter_name_or_path" if is_adapter else "model_name_or_path"
        print(f"{arguments.target} is ready: set {key} to it")
    else:
        use = "" if is_adapter else "set checkpoint_dir to it and model_name_or_path to its base, or "
        print(f"{arguments.target} is ready, in the layout of {layout.name}; to use it here, {use}convert it back")
    return 0
