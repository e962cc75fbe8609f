"""The only file of the command ``rmsnorm`` that runs before torch is imported, which takes seconds: it says so.

Not in the package, since whatever is in it comes behind ``import torch``.
"""

import sys


def main() -> None:
    """The entry point. On a terminal a line says what is waited for, and is cleared again."""
    waiting = "importing torch …"
    shown = sys.stderr.isatty() and sys.argv[1:2] != ["run"]  # whose terminal is the program's own
    if shown:
        print(waiting, end="\r", file=sys.stderr, flush=True)
    from rmsnorm import cli

    if shown:
        print(" " * len(waiting), end="\r", file=sys.stderr, flush=True)
    cli.main()
