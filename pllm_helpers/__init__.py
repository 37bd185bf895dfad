"""Tested helpers behind the pllm notebook series on on-device LLM personalization."""

import os

__version__ = "0.1.0"

# Threads of a parallel region that wait for work sleep instead of spinning. Two notebooks on two
# cores otherwise burn each other's time slices and run several times slower. The library reads
# this once, when torch is loaded, so it is set before anything here imports torch.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
