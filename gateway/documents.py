"""The documents service: what questions are answered from.

Indexing takes its time, so both operations answer 202 with a job id; `GET /jobs?ids=a,b,c` tells how many of them
stand at once. The same id replaces what was indexed under it; of two at once the later accepted wins.
"""

from __future__ import annotations

from typing import Final

from pydantic import BaseModel, Field, ValidationError

from gateway.errors import Problem
from gateway.operation import Answer, Call, Operation, Parameter, answer, payload_of
from pipeline.flows import DocumentDeletion, DocumentPayload, Name
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
    try:
        payload = DocumentDeletion(document_id=document_id)
    except ValidationError:
        message = "id: 1 to 128 characters out of A-Z a-z 0-9 . _ : -"
        raise Problem(422, "invalid_field", message, param="id") from None
    job = call.job("document_deletion", payload, call.gateway.settings.lifetimes.document_s)
    accepted = await call.submit(job, wait=False)
    return answer({"id": document_id, "job_id": accepted.job_id}, 202)


OPERATIONS: Final = (
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
        parameters=(Parameter("id", "the document's id, as it was sent", required=True, type=Name),),
    ),
)
