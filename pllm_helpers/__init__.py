"""Tested helpers behind the pllm notebook series on on-device LLM personalization."""

__version__ = "0.1.0"
