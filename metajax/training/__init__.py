"""The trainer and the step: losses, optimizers, state, checkpoints."""
