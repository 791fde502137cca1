"""`python -m rayprune` is the command line."""

from rayprune.cli.main import main

if __name__ == "__main__":
    main()
