"""Gapless: LLM inference whose accelerator never waits for its host."""
