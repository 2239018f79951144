"""The C engine: its sources, their compilation, and the loading of the build for this processor."""
