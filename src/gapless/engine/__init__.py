"""The pipeline: one loop that keeps the device fed."""
