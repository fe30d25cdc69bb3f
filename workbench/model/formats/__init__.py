"""Checkpoints that are not safetensors folders of Hugging Face or OpenAI: GGUF, Ollama, MLX."""
