"""The documents service: what questions are answered from.

Indexing takes its time, so both operations answer 202 with a job id; `GET /jobs?ids=a,b,c` tells how many of them
stand at once. The same id replaces what was indexed under it; of two at once the later accepted wins. What the index
holds is asked of the index itself, through its stage: no copy of that knowledge can be wrong.
"""

from __future__ import annotations

from typing import Final

from pydantic import BaseModel, Field, TypeAdapter, ValidationError

from gateway.asked import Asked, wrong
from gateway.errors import Problem, problem_of_outcome
from gateway.operation import Answer, Call, Operation, Parameter, answer, payload_of
from pipeline.flows import MAX_LOOKUP, Collection, DocumentDeletion, DocumentLookup, DocumentPayload, Name
from pipeline.job import Priority


class DocumentRequest(DocumentPayload):
    """A document to be indexed; the same id replaces what was there."""

    document_id: Name = Field(alias="id")
    priority: Priority = Field("normal", description="`low` leaves room for questions while many documents are sent")


class DocumentAccepted(BaseModel):
    """The document will be indexed, or taken out."""

    id: str
    job_id: str


async def put(call: Call) -> Answer:
    """Index a document, or replace it."""
    request = await call.read(DocumentRequest)
    if not request.text.strip():
        raise Problem(422, "invalid_field", "text: holds nothing but white space", param="text")
    job = call.job(
        "document",
        payload_of(request, DocumentPayload),
        call.gateway.settings.lifetimes.document_s,
        request.priority,
    )
    accepted = await call.submit(job, wait=False)
    headers = [(b"idempotent-replayed", b"true")] if accepted.repeated else []
    return answer({"id": request.document_id, "job_id": accepted.job_id}, 202, headers)


async def delete(call: Call) -> Answer:
    """Take a document out of the index.

    It is no error when there is none: the job then says that nothing was deleted.
    """
    document_id = call.path_id("id")
    asked = Asked(call, {"collection"})
    try:
        payload = DocumentDeletion(document_id=document_id, collection=_collection(asked))
    except ValidationError:
        message = "id: 1 to 128 characters out of A-Z a-z 0-9 . _ : -"
        raise Problem(422, "invalid_field", message, param="id") from None
    job = call.job("document_deletion", payload, call.gateway.settings.lifetimes.document_s)
    accepted = await call.submit(job, wait=False)
    return answer({"id": document_id, "job_id": accepted.job_id}, 202)


class Standing(BaseModel):
    """One document as the index holds it."""

    chunks: int
    digest: str = Field(description="what its sender named its version; empty where nothing was named")


class Standings(BaseModel):
    """What the index holds of the documents asked for."""

    documents: dict[str, Standing | None] = Field(description="by id; null: not in the index")


async def look(call: Call) -> Answer:
    """Tell which documents the index holds.

    Asks the index, behind the writes that were accepted before.
    """
    asked = Asked(call, {"ids", "collection"}, often=["ids"])
    ids = [part for text in asked.texts("ids") for part in text.split(",") if part]
    collection = _collection(asked)
    try:
        payload = DocumentLookup(document_ids=ids, collection=collection)
    except ValidationError as error:
        where = "".join(f"[{part}]" for part in error.errors()[0]["loc"][1:])
        message = f"ids{where}: 1 to {MAX_LOOKUP} document ids, separated by commas"
        raise Problem(422, "invalid_field", message, param="ids") from None
    job = call.job("document_lookup", payload, call.gateway.settings.lifetimes.query_s)
    accepted = await call.submit(job, wait=True)
    completion = await call.outcome(accepted.job_id, job.deadline_ms)
    if completion.status != "completed":
        raise problem_of_outcome(completion)
    return answer({"documents": (completion.result or {}).get("documents", {})})


def _collection(asked: Asked) -> str | None:
    try:
        return _COLLECTION.validate_python(asked.text("collection"))
    except ValueError:
        raise wrong("collection", "1 to 64 characters out of A-Z a-z 0-9 . _ -") from None


_COLLECTION: Final[TypeAdapter[str | None]] = TypeAdapter(Collection | None)
_IN_COLLECTION: Final = Parameter("collection", "the knowledge base it is in, where it is in one", type=Collection)

OPERATIONS: Final = (
    Operation(
        "GET",
        "/documents",
        look,
        answers={200: Standings},
        errors=(409, 422, 502, 504),
        parameters=(
            Parameter("ids", f"1 to {MAX_LOOKUP} document ids, separated by commas", required=True),
            _IN_COLLECTION,
        ),
    ),
    Operation(
        "POST",
        "/documents",
        put,
        body=DocumentRequest,
        answers={202: DocumentAccepted},
        idempotent=True,
        example={"id": "manual", "title": "The manual", "text": "Turn the key to the right."},
    ),
    Operation(
        "DELETE",
        "/documents/{id}",
        delete,
        answers={202: DocumentAccepted},
        errors=(422,),
        parameters=(Parameter("id", "the document's id, as it was sent", required=True, type=Name), _IN_COLLECTION),
    ),
)
