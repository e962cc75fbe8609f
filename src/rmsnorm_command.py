"""The only file of the command ``rmsnorm`` that runs before torch is imported, which takes seconds: it says so.

Not in the package, since whatever is in it comes behind ``import torch``. ``rmsnorm learn`` need not wait: its page
computes by itself, and what needs torch is asked for later.
"""

import sys
from importlib.util import find_spec, module_from_spec, spec_from_file_location
from pathlib import Path


def main() -> None:
    """The entry point. On a terminal a line says what is waited for, and is cleared again."""
    if sys.argv[1:2] == ["learn"] and find_spec("typer"):
        return learn(sys.argv[2:])
    waiting = "importing torch …"
    shown = sys.stderr.isatty() and sys.argv[1:2] != ["run"]  # whose terminal is the program's own
    if shown:
        print(waiting, end="\r", file=sys.stderr, flush=True)
    from rmsnorm import cli

    if shown:
        print(" " * len(waiting), end="\r", file=sys.stderr, flush=True)
    return cli.main()


def learn(arguments: list[str]) -> None:
    """The command of the lesson, from the folder ``tutorial`` of the package, loaded under a name of its own."""
    import typer

    package = find_spec("rmsnorm")
    assert package is not None  # it is installed with this file
    assert package.origin
    folder = Path(package.origin).with_name("tutorial")
    spec = spec_from_file_location("rmsnorm_tutorial", folder / "__init__.py", submodule_search_locations=[str(folder)])
    assert spec is not None
    assert spec.loader is not None
    sys.modules[spec.name] = module = module_from_spec(spec)
    spec.loader.exec_module(module)
    from rmsnorm_tutorial import command  # type: ignore[import-not-found]

    app = typer.Typer(
        add_completion=False, pretty_exceptions_enable=False, context_settings={"help_option_names": ["-h", "--help"]}
    )
    command.register(app)(args=arguments, prog_name="rmsnorm learn")
