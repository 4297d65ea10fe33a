"""How many replicas a load needs, by what the replicas themselves say of it.

Ray Serve counts requests in its proxy and its handles; ours come straight to the replicas. So
each tells how many it has in hand, and Ray Serve's controller asks `by_requests_in_hand`. Its
bounds, delays and looking back stay Ray Serve's.
"""

from typing import Any, Final

REQUESTS_IN_HAND: Final = "requests_in_hand"
POLICY: Final = f"{__name__}:by_requests_in_hand"


def by_requests_in_hand(context: Any) -> tuple[float, dict[str, Any]]:
    """Give the number of replicas at which each would have as many in hand as it should.

    Args:
        context: Ray Serve's `AutoscalingContext`.
    """
    told = (context.aggregated_metrics or {}).get(REQUESTS_IN_HAND)
    if not told:  # no replica has told yet
        return context.target_num_replicas, {}
    return sum(told.values()) / context.config.get_target_ongoing_requests(), {}
