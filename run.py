"""The door: python run.py NAME | VERB ... (see metajax/cli/main.py)."""

import time

STARTED = time.monotonic()

if __name__ == "__main__":
    import os
    import signal
    import sys

    if signal.getsignal(signal.SIGINT) is not signal.SIG_IGN:  # Ctrl-C during the imports, which takes seconds on a cold disk
        signal.signal(signal.SIGINT, lambda *_: os._exit(130))
    try:
        from metajax.cli.main import main
        from metajax.core.interrupts import leave
    except ModuleNotFoundError as error:  # another Python than the one that was set up, most likely
        print(
            f"error: {sys.executable} has no module {error.name!r}; `make quickstart` sets up .venv, `. .venv/bin/activate` makes it "
            "this terminal's python; or pip install -r requirements.txt",
            file=sys.stderr,
        )
        sys.exit(2)

    leave(main(sys.argv[1:], started=STARTED))
