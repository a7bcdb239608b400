"""The YAML keys of serving: bounds on the batch, on the queue and on the time of a request."""

from __future__ import annotations

from dataclasses import dataclass

from ...utils.keys import key


@dataclass
class ServingKeys:
    """Keys of `llamafactory-cli chat`, `api`, `webchat` and `webui`."""

    serving_rows: int = key(
        32, "Serving: largest number of sequences that are denoised in one batch; others wait.", low=1, high=4096
    )
    serving_positions: int = key(
        32768,
        "Serving: largest number of positions of all sequences in one batch, prompts included; others wait. Lower it "
        "if memory runs out.",
        low=1,
    )
    serving_queue: int = key(
        256, "Serving: largest number of sequences that wait; a request beyond it is refused (status 503).", low=1
    )
    serving_timeout: float | None = key(
        None,
        "Serving: seconds from arrival after which an unfinished request is ended (status 504). Defaults to no limit.",
        kind="number",
        low=0,
        above_low=True,
    )
