"""Configuration: strict YAML sections, dotted overrides, one line for every mistake."""

from rayprune.config.config import Config, load_config, load_tree, make_config

__all__ = ["Config", "load_config", "load_tree", "make_config"]
