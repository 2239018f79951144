"""The page that runs a model in the visitor's browser: its code, and the folder for any static host."""
