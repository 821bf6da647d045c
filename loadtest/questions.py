"""What the load tester asks: the built-in questions, or one from each line of a file."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from pathlib import Path

# On a fresh system the documents are Penstock's own, so these find something; a few are meant to find nothing.
BUILT_IN = (
    "What happens to a job when the worker that runs it is killed?",
    "How does the gateway choose a replica?",
    "When does an entry count as poison?",
    "Where do dead letters go, and how are they retried?",
    "What does a consumer's lease protect?",
    "How long does a completion key live?",
    "Which stages does a query pass through?",
    "What is the difference between a deadline and a timeout?",
    "How is an idempotency key kept?",
    "What does the circuit breaker watch?",
    "How are retries spaced out?",
    "Which answer does a client get when Redis is away?",
    "What does it mean that a long job runs once?",
    "How are priorities read from the streams?",
    "When is a request refused as overload?",
    "Why does the load of a replica always equal its leases?",
    "How are documents cut into chunks?",
    "What does the retriever put into the prompt?",
    "How is a running job cancelled?",
    "Which settings name the replicas?",
    "What does the mock replica answer from?",
    "How does a worker drain before it stops?",
    "What is the capital of France?",
    "How many legs does a spider have?",
)


def read_questions(path: Path | None) -> tuple[str, ...]:
    """Return the questions in *path*, one from each line that is not blank; None: the built-in ones.

    Raises:
        ValueError: the file cannot be read, is not UTF-8, or holds no question.
    """
    if path is None:
        return BUILT_IN
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except OSError as error:
        raise ValueError(f"cannot read the questions in {path}: {error.strerror}") from None
    except UnicodeDecodeError:
        raise ValueError(f"the questions in {path} are not UTF-8 text") from None
    questions = tuple(stripped for line in lines if (stripped := line.strip()))
    if not questions:
        raise ValueError(f"there is no question in {path}")
    return questions
