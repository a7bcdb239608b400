"""Two small heads on a frozen model that predict how long a text will be, and the file that keeps them."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.nn import functional

FILE_NAME = "length_predictors.safetensors"
REPORT_NAME = "length_predictors.json"
FORMAT_VERSION = 1


def two_layers(width: int) -> nn.Sequential:
    """Return a head, width -> width / 2 -> 1."""
    return nn.Sequential(nn.Linear(width, width // 2), nn.GELU(), nn.Linear(width // 2, 1))


class LengthHeads(nn.Module):
    """A regressor on the mean hidden state of the places to be written, and a classifier of each of these states.

    Source: the published code of variable-length DiffuGPT.
    Deviates: its classifier weighs the places behind the end ten times. Here the threshold is calibrated, which makes
        up for any such weight.
    """

    def __init__(self, width: int) -> None:
        super().__init__()
        self.width = width
        self.regressor = two_layers(width)
        self.classifier = two_layers(width)

    def expected_places(self, mean: Tensor) -> Tensor:
        """Return [n] float32, places of a text with its end, from [n, width] mean hidden states."""
        result: Tensor = torch.expm1(self.regressor(mean.float())[:, 0].clamp(max=_LARGEST_LOG)).clamp(min=0.0)
        return result

    def behind(self, hidden: Tensor) -> Tensor:
        """Return [n] float32, the probability that the text has ended by a place, from [n, width] hidden states."""
        result: Tensor = self.classifier(hidden.float())[:, 0].sigmoid()
        return result


_LARGEST_LOG = 20.0


def mean_hidden(hidden: Tensor, editable: Tensor) -> Tensor:
    """Return [batch, width] float32, the mean of each row's states.

    Args:
        hidden: [n_editable, width], states that predict the editable places, in row-major order.
        editable: [batch, length] bool.
    """
    row = editable.nonzero()[:, 0]
    total = hidden.new_zeros(len(editable), hidden.shape[1], dtype=torch.float32).index_add_(0, row, hidden.float())
    return total / editable.sum(dim=1, keepdim=True).clamp(min=1)


@dataclass(frozen=True)
class Examples:
    """What heads are fitted to.

    Attributes:
        mean: [rows, width], mean hidden state of each row.
        places: [rows] int64, places that its text needs, the end included.
        hidden: [n, width], hidden states of some places of all rows.
        behind: [n] bool, whether a place holds the end or lies behind it.
    """

    mean: Tensor
    places: Tensor
    hidden: Tensor
    behind: Tensor


def fit_heads(examples: Examples, *, epochs: int, learning_rate: float, seed: int, batch: int = 256) -> LengthHeads:
    """Return heads fitted by AdamW: squared error of log(1 + places), and binary cross-entropy of the places.

    Args:
        examples: on the device to train on.
        epochs: over the rows, and over the places.
        learning_rate: falls to 0 along a cosine.
        seed: of the weights and of the order.
        batch: rows, and places times 16, of a step.
    Raises:
        ValueError: if there is no row.
    """
    if not len(examples.places):
        raise ValueError("there is no text to fit the length predictors to")
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed % 2**63)
        heads = LengthHeads(examples.mean.shape[1])
    heads.to(examples.mean.device)
    generator = torch.Generator().manual_seed(seed % 2**63)
    target = torch.log1p(examples.places.float())

    def of_rows(chosen: Tensor) -> Tensor:
        return functional.mse_loss(heads.regressor(examples.mean[chosen].float())[:, 0], target[chosen])

    def of_places(chosen: Tensor) -> Tensor:
        found = heads.classifier(examples.hidden[chosen].float())[:, 0]
        return functional.binary_cross_entropy_with_logits(found, examples.behind[chosen].float())

    for part, loss_of, n, size in (
        (heads.regressor, of_rows, len(target), batch),
        (heads.classifier, of_places, len(examples.behind), 16 * batch),
    ):
        steps = max(1, epochs * -(-n // size))
        optimiser = torch.optim.AdamW(part.parameters(), lr=learning_rate)
        pace = torch.optim.lr_scheduler.CosineAnnealingLR(optimiser, steps)
        for _ in range(epochs):
            for chosen in torch.randperm(n, generator=generator).split(size):
                loss = loss_of(chosen.to(target.device))
                optimiser.zero_grad()
                loss.backward()
                optimiser.step()
                pace.step()
    return heads.eval().requires_grad_(False)


@dataclass(frozen=True)
class LengthPredictors:
    """Fitted heads, with what calibrates every predictor of `sampling.length`.

    Attributes:
        heads: on the CPU.
        least_margins: of each predictor by name, [n] float64, see `LengthPredictor.least_margin`.
    """

    heads: LengthHeads
    least_margins: dict[str, Tensor]

    def save(self, folder: str | Path) -> Path:
        """Write the file beside a checkpoint, and return its path."""
        tensors = {f"heads.{name}": value.cpu().contiguous() for name, value in self.heads.state_dict().items()}
        tensors |= {f"least_margins.{name}": value.sort().values for name, value in self.least_margins.items()}
        path = Path(folder) / FILE_NAME
        scratch = path.with_suffix(".tmp")
        save_file(tensors, scratch, {"format_version": str(FORMAT_VERSION), "width": str(self.heads.width)})
        scratch.replace(path)
        return path

    @classmethod
    def find(cls, folder: str | Path) -> LengthPredictors | None:
        """Return what lies beside a checkpoint, or None if there is nothing.

        Raises:
            ValueError: naming the file, if it cannot be read.
        """
        path = Path(folder) / FILE_NAME
        if not path.is_file():
            return None
        try:
            with safe_open(path, framework="pt") as file:
                facts: dict[str, Any] = file.metadata() or {}
                tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
            if int(facts["format_version"]) > FORMAT_VERSION:
                raise ValueError(f"format_version {facts['format_version']}; upgrade llamafactory-ddm")
            heads = LengthHeads(int(facts["width"]))
            heads.load_state_dict(_under(tensors, "heads."))
        except (SafetensorError, OSError, KeyError, ValueError, RuntimeError) as error:
            raise ValueError(
                f"{path} cannot be read ({json.dumps(str(error)[:200])}); remove it, or make it anew with "
                "llamafactory-ddm fit-length"
            ) from error
        return cls(heads.eval().requires_grad_(False), _under(tensors, "least_margins."))


def _under(tensors: dict[str, Tensor], prefix: str) -> dict[str, Tensor]:
    return {name.removeprefix(prefix): value for name, value in tensors.items() if name.startswith(prefix)}
