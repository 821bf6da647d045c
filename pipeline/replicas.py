"""The LLM replicas as all processes see them: registry, leases, running places, breaker, recent speed."""

from __future__ import annotations

from pipeline.job import Job


class Replicas:
    """The shared registry of replicas, as the llm stage uses it."""

    async def move(self, job: Job) -> str | None:
        """Give up *job*'s place and take one at another replica, outside `job.avoid`.

        Returns:
            The new replica's URL, also noted in `job.replica`; None where no other has a free slot (the job then has
            no place: raise `RetryLater`).

        Raises:
            LeaseLost: the entry belongs to another consumer now.
        """
        raise NotImplementedError

    def observe(self, url: str, *, ok: bool, duration_s: float = 0.0, tokens: int = 0, refused: bool = False) -> None:
        """Note how one call went; shared with all processes soon after.

        Args:
            ok: whether the replica answered well; a row of failures opens its breaker.
            duration_s: from sending the request to the last byte of the answer.
            tokens: completion tokens of a good answer, 0 where the replica did not say.
            refused: the connection was refused: opens the breaker at once.
        """
        raise NotImplementedError
