"""The only file that runs an unmodified program after ``rmsnorm.install()``, as ``python script.py`` would.

It needs no other package, and adds nothing to a traceback of the program's own.
"""

from __future__ import annotations

import builtins
import importlib.machinery
import sys
import types
from pathlib import Path

USAGE = """usage: python -m rmsnorm run SCRIPT [ARGUMENTS ...]

Run an unmodified program with torch's own F.rms_norm and nn.RMSNorm on our kernels. What follows the script is its own.

All output is the program's: nothing is said of the norms, and nothing is counted. On the CPU our kernels serve float32,
bfloat16, float16 and float64, with a weight of the same type or none; other calls keep torch's formula. A model whose
norms are classes of its own, as those of transformers are, needs `rmsnorm.patch(model)` instead. Where our kernels
can't be installed, one line says why, and the program isn't run.
"""


def command(arguments: list[str]) -> None:
    """``rmsnorm run`` with what was typed behind it; ends the process with the program's status."""
    if not arguments or arguments[0] in ("-h", "--help"):
        print(USAGE, end="", file=sys.stdout if arguments else sys.stderr)
        sys.exit(0 if arguments else 2)
    if arguments[0] == "--":
        arguments = arguments[1:]
    script, *rest = arguments or [""]
    program(Path(script), rest)


def program(script: Path, arguments: list[str]) -> None:
    """Runs a Python program with these arguments."""
    from ._install import install

    try:
        source = script.read_bytes()
    except OSError as error:
        _refuse(f"{script} can't be read: {(error.strerror or str(error)).lower()}; give a Python program")
    try:
        install()
    except RuntimeError as refused:
        _refuse(str(refused))
    sys.argv = [str(script), *arguments]
    sys.path[0] = str(script.resolve().parent)
    name = str(script.absolute())
    main = types.ModuleType("__main__")
    loader = importlib.machinery.SourceFileLoader("__main__", name)
    vars(main).update(__file__=name, __builtins__=builtins, __loader__=loader)
    sys.modules["__main__"] = main  # and it stays: threads, atexit and pickle look there when the program is over
    try:
        exec(compile(source, name, "exec", dont_inherit=True), vars(main))
    except (SystemExit, GeneratorExit):
        raise
    except BaseException as error:
        # What Python does with it, minus this frame; a SyntaxError has no other. The program may have set the hook.
        own = error.__traceback__.tb_next if error.__traceback__ else None
        sys.excepthook(type(error), error.with_traceback(own), own)
        sys.exit(130 if isinstance(error, KeyboardInterrupt) else 1)


def _refuse(reason: str) -> None:
    print(f"rmsnorm run: {reason}", file=sys.stderr)
    sys.exit(2)
