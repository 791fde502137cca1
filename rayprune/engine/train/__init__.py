"""The engine's own training loop."""
