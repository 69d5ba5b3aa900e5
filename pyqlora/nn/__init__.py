"""Layers with 4-bit weights, by the names of `bitsandbytes.nn`."""

from pyqlora.nn.linear4bit import Linear4bit, LinearFP4, LinearNF4
from pyqlora.nn.params4bit import Params4bit

__all__ = ["Linear4bit", "LinearFP4", "LinearNF4", "Params4bit"]
