"""From a run to the Hub: what goes up, what is checked, and the Space that shows it."""
