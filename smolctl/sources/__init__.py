"""The MODEL argument of every command."""
