"""`llamafactory-ddm generate PATH`: text from a checkpoint, without a YAML."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable
from typing import Any

from ..sampling import SamplingSettings
from ..sampling.keywords import with_keywords
from ..sampling.settings import KEYS

# Names of keys -> shorter ones, or those of the field.
_SHORT = {
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


def main(words: list[str]) -> int:
    """Run the command; returns the exit status."""
    arguments = _parser().parse_args(words)
    # The libraries alone take seconds, and transformers' own lines are switched off.
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
    parser.add_argument("path", help="folder of a model that stage: ddm has saved; or a LLaDA or Dream")
    source = parser.add_mutually_exclusive_group()
    source.add_argument("--prompt", action="append", help="a text to answer or continue; may be given several times")
    source.add_argument("--infill", action="append", help="a text with gaps, <|infill:8|> for one of 8 tokens")
    form = parser.add_mutually_exclusive_group()
    form.add_argument("--template", help="how prompts are written (default: as the model was finetuned)")
    form.add_argument("--raw", action="store_true", help="continue prompts as they stand, without a template")
    parser.add_argument("--plugins", help="modules or .py files of your own to import first, separated by commas")
    parser.add_argument("--show", action="store_true", help="watch the text come about")
    parser.add_argument("--max-new-tokens", type=int, default=64, help="tokens to write (default: 64)")
    parser.add_argument("--num-samples", type=int, default=1, help="texts from noise, or for each prompt (default: 1)")
    settings = parser.add_argument_group("sampling", "The keys of a YAML; docs/keys.md has them all.")
    for name, key in KEYS.items():
        words = [f"--{word.replace('_', '-')}" for word in (_SHORT.get(name), name) if word is not None]
        default = "" if key.default is None else f" (default: {str(key.default).lower()})"
        takes: dict[str, Any] = {"action": "store_true"} if key.kind == "boolean" else {"metavar": key.kind.upper()}
        settings.add_argument(
            *words, dest=name, default=argparse.SUPPRESS, help=f"{key.help}{default}".replace("%", "%%"), **takes
        )
    return parser


def settings_of(arguments: argparse.Namespace) -> SamplingSettings:
    """Return how to sample; suppress_tokens takes a tokenizer and is left out.

    Raises:
        ValueError: if a value is out of range, or two do not go together.
    """
    given = _given(arguments)
    given.pop("suppress_tokens", None)
    return with_keywords(SamplingSettings(), given)


def _given(arguments: argparse.Namespace) -> dict[str, Any]:
    """Return the keys that the command line gives."""
    return {name: getattr(arguments, name) for name in KEYS if hasattr(arguments, name)}


def _generate(arguments: argparse.Namespace) -> None:
    from ..generation.load import load
    from ..generation.terminal import TerminalAnimation
    from ..utils.plugins import load_plugins

    load_plugins(arguments.plugins)
    settings_of(arguments)  # a mistake is found before the model is loaded
    model = load(arguments.path, template=arguments.template, raw=arguments.raw)
    settings = model.settings(**_given(arguments))
    is_watched = arguments.show and sys.stdout.isatty()
    shown: list[TerminalAnimation] = []

    def watch(step: int, pieces: Callable[[], list[list[str | None]]]) -> None:
        text = pieces()[0]
        if not shown:
            shown.append(TerminalAnimation([None] * len(text), stream=sys.stdout))
        shown[0].update(step + 1, max(step + 1, settings.diffusion_steps), text)  # edits may take further steps

    texts = model.stream(
        arguments.prompt,
        infill=arguments.infill,
        max_new_tokens=arguments.max_new_tokens,
        num_samples=arguments.num_samples,
        batch_size=1 if arguments.show else 8,
        settings=settings,
        callback=watch if is_watched else None,
    )
    is_alone = arguments.num_samples * len(arguments.prompt or arguments.infill or "?") == 1
    try:
        for result in texts:
            if shown:  # what was watched stays on the screen
                shown.pop().close(result.text)
                continue
            text = (result.predict if arguments.infill is None else result.text).strip()
            print(text if is_alone else f"- {text}", flush=True)
    finally:
        for animation in shown:  # the terminal is itself again, whatever happened
            animation.close()


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
