"""The only file with the command ``rmsnorm learn``: it checks what it is given, then serves or exports.

Nothing here imports torch before it is needed: ``rmsnorm_command.py`` runs this file before the package.
Annotations are evaluated by typer, hence no ``from __future__ import annotations`` in this file.
"""

import importlib.util
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

from . import texts

if TYPE_CHECKING:
    import typer

NEEDED = ("markdown_it", "pygments")


def register(app: "typer.Typer") -> "typer.Typer":
    """Adds the command to the app; returns the app."""
    import typer

    @app.command()
    def learn(
        lang: Annotated[str, typer.Option(help=f"One of {', '.join(texts.LANGUAGES)}.")] = texts.of_locale(),
        port: Annotated[int, typer.Option(min=0, max=65535, help="On 127.0.0.1; 0: any that is free.")] = 0,
        browser: Annotated[bool, typer.Option("--browser/--no-browser", help="Open a browser.")] = True,
        export_to: Annotated[
            Path | None,
            typer.Option("--export", metavar="DIR", help="Measure, and write the pages en.html and zh.html there."),
        ] = None,
        home: Annotated[
            str,
            typer.Option(metavar="URL", help="With --export: where the pages link to the files of this repository."),
        ] = "",
    ) -> None:
        """The lesson in your browser: guess, then move what moves; English and Chinese, offline."""

        def refuse(reason: str) -> None:
            typer.echo(f"rmsnorm learn: {reason}", err=True)
            raise typer.Exit(2)

        if lang not in texts.LANGUAGES:
            refuse(f"--lang: unknown language {lang!r}; choose one of {', '.join(texts.LANGUAGES)}")
        if absent := [name for name in NEEDED if importlib.util.find_spec(name) is None]:
            from rmsnorm._extras import extra_line

            refuse(f"{', '.join(absent)} missing: {extra_line('tutorial')}")
        if export_to is not None:
            if reason := unwritable(export_to):
                refuse(f"--export: {reason}")
            from rich.console import Console

            with Console(stderr=True).status("importing torch …") as status:
                from rmsnorm._extras import hush
                from rmsnorm.bench import export
                from rmsnorm.tutorial import build, measured

                hush()
                found = measured.everything(lambda what: status.update(f"Measuring: {what}"))
            for name, page in build.pages(found, home=home).items():
                try:
                    export.replace(export_to / name, page)
                except OSError as error:
                    reason = (error.strerror or str(error)).lower()
                    refuse(
                        f"{export_to / name} can't be written: {reason}; free some room, or choose another directory"
                    )
                typer.echo(export_to / name)
            return

        from . import serve

        try:
            server = serve.bind(port)
        except serve.Unavailable as reason:
            refuse(str(reason))
        url = serve.address(server, lang)

        def ready() -> None:
            typer.echo(f"{url}  (Ctrl-C ends it)")
            if browser:
                serve.open_browser(url)

        serve.serve(server, ready)

    return app


def unwritable(directory: Path) -> str | None:
    """Why nothing can be written there, or None; makes the directory. Known before anything is measured."""
    try:
        directory.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=directory):
            return None
    except OSError as error:
        return f"{directory} can't be written to: {(error.strerror or str(error)).lower()}; choose another directory"
