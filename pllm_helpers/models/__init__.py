"""The language model and the sentence encoder, bundled, local or from a hub; batched generation."""

from .encoder import EncodedBatch, Encoder, TokenEmbeddings, load_encoder
from .generation import Generation, generate
from .llm import LLM, load_llm

__all__ = ["EncodedBatch", "Encoder", "Generation", "LLM", "TokenEmbeddings", "generate", "load_encoder", "load_llm"]
