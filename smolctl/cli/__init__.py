"""The verbs: options in, one library call, one view out. The only place that imports typer."""
