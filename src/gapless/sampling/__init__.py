"""From logits to tokens on the device: filters and counter-based random numbers."""
