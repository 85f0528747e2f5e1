"""`python -m metajax` is the command."""

import sys

from metajax.cli import command

if __name__ == "__main__":
    sys.exit(command())
