"""Asks an ASGI application within this process."""

import asyncio

from starlette.types import ASGIApp, Message, Scope

from rtp_llm.serve.calls import Answer, Call, Head

MAX_PIECES = 16  # of an answer, that may wait for who reads it


async def answer(app: ASGIApp, call: Call) -> Answer:
    """Yield the application's answer to a call. Closing the generator is the client's hanging up."""
    pieces: asyncio.Queue[Message | None] = asyncio.Queue(MAX_PIECES)
    unread = [{"type": "http.request", "body": call.body, "more_body": False}]
    gone = asyncio.Event()

    async def receive() -> Message:
        if unread:
            return unread.pop()
        await gone.wait()
        return {"type": "http.disconnect"}

    async def run() -> None:
        try:
            await app(_scope(call), receive, pieces.put)
        finally:
            await pieces.put(None)

    task = asyncio.create_task(run())
    try:
        while (message := await pieces.get()) is not None:
            if message["type"] == "http.response.start":
                yield Head(message["status"], [(bytes(n), bytes(v)) for n, v in message.get("headers", ())])
            elif message.get("body"):
                yield bytes(message["body"])
        await task  # raises what the application raised
    finally:
        gone.set()
        task.cancel()


def _scope(call: Call) -> Scope:
    return {
        "type": "http",
        "asgi": {"version": "3.0", "spec_version": "2.3"},
        "http_version": "1.1",
        "method": call.method,
        "scheme": "http",
        "path": call.path,
        "raw_path": call.path.encode(),
        "query_string": call.query,
        "root_path": "",
        "headers": call.headers,
        "client": ("127.0.0.1", 0),
        "server": ("127.0.0.1", 80),
        "state": {},
    }
