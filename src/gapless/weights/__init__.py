"""Where a model comes from: a folder, a GGUF file, a hub id, or random numbers."""

from gapless.weights.hf_config import SHAPES, load_shape, parse_config
from gapless.weights.names import weight_shapes
from gapless.weights.random import random_weights
from gapless.weights.source import ModelSource, open_weights, resolve_model

__all__ = [
    "SHAPES",
    "ModelSource",
    "load_shape",
    "open_weights",
    "parse_config",
    "random_weights",
    "resolve_model",
    "weight_shapes",
]
