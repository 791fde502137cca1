"""The selection core: NumPy only, without Ray, torch or I/O."""

from rayprune.core.plan import Plan
from rayprune.core.schedule import Schedule
from rayprune.core.selection import Selection
from rayprune.core.selector import Selector
from rayprune.core.table import ScoreTable

__all__ = ["Plan", "Schedule", "ScoreTable", "Selection", "Selector"]
