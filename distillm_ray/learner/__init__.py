"""Steps of the optimizer: the DeepSpeed engine, the loop around it, checkpoints and validation."""
