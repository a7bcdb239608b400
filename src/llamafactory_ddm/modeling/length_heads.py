"""The trained heads of two length predictors, how they are fitted, and the file of all fitted predictors.

`sampling.length_predictors` turns what the heads compute into lengths; `generation.canvas_size` runs the model.
"""

from __future__ import annotations

import copy
import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor, nn
from torch.nn import functional

from ..utils.files import replacing

FILE_NAME = "length_predictors.safetensors"
REPORT_NAME = "length_predictors.json"
FORMAT_VERSION = 1
_PREFIX = "least_margins."  # of the names of minimal thresholds in the file
_RENAMED = {"belief": "eos_cdf"}  # in files of earlier versions


def two_layers(width: int) -> nn.Sequential:
    """Return a head, width -> width / 2 -> 1."""
    return nn.Sequential(nn.Linear(width, width // 2), nn.GELU(), nn.Linear(width // 2, 1))


class LengthHeads(nn.Module):
    """A regressor on the mean hidden state of the editable positions, and a classifier of each of these states.

    Source: the published code of variable-length DiffuGPT.
    Deviates: the published classifier weighs positions after EOS ten times. Here the threshold is calibrated, which
        replaces such a weight.
    """

    def __init__(self, width: int) -> None:
        super().__init__()
        self.width = width
        self.regressor = two_layers(width)
        self.classifier = two_layers(width)

    def expected_length(self, mean: Tensor) -> Tensor:
        """Return [n] float32, the length of a text with its EOS, exp(regressor) - 1, from [n, width] mean states."""
        result: Tensor = torch.expm1(self.regressor(mean.float())[:, 0].clamp(max=_LARGEST_LOG)).clamp(min=0.0)
        return result

    def p_ended(self, hidden: Tensor) -> Tensor:
        """Return [n] float32, P(EOS is at or before a position), from [n, width] hidden states of positions."""
        result: Tensor = self.classifier(hidden.float())[:, 0].sigmoid()
        return result


_LARGEST_LOG = 20.0


def mean_hidden(hidden: Tensor, editable: Tensor) -> Tensor:
    """Return [batch, width] float32, the mean hidden state of each row.

    Args:
        hidden: [n_editable, width], states that predict the editable positions, in row-major order.
        editable: [batch, length] bool.
    """
    row = editable.nonzero()[:, 0]
    total = hidden.new_zeros(len(editable), hidden.shape[1], dtype=torch.float32).index_add_(0, row, hidden.float())
    return total / editable.sum(dim=1, keepdim=True).clamp(min=1)


@dataclass(frozen=True)
class Examples:
    """The data that heads are fitted to.

    Attributes:
        mean: [rows, width], mean hidden state of each row.
        length: [rows] int64, length of each text, EOS included.
        hidden: [n, width], hidden states at some positions of all rows.
        ended: [n] bool, whether EOS is at or before the position.
    """

    mean: Tensor
    length: Tensor
    hidden: Tensor
    ended: Tensor


def fit_heads(
    examples: Examples,
    *,
    epochs: int,
    learning_rate: float,
    seed: int,
    device: torch.device | str = "cpu",
    batch: int = 64,
) -> LengthHeads:
    """Return heads fitted with AdamW: squared error of log(1 + length), and binary cross-entropy at the positions.

    The last tenth of the rows and of the positions is held out; the weights of the best epoch on it are kept.

    Args:
        examples: on the CPU.
        epochs: passes over the rows, and over the positions.
        learning_rate: initial value; falls to 0 along a cosine.
        seed: seed of the weights and of the order.
        device: to train on.
        batch: rows of a step; a step of the classifier has 16 times as many positions.
    Raises:
        ValueError: if there are fewer than two rows.
    """
    if len(examples.length) < 2:
        raise ValueError(f"dataset holds {len(examples.length)} texts, but fit-length needs at least 2; add texts")
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed % 2**63)
        heads = LengthHeads(examples.mean.shape[1])
    heads.to(device)
    generator = torch.Generator().manual_seed(seed % 2**63)
    keys: dict[str, Any] = {
        "epochs": epochs,
        "learning_rate": learning_rate,
        "generator": generator,
        "device": device,
    }
    log_length = torch.log1p(examples.length.float())
    _fit(heads.regressor, examples.mean, log_length, functional.mse_loss, batch=batch, **keys)
    cross_entropy = functional.binary_cross_entropy_with_logits
    _fit(heads.classifier, examples.hidden, examples.ended.float(), cross_entropy, batch=16 * batch, **keys)
    return heads.cpu().eval().requires_grad_(False)


def _fit(
    head: nn.Sequential,
    inputs: Tensor,
    targets: Tensor,
    loss_of: Callable[[Tensor, Tensor], Tensor],
    *,
    epochs: int,
    learning_rate: float,
    batch: int,
    generator: torch.Generator,
    device: torch.device | str,
) -> None:
    n = len(targets) - max(1, len(targets) // 10)
    sample = inputs[:_ROWS_TO_SCALE_BY].float().to(device)
    center, scale = sample.mean(dim=0), sample.std(dim=0, correction=0).clamp(min=1e-6)
    optimiser = torch.optim.AdamW(head.parameters(), lr=learning_rate)
    scheduler = torch.optim.lr_scheduler.CosineAnnealingLR(optimiser, max(1, epochs * -(-n // batch)))

    def loss(index: Tensor | slice) -> Tensor:
        return loss_of(head((inputs[index].to(device).float() - center) / scale)[:, 0], targets[index].to(device))

    best_loss, best_state = float("inf"), copy.deepcopy(head.state_dict())
    for _ in range(epochs):
        for index in torch.randperm(n, generator=generator).split(batch):
            optimiser.zero_grad()
            loss(index).backward()  # type: ignore[no-untyped-call]
            optimiser.step()
            scheduler.step()
        with torch.no_grad():
            held_out_loss = float(loss(slice(n, None)))
        if held_out_loss < best_loss:
            best_loss, best_state = held_out_loss, copy.deepcopy(head.state_dict())
    head.load_state_dict(best_state)
    _fold_scaling(head[0], center, scale)


_ROWS_TO_SCALE_BY = 4096


@torch.no_grad()
def _fold_scaling(layer: nn.Module, center: Tensor, scale: Tensor) -> None:
    """Fold the scaling (x - center) / scale of a linear layer's input into its weights, so that it takes x."""
    if not isinstance(layer, nn.Linear):
        raise TypeError("the first layer of a head is linear")
    layer.weight.div_(scale)
    layer.bias.sub_(layer.weight @ center)


@dataclass(frozen=True)
class LengthPredictors:
    """Fitted heads, and the calibration of every predictor in `sampling.length_predictors`.

    Attributes:
        heads: on the CPU.
        min_thresholds: [n] float64 for each predictor by name, from `LengthPredictor.min_threshold`.
        canvas: length of the canvases that they were fitted on; the calibration holds for this length only.
    """

    heads: LengthHeads
    min_thresholds: dict[str, Tensor]
    canvas: int

    def save(self, folder: str | Path) -> Path:
        """Write the file into a checkpoint's folder, and return its path."""
        tensors = {f"heads.{name}": value.cpu().contiguous() for name, value in self.heads.state_dict().items()}
        tensors |= {f"{_PREFIX}{name}": value.sort().values for name, value in self.min_thresholds.items()}
        path = Path(folder) / FILE_NAME
        facts = {"format_version": FORMAT_VERSION, "width": self.heads.width, "canvas": self.canvas}
        with replacing(path, "wb") as file:
            file.write(save(tensors, {name: str(number) for name, number in facts.items()}))
        return path

    @classmethod
    def find(cls, folder: str | Path) -> LengthPredictors | None:
        """Return the predictors that are stored with a checkpoint, or None if there are none.

        Raises:
            ValueError: if the file cannot be read, naming it.
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
            canvas = int(facts["canvas"])
        except (SafetensorError, OSError, KeyError, ValueError, RuntimeError) as error:
            raise ValueError(
                f"{path} cannot be read ({json.dumps(str(error)[:200])}); remove it, or make it again with "
                "llamafactory-ddm fit-length"
            ) from error
        thresholds = {_RENAMED.get(name, name): value for name, value in _under(tensors, _PREFIX).items()}
        return cls(heads.eval().requires_grad_(False), thresholds, canvas)


def _under(tensors: dict[str, Tensor], prefix: str) -> dict[str, Tensor]:
    return {name.removeprefix(prefix): value for name, value in tensors.items() if name.startswith(prefix)}
