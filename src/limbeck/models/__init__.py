"""Hugging Face models: what is known of them, how they are loaded, read and spoken with."""
