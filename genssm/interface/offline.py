"""The server fetches nothing: an address in the place of a file is refused.

Gradio downloads an address that a program sends instead of an upload, and serves
``/file=ADDRESS`` by fetching it, both from public hosts and without a bound on their size.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable, MutableMapping
from pathlib import Path
from typing import Any

import gradio as gr
from gradio_client.utils import is_http_url_like

REFUSED = "an address is not fetched; send the file itself"
SERVED = ("/file=", "/file/")  # Gradio's two ways to say it

Scope = MutableMapping[str, Any]
Message = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[Message]]
Send = Callable[[Message], Awaitable[None]]
App = Callable[[Scope, Receive, Send], Awaitable[None]]


def refuse_addresses(page: gr.Blocks) -> None:
    """Let no component of a page download what it is sent an address of."""
    for block in page.blocks.values():
        keep = block.async_move_resource_to_block_cache
        setattr(block, keep.__name__, _local(keep))


def _local(
    keep: Callable[[str | Path | None], Awaitable[str | None]],
) -> Callable[[str | Path | None], Awaitable[str | None]]:
    async def keep_file(place: str | Path | None) -> str | None:
        if is_http_url_like(place):
            raise gr.Error(f"{REFUSED[0].upper()}{REFUSED[1:]}.", print_exception=False)
        return await keep(place)

    return keep_file


class LocalFiles:
    """ASGI middleware: of ``/file=…``, only files of this machine reach the application."""

    def __init__(self, app: App) -> None:
        self.app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        path = scope["path"] if scope["type"] == "http" else ""
        if not any(is_http_url_like(path.partition(way)[2]) for way in SERVED):
            await self.app(scope, receive, send)
            return
        await answer(send, 403, REFUSED)


async def answer(send: Send, status: int, text: str) -> None:
    """Send a whole response of plain text."""
    headers = [(b"content-type", b"text/plain; charset=utf-8")]
    await send({"type": "http.response.start", "status": status, "headers": headers})
    await send({"type": "http.response.body", "body": text.encode()})
