"""The time at which a schedule keeps a given share of the tokens."""

import torch


def time_of(schedule, alpha):
    """Return t with schedule.alpha(t) = alpha, by bisection; any shape, float64."""
    low, high = torch.zeros_like(alpha), torch.ones_like(alpha)
    for _ in range(60):
        middle = (low + high) / 2
        is_early = schedule.alpha(middle) > alpha
        low, high = torch.where(is_early, middle, low), torch.where(is_early, high, middle)
    return (low + high) / 2
