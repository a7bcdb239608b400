"""What a device would have to do, counted without one: operations, memory traffic, waits of the host, float64."""

from __future__ import annotations

import traceback
from collections import Counter
from functools import wraps

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

# Reads only the entries that it selects.
_SELECTS = {torch.ops.aten.gather.default, torch.ops.aten.index_select.default, torch.ops.aten.searchsorted.Tensor}
_WAITS = {
    torch.ops.aten._local_scalar_dense.default,
    torch.ops.aten.equal.default,
    torch.ops.aten.nonzero.default,
    torch.ops.aten.masked_select.default,
    torch.ops.aten.bincount.default,
    torch.ops.aten._unique2.default,
    torch.ops.aten.repeat_interleave.Tensor,
}


def _bytes(values):
    return sum(value.numel() * value.element_size() for value in values)


class Cost(TorchDispatchMode):
    """Counts operations and the bytes that they read and write; views are free."""

    def __init__(self):
        super().__init__()
        self.operations, self.n_bytes = Counter(), 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        if not function.is_view:
            read = [value for value in tree_leaves((args, kwargs)) if isinstance(value, Tensor)]
            written = [value for value in tree_leaves(result) if isinstance(value, Tensor)]
            if function in _SELECTS:
                read = [*read[1:], *written]
            self.operations[str(function)] += 1
            self.n_bytes += _bytes(read) + _bytes(written)
        return result


class Waits(TorchDispatchMode):
    """Records where the host reads a value, or where a shape depends on values: there it would wait for the device.

    Attributes:
        places: file and line of each wait, from the package's own code.
    """

    def __init__(self, monkeypatch):
        super().__init__()
        self.places, self._on_host = [], 0
        for name in ("tolist", "numpy", "cpu"):
            monkeypatch.setattr(Tensor, name, self._recording(getattr(Tensor, name)))
        made, copied = torch.tensor, self._recording(torch.tensor)
        # Numbers of the host are copied to the device, and `torch.tensor` waits for that.
        monkeypatch.setattr(
            torch, "tensor", lambda *args, **rest: (copied if "device" in rest else made)(*args, **rest)
        )

    def _recording(self, plain):
        def call(tensor, *args, **kwargs):
            self._note()
            return plain(tensor, *args, **kwargs)

        return call

    def on_host(self, function):
        """Return `function` with its waits not recorded, as it works on tensors of the CPU on any device."""

        @wraps(function)
        def call(*args, **kwargs):
            self._on_host += 1
            try:
                return function(*args, **kwargs)
            finally:
                self._on_host -= 1

        return call

    def _note(self):
        if self._on_host:
            return
        frames = [frame for frame in traceback.extract_stack() if "llamafactory_ddm" in frame.filename]
        self.places.append(f"{frames[-1].filename.rsplit('/', 1)[-1]}:{frames[-1].lineno}" if frames else "elsewhere")

    def take(self):
        """Return the places since the last call."""
        places, self.places = self.places, []
        return places

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        is_masking = function.overloadpacket in (torch.ops.aten.index, torch.ops.aten.index_put_) and any(
            isinstance(index, Tensor) and index.dtype == torch.bool for index in args[1]
        )
        if function in _WAITS or is_masking:
            self._note()
        return function(*args, **(kwargs or {}))


class NoFloat64(TorchDispatchMode):
    """Refuses float64, as devices without it do."""

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        if any(isinstance(value, Tensor) and value.dtype == torch.float64 for value in tree_leaves(result)):
            raise TypeError(f"{function} makes float64, which this device does not have")
        return result
