"""Hugging Face folders: config.json, safetensors, tokenizer, read and written."""
