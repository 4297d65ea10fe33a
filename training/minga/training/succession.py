"""Which version may follow the champion, by what the ledger of promotions says. No registry."""

from collections.abc import Iterable
from typing import TYPE_CHECKING

from minga.training.errors import ConflictError, GateError, VerdictError
from minga.training.promotions import Decision

if TYPE_CHECKING:
    from minga.training.registry import Version


def retired(history: Iterable[Decision]) -> set[int]:
    """Name the versions on which the last word was that they are retired."""
    last = {one.version: one.kind for one in history}
    return {version for version, kind in last.items() if kind == "retired"}


def last_promotion(history: Iterable[Decision]) -> Decision | None:
    """Give the promotion that counts today; None if there was none."""
    promoted = [one for one in history if one.kind == "promoted"]
    return promoted[-1] if promoted else None


def require_same_files(version: "Version", history: tuple[Decision, ...]) -> None:
    """Refuse a version whose files are others than when it was decided on.

    Others may have a verdict of their own, which is good for the version that they are of: whoever
    writes to the registry could bring them back under the number of a former champion.

    Raises:
        VerdictError: they are.
    """
    for one in history:
        if one.version == version.version and one.bundle_sha256 != version.digests.bundle:
            raise VerdictError(
                f"{version.name} version {version.version} was {one.kind} at {one.at} with other "
                f"files (sha256 {one.bundle_sha256[:12]}) than it has now: they were exchanged; "
                "do not use them"
            )


def require_current(
    version: "Version", judged: int | None, champion: int | None, history: tuple[Decision, ...]
) -> None:
    """Refuse what is retired, and what was judged against another champion than today's.

    Raises:
        GateError: it is retired.
        ConflictError: somebody else promoted since it was judged.
    """
    number = version.version
    # Not by the number: the same files may be registered again under another.
    of_these = [one for one in history if one.bundle_sha256 == version.digests.bundle]
    if of_these and of_these[-1].kind == "retired":
        last = of_these[-1]
        under = "" if last.version == number else f" as version {last.version}"
        raise GateError(
            f"{version.name} version {number} was retired{under} by {last.by} at {last.at}: "
            f"{last.reason}; promote it nevertheless with: --override REASON"
        )
    if champion in (judged, number) or any(one.version == number for one in history):
        return
    last_one = next((one for one in reversed(history) if one.version == champion), None)
    since = f" (by {last_one.by} at {last_one.at})" if last_one else ""
    against = f"against version {judged}" if judged else "when there was no champion"
    raise ConflictError(
        f"{version.name} version {number} was judged {against}, but version {champion} "
        f"is champion now{since}; judge it anew with: minga model judge {number}"
    )
