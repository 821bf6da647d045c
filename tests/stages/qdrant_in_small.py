"""A Qdrant server in small: the client's local mode behind the few REST operations that an index needs.

    python -m tests.stages.qdrant_in_small [PORT]

One line of JSON on stdout says where: `{"url": "http://127.0.0.1:40123"}`. Bodies are read by the client's own models
of the REST interface, so a request that the real server would not take is not taken here.
"""

from __future__ import annotations

import asyncio
import json
import socket
import sys
import warnings
from typing import Any, TypeVar

import httpx
import uvicorn
from pydantic import BaseModel, TypeAdapter
from qdrant_client import AsyncQdrantClient, models
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route

VERSION = "1.20.0"


def ok(result: Any) -> Response:
    """Return *result* in the frame that every answer has."""
    value = TypeAdapter(Any).dump_python(result, mode="json", exclude_none=False)
    return Response(json.dumps({"result": value, "status": "ok", "time": 0.0}), media_type="application/json")


class Small:
    """The operations; `client` holds the data."""

    def __init__(self) -> None:
        self.client = AsyncQdrantClient(":memory:")

    def routes(self) -> list[Route]:
        at = "/collections/{name}"
        return [
            Route("/", self.info),
            Route("/readyz", self.info),
            Route(f"{at}/exists", self.exists),
            Route(at, self.collection, methods=["GET"]),
            Route(at, self.create, methods=["PUT"]),
            Route(at, self.drop, methods=["DELETE"]),
            Route(f"{at}/index", self.index, methods=["PUT"]),
            Route(f"{at}/vectors/{{vector}}", self.vector_name, methods=["PUT"]),
            Route(f"{at}/points", self.upsert, methods=["PUT"]),
            Route(f"{at}/points", self.retrieve, methods=["POST"]),
            Route(f"{at}/points/delete", self.delete, methods=["POST"]),
            Route(f"{at}/points/count", self.count, methods=["POST"]),
            Route(f"{at}/points/query/batch", self.query, methods=["POST"]),
        ]

    async def info(self, _: Request) -> Response:
        return Response(json.dumps({"title": "qdrant in small", "version": VERSION}), media_type="application/json")

    async def exists(self, request: Request) -> Response:
        return ok({"exists": await self.client.collection_exists(_name(request))})

    async def collection(self, request: Request) -> Response:
        return ok(await self.client.get_collection(_name(request)))

    async def create(self, request: Request) -> Response:
        body = await _read(request, models.CreateCollection)
        vectors, words, metadata = body.vectors, body.sparse_vectors, body.metadata
        made = await self.client.create_collection(
            _name(request), vectors_config=vectors, sparse_vectors_config=words, metadata=metadata
        )
        return ok(made)

    async def drop(self, request: Request) -> Response:
        return ok(await self.client.delete_collection(_name(request)))

    async def index(self, request: Request) -> Response:
        await _read(request, models.CreateFieldIndex)  # local mode needs none
        return ok(_done())

    async def vector_name(self, request: Request) -> Response:
        body = await _read(request, models.DenseVectorNameConfig)
        await self.client.create_vector_name(_name(request), request.path_params["vector"], body)
        return ok(_done())

    async def upsert(self, request: Request) -> Response:
        body = await _read(request, models.PointsList)
        await self.client.upsert(_name(request), body.points, update_filter=body.update_filter)
        return ok(_done())

    async def retrieve(self, request: Request) -> Response:
        body = await _read(request, models.PointRequest)
        return ok(await self.client.retrieve(_name(request), body.ids, with_payload=True))

    async def delete(self, request: Request) -> Response:
        body = await _read(request, models.FilterSelector)
        await self.client.delete(_name(request), body.filter)
        return ok(_done())

    async def count(self, request: Request) -> Response:
        body = await _read(request, models.CountRequest)
        return ok(await self.client.count(_name(request), count_filter=body.filter))

    async def query(self, request: Request) -> Response:
        body = await _read(request, models.QueryRequestBatch)
        return ok(await self.client.query_batch_points(_name(request), body.searches))


M = TypeVar("M", bound=BaseModel)


def _name(request: Request) -> str:
    return str(request.path_params["name"])


async def _read(request: Request, model: type[M]) -> M:
    return model.model_validate_json(await request.body())


def _done() -> dict[str, Any]:
    return {"operation_id": 1, "status": "completed"}


async def refuse(_: Request, error: Exception) -> Response:
    """Say no as the server does: 404 for a collection that is not there, 400 for the rest."""
    status = 404 if "not found" in str(error) else 400
    return Response(json.dumps({"status": {"error": str(error)}, "time": 0.0}), status, media_type="application/json")


def app() -> Starlette:
    return Starlette(routes=Small().routes(), exception_handlers={ValueError: refuse})


def rest_client() -> AsyncQdrantClient:
    """Return a client of a server in small in this process: all of REST but the socket."""
    transport = httpx.ASGITransport(app=app(), raise_app_exceptions=False)
    return AsyncQdrantClient("http://test:6333", check_compatibility=False, transport=transport)


def main() -> None:
    warnings.simplefilter("ignore")
    port = int(sys.argv[1]) if len(sys.argv) > 1 else 0
    with socket.create_server(("127.0.0.1", port)) as listener:
        print(json.dumps({"url": f"http://127.0.0.1:{listener.getsockname()[1]}"}), flush=True)
        server = uvicorn.Server(uvicorn.Config(app(), log_level="error", lifespan="off"))
        asyncio.run(server.serve(sockets=[listener]))


if __name__ == "__main__":
    main()
