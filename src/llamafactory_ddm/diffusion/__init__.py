"""The mathematics of masked diffusion: torch only, pure functions and frozen dataclasses.

`schedules`: alpha(t). `noise`: the forward process. `eos_noise`: noise that depends on where EOS is. `losses`: the
loss of one token. `loss_weights`: weights and normalisation. `likelihood`: the evidence bound on held-out text.
`attention`: the annealed attention mask. `rng`: the counter-based random generator.
"""
