"""Where a model comes from: a folder, a GGUF file, a hub id, or random numbers."""
