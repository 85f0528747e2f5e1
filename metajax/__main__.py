"""`python -m metajax`, and the installed command `metajax`."""

import os
import signal


def command() -> None:
    """Run the command line; Ctrl-C during the imports, which take seconds on a cold disk, leaves without a traceback."""
    if signal.getsignal(signal.SIGINT) is not signal.SIG_IGN:
        signal.signal(signal.SIGINT, lambda *_: os._exit(130))
    from metajax.cli.main import command

    command()


if __name__ == "__main__":
    command()
