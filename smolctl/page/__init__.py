"""The page that runs a model in the visitor's browser: its code, and the folder that any static host serves."""
