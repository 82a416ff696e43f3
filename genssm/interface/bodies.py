"""Requests of bounded size: what is longer is refused before it is kept or parsed."""

from __future__ import annotations

from genssm.interface.offline import App, Message, Receive, Scope, Send, answer
from genssm.interface.uploads import BYTES

MOST = BYTES + 2**20  # bytes of a request: a file, and what is said beside it
REFUSED = f"a request may have {MOST // 2**20} MiB; send less"


class BoundedBodies:
    """ASGI middleware: requests of more than ``MOST`` bytes are answered 413."""

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
