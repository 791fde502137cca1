"""The exceptions of rayprune."""
