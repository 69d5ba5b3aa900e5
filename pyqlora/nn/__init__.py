"""Layers with 4-bit weights, by the names of `bitsandbytes.nn`."""

from pyqlora.nn.embedding import Embedding, Embedding4bit, EmbeddingFP4, EmbeddingNF4, StableEmbedding
from pyqlora.nn.linear4bit import Linear4bit, LinearFP4, LinearNF4
from pyqlora.nn.params4bit import Params4bit

__all__ = [
    "Embedding",
    "Embedding4bit",
    "EmbeddingFP4",
    "EmbeddingNF4",
    "Linear4bit",
    "LinearFP4",
    "LinearNF4",
    "Params4bit",
    "StableEmbedding",
]
