"""`smolctl bench`: what a model does in a second, beside what this machine could do and what others do."""
