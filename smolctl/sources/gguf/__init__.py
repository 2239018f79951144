"""GGUF files: header, blocks, model and tokenizer, read and written."""
