"""What all routes have in common: errors, keys, limits, bodies and event streams."""
