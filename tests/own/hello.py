"""A verb."""

from metajax.cli.verb import verb
from metajax.core.progress import echo


@verb("hello")
def hello(options, started):
    """Greets.

    python run.py hello
    """
    echo("hello")
