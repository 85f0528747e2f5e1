"""The door: python run.py NAME | VERB ... (see metajax/cli.py)."""

import time

STARTED = time.monotonic()

if __name__ == "__main__":
    import sys

    from metajax.cli import main

    sys.exit(main(sys.argv[1:], started=STARTED))
