"""A small server that answers `/query` as a gateway does, for the load tester to aim at.

Run as `python -m tests.loadtest.target`; prints its port. Every tenth query is refused, `POST /query` with `{"query":
"sleep"}` never ends, and `GET /seen` tells what came.
"""

import asyncio
import socket
import sys
from itertools import count

import uvicorn
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import JSONResponse
from starlette.routing import Route

_numbers = count(1)
_seen: list[dict[str, str | None]] = []


async def query(request: Request) -> JSONResponse:
    n = next(_numbers)
    asked = (await request.json())["query"]
    _seen.append({"query": asked, "authorization": request.headers.get("authorization")})
    if asked == "sleep":
        await asyncio.Event().wait()
    if n % 10 == 0:
        return JSONResponse({"error": {"code": "overloaded"}}, status_code=503)
    return JSONResponse({"answer": "yes", "worker": "w1", "replica": f"http://replica-{n % 2}"})


async def seen(_: Request) -> JSONResponse:
    return JSONResponse(_seen)


app = Starlette(routes=[Route("/query", query, methods=["POST"]), Route("/seen", seen)])

if __name__ == "__main__":
    with socket.create_server(("127.0.0.1", 0), backlog=512) as listener:
        sys.stdout.write(f"{listener.getsockname()[1]}\n")
        sys.stdout.flush()
        uvicorn.Server(uvicorn.Config(app, log_level="critical")).run([listener])
