"""`python -m metajax` is the command."""

from metajax.cli import command

if __name__ == "__main__":
    command()
