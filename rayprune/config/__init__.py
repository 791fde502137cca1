"""The configuration of runs: strict YAML sections, dotted overrides, one line for every mistake."""

from rayprune.config.config import Config, make_config, read_config
from rayprune.config.naming import load_config

__all__ = ["Config", "load_config", "make_config", "read_config"]
