"""Training: one accelerate loop, its data, its losses and its checkpoints."""
