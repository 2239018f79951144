"""The commands: options in, one library call, one view out. Only this package imports typer."""
