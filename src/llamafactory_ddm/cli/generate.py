"""`llamafactory-ddm generate PATH`: generate texts with a model, without a YAML."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable
from typing import Any

from ..sampling import SamplingSettings
from ..sampling.keywords import with_keywords
from ..sampling.settings import KEYS

# Key -> its short name on the command line.
_SHORT_NAMES = {
    "denoising_strategy": "strategy",
    "diffusion_steps": "steps",
    "logits_temp": "temperature",
    "topp_temp": "top_p",
}

EPILOG = """examples:
  llamafactory-ddm generate saves/tiny_gpt2/full/ddm --show
  llamafactory-ddm generate saves/tiny_gpt2/full/ddm --prompt "Tom saw a small" --block-length 8
  llamafactory-ddm generate saves/tiny_gpt2/full/ddm --infill "Tom saw a small<|infill:2|> in the forest."
"""


def main(argv: list[str]) -> int:
    """Run the command; returns the exit status."""
    arguments = _parser().parse_args(argv)
    # Importing the libraries takes seconds, and transformers' log lines are off.
    print(f"llamafactory-ddm generate: loading {arguments.path} ...", file=sys.stderr, flush=True)
    from transformers.utils import logging

    from ..modeling.bidirectional import NotBidirectionalError

    logging.disable_progress_bar()
    logging.set_verbosity_error()
    try:
        _generate(arguments)
    except (ValueError, OSError, NotBidirectionalError) as error:
        print(f"llamafactory-ddm generate: {error}", file=sys.stderr)
        return 1
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="llamafactory-ddm generate",
        description="Generate text with a diffusion model.",
        epilog=EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("path", help="folder of a model of stage: ddm or ddm-sft, or of a LLaDA, Dream or SDAR")
    source = parser.add_mutually_exclusive_group()
    source.add_argument("--prompt", action="append", help="text to answer or continue; may be repeated")
    source.add_argument(
        "--infill", action="append", help="text with gaps to fill, <|infill:8|> for one of 8 tokens; may be repeated"
    )
    template = parser.add_mutually_exclusive_group()
    template.add_argument(
        "--template", help="template of prompts (default: the one that the model was finetuned with)"
    )
    template.add_argument("--raw", action="store_true", help="continue prompts without a template")
    parser.add_argument("--plugins", help="your own modules or .py files to import first, separated by commas")
    parser.add_argument("--show", action="store_true", help="show every denoising step in the terminal")
    parser.add_argument("--max-new-tokens", type=int, default=64, help="tokens to generate (default: 64)")
    parser.add_argument("--num-samples", type=int, default=1, help="texts per prompt, or from noise (default: 1)")
    settings = parser.add_argument_group("sampling", "The YAML keys of generation; see docs/keys.md.")
    for name, key in KEYS.items():
        names = [name] if name not in _SHORT_NAMES else [_SHORT_NAMES[name], name]
        default = "" if key.default is None else f" (default: {str(key.default).lower()})"
        value: dict[str, Any] = {"action": "store_true"} if key.kind == "boolean" else {"metavar": key.kind.upper()}
        settings.add_argument(
            *(f"--{option.replace('_', '-')}" for option in names),
            dest=name,
            default=argparse.SUPPRESS,
            help=f"{key.help}{default}".replace("%", "%%"),
            **value,
        )
    return parser


def build_settings(arguments: argparse.Namespace) -> SamplingSettings:
    """Return the sampling settings without suppress_tokens, which needs the tokenizer.

    Raises:
        ValueError: if a value is out of range, or two contradict each other.
    """
    keys = _sampling_keys(arguments)
    keys.pop("suppress_tokens", None)
    return with_keywords(SamplingSettings(), keys)


def _sampling_keys(arguments: argparse.Namespace) -> dict[str, Any]:
    """Return the sampling keys that the command line sets, with their values."""
    return {name: getattr(arguments, name) for name in KEYS if hasattr(arguments, name)}


def _generate(arguments: argparse.Namespace) -> None:
    from ..generation.load import load
    from ..generation.terminal import TerminalAnimation
    from ..utils.plugins import load_plugins

    load_plugins(arguments.plugins)
    build_settings(arguments)  # reports mistakes before the model is loaded
    model = load(arguments.path, template=arguments.template, raw=arguments.raw)
    settings = model.settings(**_sampling_keys(arguments))
    is_animated = arguments.show and sys.stdout.isatty()
    steps = 0
    if is_animated:
        canvases = model.canvases(arguments.prompt, arguments.infill, arguments.max_new_tokens)
        steps = model.max_steps(canvases, settings)
    animations: list[TerminalAnimation] = []  # of the current text, if any

    def show_step(step: int, pieces: Callable[[], list[list[str | None]]]) -> None:
        text = pieces()[0]
        if not animations:
            animations.append(TerminalAnimation([None] * len(text), stream=sys.stdout))
        animations[0].update(step + 1, max(step + 1, steps), text)  # editing may add steps

    texts = model.stream(
        arguments.prompt,
        infill=arguments.infill,
        max_new_tokens=arguments.max_new_tokens,
        num_samples=arguments.num_samples,
        batch_size=1 if arguments.show else 8,
        settings=settings,
        callback=show_step if is_animated else None,
    )
    is_single = arguments.num_samples * len(arguments.prompt or arguments.infill or "?") == 1
    try:
        for result in texts:
            if animations:  # the last frame shows the text
                animations.pop().close(result.text)
                continue
            text = (result.predict if arguments.infill is None else result.text).strip()
            print(text if is_single else f"- {text}", flush=True)
    finally:
        for animation in animations:  # restores the terminal after an error
            animation.close()


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
