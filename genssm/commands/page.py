"""``genssm app``."""

from __future__ import annotations

from typing import Annotated

import typer

from genssm.commands.console import command, require_gradio


@command
def page(
    models: Annotated[
        list[str] | None,
        typer.Option(
            "--model",
            "-m",
            help="Model to show instead of the shipped one of its modality (repeatable).",
        ),
    ] = None,
    port: Annotated[
        int | None, typer.Option(min=1, max=65535, help="Port (the first free one from 7860).")
    ] = None,
    share: Annotated[
        bool, typer.Option("--share", help="Make a public link, through Gradio's servers.")
    ] = False,
) -> None:
    """Open the page for the browser: write, draw, speak, look inside."""
    require_gradio()
    from genssm.interface.serving import serve

    serve(models or [], port=port, share=share)
