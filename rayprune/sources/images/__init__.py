"""Encoded images, and folders of them."""
