"""`smolctl train` and `resume`: the plan, the training loop, checkpoints, optimizers and loggers."""
