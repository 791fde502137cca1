"""The command line: a module for each command, with what it prints."""
