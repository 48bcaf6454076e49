"""The program in this process, and a shape that runs in no time."""

from cli.conftest import gapless, model

__all__ = ["gapless", "model"]
