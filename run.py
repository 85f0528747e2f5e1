"""The door: python run.py NAME | VERB ... (see metajax/cli.py)."""

import time

STARTED = time.monotonic()

if __name__ == "__main__":
    import sys

    try:
        from metajax.cli import main
    except ModuleNotFoundError as error:  # another Python than the one that was set up, most likely
        print(
            f"error: {sys.executable} has no module {error.name!r}; `make quickstart` sets up .venv, `. .venv/bin/activate` makes it "
            "this terminal's python; or pip install -r requirements.txt",
            file=sys.stderr,
        )
        sys.exit(2)

    sys.exit(main(sys.argv[1:], started=STARTED))
