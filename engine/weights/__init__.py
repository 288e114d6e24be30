"""Weights in and out in the form of Hugging Face folders: safetensors files beside a config.json."""
