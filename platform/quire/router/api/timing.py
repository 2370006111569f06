"""`metrics` of an answer: where its time went, from the times of each of its choices."""

from __future__ import annotations

from collections.abc import Iterable

from quire.router.job import Job, Times, Update
from quire_schemas.openai.answer import RequestMetrics


class Timing:
    """Gathers the times of a job's choices, as their last updates bring them."""

    def __init__(self, job: Job) -> None:
        self._job = job
        self._ended = 0
        self._times: list[Times] = []

    def take(self, update: Update) -> RequestMetrics | None:
        """What is to be told behind the last update of a stream; None before, and where it was not asked for."""
        self._ended += update.finish_reason is not None
        self._times += [update.times] if update.times is not None else []
        ended = self._ended == len(self._job.prompts) * self._job.n
        return self._all() if ended and self._job.shown.metrics else None

    def whole(self, updates: Iterable[Update]) -> RequestMetrics | None:
        """What is to be told of a whole answer, if it was asked for."""
        self._times = [update.times for update in updates if update.times is not None]
        return self._all() if self._job.shown.metrics else None

    def _all(self) -> RequestMetrics:
        times = self._times
        if not times:
            return RequestMetrics(
                time_to_first_token_ms=None,
                generation_time_ms=None,
                queue_time_ms=None,
                mean_itl_ms=None,
                tokens_per_second=None,
            )
        first = min(each.first_at for each in times)
        spent = max(each.last_at for each in times) - first
        between = sum(each.tokens - 1 for each in times)
        return RequestMetrics(
            time_to_first_token_ms=_ms(first - self._job.arrived_at),
            generation_time_ms=_ms(spent),
            queue_time_ms=_ms(max(each.queued for each in times)),
            mean_itl_ms=_ms(sum(each.last_at - each.first_at for each in times) / between) if between else None,
            tokens_per_second=round(between / spent, 3) if between and spent else None,
        )


def _ms(seconds: float) -> float:
    return round(1000 * seconds, 3)
