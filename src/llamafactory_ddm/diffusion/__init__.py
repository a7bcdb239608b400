"""The mathematics of masked diffusion: torch only, pure functions and frozen dataclasses.

`schedules` how many tokens are kept at time t · `noise` the corruption and its keyed randomness · `objectives` the
losses and the
evidence bound · `attention` the annealed mask · `philox` the counter-based generator beneath it all.
"""
