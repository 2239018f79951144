"""Files, datasets and the built-in corpus as documents."""
