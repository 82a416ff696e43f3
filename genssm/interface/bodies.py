"""Requests, and the files of visitors in all, have a largest size: more is not kept or parsed."""

from __future__ import annotations

import asyncio
from pathlib import Path

from gradio.utils import get_upload_folder

from genssm.interface.offline import App, Message, Receive, Scope, Send, answer
from genssm.interface.uploads import BYTES

MOST = BYTES + 2**20  # bytes of a request: a file, and what is said beside it
REFUSED = f"a request may have {MOST // 2**20} MiB; send less"
# Of the files of all visitors, which are kept for an hour: bytes, files and folders.
ROOM, PLACES = 2**30, 20_000
FULL = "the files of visitors take all the room there is; send yours again later"


class BoundedBodies:
    """ASGI middleware: requests of more than ``MOST`` bytes are answered 413, uploads that there
    is no room for 507."""

    def __init__(self, app: App) -> None:
        self.app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        told = dict(scope["headers"]).get(b"content-length", b"0")
        if not told.isdigit() or int(told) > MOST:
            await answer(send, 413, REFUSED)
            return
        if scope["path"].endswith("/upload") and await asyncio.to_thread(_is_full):
            await answer(send, 507, FULL)
            return
        received, answered = 0, False

        async def bounded() -> Message:
            """Of a body whose length was not told, no more than is allowed."""
            nonlocal received, answered
            message = await receive()
            received += len(message.get("body", b""))
            if received <= MOST:
                return message
            if not answered:
                answered = True
                await answer(send, 413, REFUSED)
            return {"type": "http.disconnect"}

        async def once(message: Message) -> None:
            if not answered:
                await send(message)

        await self.app(scope, bounded, once)


def _is_full() -> bool:
    held = 0
    for places, path in enumerate(Path(get_upload_folder()).rglob("*")):
        try:
            held += path.lstat().st_size
        except FileNotFoundError:  # its hour was over
            continue
        if held > ROOM or places >= PLACES:
            return True
    return False
