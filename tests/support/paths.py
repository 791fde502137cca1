"""Paths of the project's files."""

from pathlib import Path

ROOT = Path(__file__).parents[2]
GOLDEN = ROOT / "tests" / "golden"
SUPPORT = ROOT / "tests" / "support"
USER_CODE = SUPPORT / "user_code.py"
MULTI_EXIT_MODELS = SUPPORT / "multi_exit_models.py"
