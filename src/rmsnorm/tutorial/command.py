"""The only file with the command ``rmsnorm learn``: it checks what it is given, then serves or exports.

Nothing here imports torch before it is needed: ``rmsnorm_command.py`` runs this file before the package.
Annotations are evaluated by typer, hence no ``from __future__ import annotations`` in this file.
"""

import importlib.util
import tempfile
import threading
import webbrowser
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

from . import texts

if TYPE_CHECKING:
    import typer

NEEDED = ("markdown_it", "pygments", "jinja2")


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
            remedy = "free some room, or choose another directory"
            with refused(refuse, f"--export: {export_to} can't be written to", remedy):  # before anything is measured
                export_to.mkdir(parents=True, exist_ok=True)
                tempfile.TemporaryFile(dir=export_to).close()
            from rich.console import Console

            with Console(stderr=True).status("importing torch …") as status:
                from rmsnorm._extras import hush
                from rmsnorm.bench import export
                from rmsnorm.tutorial import build, measured

                hush()
                found = measured.everything(lambda what: status.update(f"Measuring: {what}"))
            for name, page in build.pages(found, home=home).items():
                with refused(refuse, f"{export_to / name} can't be written", remedy):
                    export.replace(export_to / name, page)
                typer.echo(export_to / name)
            return

        from . import serve

        with refused(refuse, f"port {port} of {serve.HOST} can't be used", "leave --port out for a free one"):
            server = serve.bind(port)
        url = f"http://{serve.HOST}:{server.server_address[1]}/{lang}.html"

        typer.echo(f"{url}  (Ctrl-C ends it)")
        if browser:  # some of them keep their caller waiting for the page
            threading.Thread(target=webbrowser.open, args=[url], daemon=True).start()
        with server, suppress(KeyboardInterrupt):
            server.serve_forever()

    return app


@contextmanager
def refused(refuse: Callable[[str], None], what: str, remedy: str) -> Iterator[None]:
    """What the system says no to ends in one line, with the remedy."""
    try:
        yield
    except OSError as error:
        refuse(f"{what}: {(error.strerror or str(error)).lower()}; {remedy}")
