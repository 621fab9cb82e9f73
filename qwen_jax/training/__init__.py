"""Training: the loss, stacks of layers, and the step, as pure functions that a loop calls."""
