"""What a device's owner lets queries find out."""

from dataclasses import dataclass
from typing import Final

from minga.federation.analytics import Question
from minga.federation.errors import QueryRefusedError
from minga.federation.limits import QUERY_MIN_COHORT
from minga.federation.plain import PlainPlan
from minga.federation.secagg.plan import RoundPlan


@dataclass(frozen=True, slots=True, kw_only=True)
class Queries:
    """The owner's word; it is this device's setting and is never sent."""

    columns: frozenset[str] = frozenset()
    """Columns of which statistics may be told; none unless they are named."""
    min_cohort: int = QUERY_MIN_COHORT
    """Only in sums over so many devices."""

    def require_allowed(self, question: Question, plan: RoundPlan | PlainPlan) -> None:
        """Refuse a question before anything is read.

        Raises:
            QueryRefusedError: it is about other columns, or too few would hide the answer.
        """
        forbidden = [name for name in question.columns if name not in self.columns]
        if forbidden:
            raise QueryRefusedError(
                f"the device's owner does not let column {forbidden[0]!r} be asked about"
            )
        if isinstance(plan, PlainPlan):
            raise QueryRefusedError("the coordinator would see this device's own answer")
        self.require_hidden(plan.max_cohort)

    def require_hidden(self, num_devices: int) -> None:
        """Refuse a sum over too few devices, before anything of it can be unmasked.

        Raises:
            QueryRefusedError: there are too few.
        """
        if num_devices < self.min_cohort:
            raise QueryRefusedError(
                f"the answer would be a sum over {num_devices} devices; this one takes part in "
                f"sums over {self.min_cohort} or more"
            )


NO_QUERIES: Final = Queries()
"""Nothing is told."""
