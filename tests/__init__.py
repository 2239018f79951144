"""The tests; the folders mirror `smolctl/`."""
