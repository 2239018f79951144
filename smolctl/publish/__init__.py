"""From a run to the Hub: the files to upload, the checks, and the Space that shows the model."""
