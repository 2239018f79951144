"""`smolctl bench`: the speed and memory of a model, compared with the machine's limits and other engines."""
