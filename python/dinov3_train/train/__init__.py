"""The training loop: networks, one step, state, optimiser, checkpoints, distribution."""
