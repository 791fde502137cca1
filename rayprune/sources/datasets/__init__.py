"""Datasets of other libraries: Hugging Face, torch, and objects that are like them."""
