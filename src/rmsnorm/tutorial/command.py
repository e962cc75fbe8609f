"""The only file with the command ``rmsnorm learn``: it checks what it is given, then serves or exports.

Annotations are evaluated by typer, hence no ``from __future__ import annotations`` in this file.
"""

import importlib.util
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

from .._extras import extra_line
from ..bench import export
from . import texts

if TYPE_CHECKING:
    import typer

NEEDED = ("marimo", "matplotlib", "markdown", "pygments", "uvicorn")


def register(app: "typer.Typer") -> "typer.Typer":
    """Adds the command to the app; returns the app."""
    import typer
    from rich.console import Console

    @app.command()
    def learn(
        lang: Annotated[str, typer.Option(help=f"One of {', '.join(texts.LANGUAGES)}.")] = texts.of_locale(),
        port: Annotated[int, typer.Option(min=0, max=65535, help="On 127.0.0.1; 0: any that is free.")] = 0,
        browser: Annotated[bool, typer.Option("--browser/--no-browser", help="Open a browser.")] = True,
        export_to: Annotated[
            Path | None,
            typer.Option("--export", metavar="DIR", help="Write the static pages en.html and zh.html there instead."),
        ] = None,
    ) -> None:
        """The tutorial in your browser: nine questions, and plots that you can move; English and Chinese, offline."""

        def refuse(reason: str) -> None:
            typer.echo(f"rmsnorm learn: {reason}", err=True)
            raise typer.Exit(2)

        if lang not in texts.LANGUAGES:
            refuse(f"--lang: unknown language {lang!r}; choose one of {', '.join(texts.LANGUAGES)}")
        if absent := [name for name in NEEDED if importlib.util.find_spec(name) is None]:
            refuse(f"{', '.join(absent)} missing: {extra_line('tutorial')}")
        if export_to is not None:
            if reason := unwritable(export_to):
                refuse(f"--export: {reason}")
            from . import static

            with Console(stderr=True).status("") as status:
                pages = static.pages(lambda title: status.update(f"Measuring: {title}"))
            for name, page in pages.items():
                try:
                    export.replace(export_to / name, page)
                except OSError as error:
                    reason = (error.strerror or str(error)).lower()
                    refuse(
                        f"{export_to / name} can't be written: {reason}; free some room, or choose another directory"
                    )
                typer.echo(export_to / name)
            return

        from . import server

        try:
            listening = server.bind(port)
        except server.Unavailable as reason:
            refuse(str(reason))
        url = server.address(listening, lang)

        def ready() -> None:
            typer.echo(f"{url}  (Ctrl-C ends it)")
            if browser:
                server.open_browser(url)

        server.serve(listening, ready)

    return app


def unwritable(directory: Path) -> str | None:
    """Why nothing can be written there, or None; makes the directory. Known before anything is measured."""
    try:
        directory.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=directory):
            return None
    except OSError as error:
        return f"{directory} can't be written to: {(error.strerror or str(error)).lower()}; choose another directory"
