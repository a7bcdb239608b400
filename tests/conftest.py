"""One thread for each process, here and in the programs that tests start: two workers share two cores."""

import os

os.environ.setdefault("OMP_NUM_THREADS", "1")  # before anything imports PyTorch
