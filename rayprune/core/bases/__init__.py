"""Base classes of the methods: by kind, and by what they read."""
