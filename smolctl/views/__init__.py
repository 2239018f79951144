"""Result objects as tables, lines and JSON. The only place that imports rich."""
