"""`python -m metajax` is the command."""

from metajax.cli.main import command

if __name__ == "__main__":
    command()
