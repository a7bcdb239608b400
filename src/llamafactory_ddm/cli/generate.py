"""`llamafactory-ddm generate PATH`: text from a checkpoint, without a YAML."""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Callable
from dataclasses import replace
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from ..sampling import SamplingSettings

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
    parser.add_argument("--strategy", default="low_confidence", help="denoising_strategy (default: low_confidence)")
    parser.add_argument(
        "--strategy-args", type=json.loads, default={}, help="parameters of your own strategy, in JSON"
    )
    parser.add_argument("--steps", type=int, default=64, help="diffusion_steps (default: 64)")
    parser.add_argument("--commit-schedule", default="even", choices=("even", "dream"), help="pace (default: even)")
    parser.add_argument(
        "--score-distribution", default="model", choices=("model", "filtered"), help="what is scored (default: model)"
    )
    parser.add_argument("--block-length", type=int, help="tokens decided together, from left to right (default: all)")
    parser.add_argument("--temperature", type=float, default=0.95, help="0 takes the most probable (default: 0.95)")
    parser.add_argument("--top-p", type=float, default=0.9, help="nucleus mass (default: 0.9)")
    parser.add_argument("--top-k", type=int, help="most probable tokens that stay (default: all)")
    parser.add_argument("--repetition-penalty", type=float, default=1.0, help="(default: 1, none)")
    parser.add_argument("--guidance-scale", type=float, default=1.0, help="(default: 1, none)")
    parser.add_argument("--confidence-threshold", type=float, help="of this strategy (default: 0.9)")
    parser.add_argument("--entropy-bound", type=float, help="of this strategy, nats (default: 0.1)")
    parser.add_argument("--remask-cap", type=float, help="of the strategy remdm (default: 0.02)")
    parser.add_argument("--edit-ratio", type=float, help="share of tokens rewritten (default: the model's own)")
    parser.add_argument("--edit-threshold", type=float, help="probability to rewrite from (default: never)")
    parser.add_argument("--edit-steps", type=int, default=0, help="further steps of a block for edits (default: 0)")
    parser.add_argument(
        "--early-stop",
        default="eos",
        choices=("none", "eos", "predict", "grow"),
        help="what happens at the end of a text (default: eos)",
    )
    parser.add_argument("--seed", type=int, default=0, help="(default: 0)")
    return parser


def _of_strategy(arguments: argparse.Namespace) -> dict[str, Any]:
    """Return the parameters of the strategy that were given.

    Raises:
        ValueError: if one belongs to another strategy.
    """
    owners = {"confidence_threshold": "confidence_threshold", "entropy_bound": "entropy_bound", "remask_cap": "remdm"}
    given = {key: value for key in owners if (value := getattr(arguments, key)) is not None}
    for key in given:
        if arguments.strategy != owners[key]:
            raise ValueError(
                f"--{key.replace('_', '-')} is read by --strategy {owners[key]} only, but that is "
                f"{arguments.strategy}; change one or remove it"
            )
    return given


def settings_of(arguments: argparse.Namespace) -> SamplingSettings:
    """Return how to sample.

    Raises:
        ValueError: if a value is out of range, or two do not go together.
    """
    from ..sampling import LogitsConfig, SamplingSettings

    return SamplingSettings(
        denoising_strategy=arguments.strategy,
        strategy_args=arguments.strategy_args,
        diffusion_steps=arguments.steps,
        block_length=arguments.block_length,
        commit_schedule=arguments.commit_schedule,
        logits=LogitsConfig(
            temperature=arguments.temperature,
            top_p=arguments.top_p,
            top_k=arguments.top_k,
            repetition_penalty=arguments.repetition_penalty,
            guidance_scale=arguments.guidance_scale,
            score_distribution=arguments.score_distribution,
        ),
        edit_ratio=arguments.edit_ratio,
        edit_threshold=arguments.edit_threshold,
        edit_steps=arguments.edit_steps,
        early_stop=arguments.early_stop,
        seed=arguments.seed,
        **_of_strategy(arguments),
    )


def _generate(arguments: argparse.Namespace) -> None:
    from ..generation.load import load
    from ..generation.terminal import TerminalAnimation
    from ..utils.plugins import load_plugins

    load_plugins(arguments.plugins)
    settings = settings_of(arguments)
    model = load(arguments.path, template=arguments.template, raw=arguments.raw)
    settings = replace(settings, grow_length=model.settings().grow_length)
    is_watched = arguments.show and sys.stdout.isatty()
    shown: list[TerminalAnimation] = []

    def watch(step: int, pieces: Callable[[], list[list[str | None]]]) -> None:
        text = pieces()[0]
        if not shown:
            shown.append(TerminalAnimation([None] * len(text), stream=sys.stdout))
        shown[0].update(step + 1, max(step + 1, arguments.steps), text)  # edits may take further steps

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
