"""Documents as token ids on disk."""
