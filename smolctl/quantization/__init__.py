"""`smolctl quantize`: schemes, rounding, calibration, and the measurement of what was lost."""
