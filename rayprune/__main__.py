"""`python -m rayprune` is the command line."""

import os
import sys

if __name__ == "__main__":
    # Python has put the current folder first: a file in it, such as matplotlib.py, would hide a library.
    if not sys.flags.safe_path and (sys.path[0] == "" or sys.path[0] == os.getcwd()):  # noqa: PTH109  # starts faster
        del sys.path[0]

    from rayprune.cli.main import main

    main()
