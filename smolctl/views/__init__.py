"""Result objects as tables, lines and JSON. Only this package imports rich."""
