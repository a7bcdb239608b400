"""LLaMA-Factory's launcher on a Ray cluster of CPUs, of which it asks more than any has: ten for each of its CPUs.

Run as a script in place of the launcher, with ten CPUs for each worker in `ray_init_kwargs`; the workers are its own.
"""

import importlib.util
import runpy

from llamafactory.train import tuner

CPUS_OF_A_WORKER = 10  # upstream's number

if __name__ == "__main__":
    of_devices = tuner.get_placement_group
    tuner.get_placement_group = lambda devices: of_devices(devices // CPUS_OF_A_WORKER)
    runpy.run_path(importlib.util.find_spec("llamafactory.launcher").origin, run_name="__main__")
