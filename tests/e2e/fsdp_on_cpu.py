"""LLaMA-Factory's launcher with FSDP on CPUs: accelerate shards on accelerators alone, and elsewhere drops its plugin.

Run as a script in place of the launcher. It makes the assignments that accelerate makes for GPUs; what shards, gathers
and reduces after them is accelerate's and PyTorch's own code, over gloo.
"""

import functools
import importlib.util
import runpy

import torch
from accelerate.state import AcceleratorState, PartialState
from accelerate.utils import DistributedType
from torch.distributed.fsdp import CPUOffloadPolicy


def enable():
    """Let an `AcceleratorState` of several CPU processes keep the FSDP plugin that it is given."""
    original = AcceleratorState.__init__

    @functools.wraps(original)
    def init(self, *args, fsdp_plugin=None, **kwargs):
        original(self, *args, fsdp_plugin=fsdp_plugin, **kwargs)
        if fsdp_plugin is not None and self.distributed_type == DistributedType.MULTI_CPU:
            shared = {"distributed_type": DistributedType.FSDP, "device": torch.device("cpu")}  # not cpu:0
            vars(self).update(shared)
            PartialState._shared_state.update(shared)
            if self._mixed_precision != "no":
                fsdp_plugin.set_mixed_precision(self._mixed_precision)
            if isinstance(fsdp_plugin.cpu_offload, CPUOffloadPolicy):
                fsdp_plugin.cpu_offload = CPUOffloadPolicy(pin_memory=False)  # only a GPU's driver pins memory
                print("FSDP offloads to the host")
            self.fsdp_plugin = fsdp_plugin

    AcceleratorState.__init__ = init


if __name__ == "__main__":
    enable()
    runpy.run_path(importlib.util.find_spec("llamafactory.launcher").origin, run_name="__main__")
