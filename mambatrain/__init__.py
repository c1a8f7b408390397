"""Train Mamba language models from raw text to open safetensors weights."""

__version__ = "0.1.0"
