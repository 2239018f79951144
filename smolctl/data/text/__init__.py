"""Files, datasets and the embedded corpus as documents."""
