"""Which versions of a model take which part of its traffic, from one look to the next.

Without a comparison it is simple: the champion takes all. With one, the version that was served
before is the *baseline* and goes on; the *challenger* gets its share beside it.

- A canary grows stage by stage as `CanaryJudge` finds nothing against it, and then takes over;
  or it is rolled back. It begins because somebody asks for it (`minga traffic canary`), or
  because the champion changed (`new_champions` in `[serving.comparison]`).
- A shadow and a split go on until they are stopped; they change nothing by themselves.

Every turn is kept in a `Book` first, so that a service that starts again goes on where it was: in
the same stage, whose counts begin anew. While the book is away a comparison goes on, since a
bad version must be rolled back just then too, and what it did is written later.
"""

import logging
import math
import time
from collections.abc import Callable
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Any, Final

from minga.inference.comparing import Comparison, Mode
from minga.inference.engine import ModelRef, OnnxModel
from minga.inference.errors import ModelError
from minga.inference.monitor.reference import Column, Role
from minga.inference.tally import Tally
from minga.serving.book import Book, Plan, Status, Story
from minga.serving.config import ComparisonConfig
from minga.serving.counting import Counts
from minga.serving.errors import ServingError
from minga.serving.judging import (
    CanaryJudge,
    Decision,
    Expectation,
    SplitJudge,
    drift_by,
    figures_of,
)

_WRITE_EVERY_S: Final = 5.0
_LOG: Final = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True, kw_only=True)
class Lineup:
    """What is to be served of one model.

    Attributes:
        default: the version that its name stands for.
        challenger: the version that is compared with it, if one is.
        comparison: how.
    """

    default: ModelRef
    challenger: ModelRef | None = None
    comparison: Comparison | None = None

    @property
    def refs(self) -> tuple[ModelRef, ...]:
        """The versions, the default first."""
        return (self.default,) if self.challenger is None else (self.default, self.challenger)


@dataclass(slots=True, kw_only=True)
class _Page:
    """What is known of one model."""

    plan: Plan | None = None
    story: Story | None = None
    judge: CanaryJudge | None = None
    began_s: float = 0.0
    is_kept: bool = False  # in the book, as it is or as it was
    is_written: bool = True
    written_s: float = 0.0


class Referee:
    """Follows the plans of a book, and judges what is counted.

    Args:
        book: what is asked, and what became of it.
        config: how versions are compared.
        resolve: finds a version of a model; raises `ServingError` where it cannot.
        clock: seconds, of any beginning.
        now: the time of day, for the story.
    """

    def __init__(
        self,
        book: Book,
        config: ComparisonConfig,
        resolve: Callable[[str, str], ModelRef],
        *,
        clock: Callable[[], float] = time.monotonic,
        now: Callable[[], datetime] = lambda: datetime.now(UTC),
    ) -> None:
        self._book = book
        self._config = config
        self._resolve = resolve
        self._clock = clock
        self._now = now
        self._pages: dict[str, _Page] = {}

    def begin(self, champion: ModelRef) -> ModelRef:
        """Give the version to serve first: where a comparison was left, its baseline or winner.

        Raises:
            ServingError: the book is away.
        """
        plan, story = self._book.read(champion.name)
        self._pages[champion.name] = _Page(plan=plan, story=story, is_kept=story is not None)
        version = self._default(champion, plan, story)
        is_newer = (
            story is not None and story.is_new_champion and (story.challenger != champion.version)
        )
        if story is not None and is_newer and self._config.new_champions:
            version = _winner(story)  # the champion of the time without us comes as any other
        if version == champion.version:
            return champion
        try:
            return self._resolve(champion.name, version)
        except ServingError as error:
            _LOG.warning("%s; the champion is served instead", error)
            return champion

    def look(self, champion: ModelRef, served: ModelRef, counts: Counts) -> Lineup:
        """Say what is to be served of a model.

        Args:
            champion: the version that the registry names.
            served: the default that is served now.
            counts: what every replica counted, summed.

        Raises:
            ServingError: a version that was asked for cannot be found.
        """
        page = self._pages.setdefault(champion.name, _Page())
        self._read(champion.name, page)
        self._stop_if_over(champion, page)
        if page.story is None or page.story.status is not Status.RUNNING:
            plan = self._next(champion, served, page)
            if plan is not None:
                self._start(champion.name, page, plan, served, champion)
        else:
            self._judge(champion.name, page, counts)
        self._write(champion.name, page)
        return self._lineup(champion, served, page)

    def refused(self, model: str, reason: str) -> None:
        """Hear that what was asked for cannot be served."""
        page = self._pages.get(model)
        if page and page.story and page.story.status is Status.RUNNING:
            self._turn(model, page, status=Status.REFUSED, reason=reason)
            self._write(model, page)

    def is_comparing(self) -> bool:
        """Tell whether anything is compared, so that counts are of use."""
        return any(
            page.story is not None and page.story.status is Status.RUNNING
            for page in self._pages.values()
        )

    def _read(self, model: str, page: _Page) -> None:
        try:
            plan, story = self._book.read(model)
        except ServingError:
            return  # what was known last holds
        if story is None and page.is_kept:
            page.story, page.is_kept, page.is_written = None, False, True  # it is to be forgotten
        page.plan = plan
        if page.story is None:
            page.story, page.is_kept = story, story is not None

    def _stop_if_over(self, champion: ModelRef, page: _Page) -> None:
        story = page.story
        if story is None or story.status is not Status.RUNNING:
            return
        if story.is_new_champion:
            if champion.version != story.challenger:
                self._turn(
                    champion.name, page, status=Status.STOPPED, reason="the champion changed again"
                )
        elif page.plan is None or page.plan.id != story.plan:
            self._turn(champion.name, page, status=Status.STOPPED, reason="it was stopped")
        elif champion.version == story.challenger:
            self._turn(champion.name, page, status=Status.PASSED, reason="it became champion")
        elif champion.version != story.baseline:
            self._turn(champion.name, page, status=Status.STOPPED, reason="the champion changed")

    def _next(self, champion: ModelRef, served: ModelRef, page: _Page) -> Plan | None:
        """Give the plan to begin with now, if there is one."""
        plan, story = page.plan, page.story
        if story is not None and is_rolled_back(story, champion.version):
            return None
        if plan is not None and (story is None or story.plan != plan.id):
            return plan
        wanted = self._default(champion, plan, story)
        is_new = served.version != wanted == champion.version
        if self._config.new_champions and is_new:
            return Plan(
                id=f"champion {champion.version} after {served.version}",
                mode=Mode.CANARY,
                version=champion.version,
                share=1.0,
            )
        return None

    def _start(
        self, model: str, page: _Page, plan: Plan, served: ModelRef, champion: ModelRef
    ) -> None:
        is_canary = plan.mode is Mode.CANARY
        is_asked = page.plan is not None and page.plan.id == plan.id
        page.story = Story(
            plan=plan.id,
            mode=plan.mode,
            baseline=champion.version if is_asked else served.version,
            challenger=plan.version,
            is_new_champion=not is_asked,
            expects=plan.expects,
            share=self._config.shares[0] if is_canary else plan.share,
            since=self._stamp(),
        )
        page.judge = None
        if page.story.baseline == plan.version:
            self._turn(model, page, status=Status.REFUSED, reason="it is served to all already")
            return
        try:
            self._resolve(model, plan.version)
        except ServingError as error:
            self._turn(model, page, status=Status.REFUSED, reason=str(error))
            return
        self._turn(model, page, reason=f"begun at {page.story.share:.0%}")

    def _judge(self, model: str, page: _Page, counts: Counts) -> None:
        story = page.story
        assert story is not None, "only what runs is judged"
        if page.judge is None:  # begun now, or taken up after a restart
            drift = drift_by(story.expects, self._tested(model, story))
            page.judge, page.began_s = CanaryJudge(self._config, drift), self._clock()
        counted = counts.get(_comparison_id(story), {})
        baseline, challenger = (counted.get(role, Tally()) for role in ("baseline", "challenger"))
        figures = figures_of((("baseline", baseline), ("challenger", challenger)))
        if story.mode is not Mode.CANARY:
            page.story = self._report(model, story, baseline, challenger, figures)
            return
        verdict = page.judge.look(baseline, challenger, self._clock() - page.began_s)
        page.story = story = story.become(figures=figures, reason=verdict.reason)
        if verdict.decision is Decision.ROLL_BACK:
            self._turn(model, page, status=Status.ROLLED_BACK, reason=verdict.reason)
        elif verdict.decision is Decision.ADVANCE:
            self._advance(model, page, verdict.reason)

    def _tested(self, model: str, story: Story) -> Column | None:
        """Give how a canary's predictions were distributed on its test data, if that counts."""
        if story.expects is not Expectation.REPAIR:
            return None
        try:
            return predictions_of(self._resolve(model, story.challenger))
        except ModelError as error:
            _LOG.warning("%s; its predictions are compared with the other version's alone", error)
            return None

    def _report(
        self,
        model: str,
        story: Story,
        baseline: Tally,
        challenger: Tally,
        figures: dict[str, Any],
    ) -> Story:
        """Tell what a shadow or a split has shown; a split's verdict is given once."""
        if story.mode is Mode.SHADOW:
            return story.become(figures=figures)
        if "verdict" in story.figures:
            return story.become(figures=figures | {"verdict": story.figures["verdict"]})
        verdict = SplitJudge(self._config).look(baseline, challenger)
        if verdict.decision is Decision.ADVANCE:
            figures["verdict"] = verdict.reason
            _LOG.info("split of '%s' version %s: %s", model, story.challenger, verdict.reason)
        return story.become(figures=figures, reason=verdict.reason)

    def _advance(self, model: str, page: _Page, reason: str) -> None:
        assert page.story is not None, "only what runs advances"
        stage = page.story.stage + 1
        page.judge = None
        if stage == len(self._config.shares):
            self._turn(model, page, status=Status.PASSED, reason=reason, share=1.0)
        else:
            share = self._config.shares[stage]
            self._turn(model, page, stage=stage, share=share, reason=f"at {share:.0%}: {reason}")

    def _lineup(self, champion: ModelRef, served: ModelRef, page: _Page) -> Lineup:
        story = page.story
        version = self._default(champion, page.plan, story)
        known = {ref.version: ref for ref in (served, champion)}
        default = known.get(version) or self._resolve(champion.name, version)
        if story is None or story.status is not Status.RUNNING:
            return Lineup(default=default)
        challenger = known.get(story.challenger) or self._resolve(champion.name, story.challenger)
        comparison = Comparison(
            id=_comparison_id(story),
            model=champion.name,
            baseline=story.baseline,
            challenger=story.challenger,
            mode=story.mode,
            share=story.share,
            salt=story.plan,
            key=self._config.key,
        )
        return Lineup(default=default, challenger=challenger, comparison=comparison)

    def _default(self, champion: ModelRef, plan: Plan | None, story: Story | None) -> str:
        """Give the version that a model's name stands for."""
        if story is None:
            return champion.version
        is_on = plan is not None and plan.id == story.plan
        if story.is_new_champion:
            is_on = story.challenger == champion.version
        elif champion.version != story.baseline:
            is_on = False
        return _winner(story) if is_on else champion.version

    def _turn(self, model: str, page: _Page, **changes: Any) -> None:
        assert page.story is not None, "there is a story to turn"
        page.story = page.story.become(since=self._stamp(), **changes)
        page.is_written = False
        story = page.story
        _LOG.log(
            logging.WARNING
            if story.status in (Status.ROLLED_BACK, Status.REFUSED)
            else logging.INFO,
            "%s of '%s' version %s against %s, %s: %s",
            story.mode,
            model,
            story.challenger,
            story.baseline,
            story.status,
            story.reason,
        )

    def _write(self, model: str, page: _Page) -> None:
        """Keep the story, now and then also what it counts."""
        if page.story is None:
            return
        is_due = (
            page.story.status is Status.RUNNING and self._clock() - page.written_s >= _WRITE_EVERY_S
        )
        if page.is_written and not is_due:
            return
        try:
            self._book.write(model, page.story)
        except ServingError as error:
            if page.is_written:
                _LOG.warning("the story of '%s' is written later: %s", model, error)
            page.is_written = False
        else:
            page.is_kept, page.is_written, page.written_s = True, True, self._clock()

    def _stamp(self) -> str:
        return self._now().isoformat(timespec="seconds")


def predictions_of(ref: ModelRef) -> Column | None:
    """Give how a version's predictions, as a `Tally` notes them, were distributed when tested.

    None if its file does not tell, or tells of several numbers of which none is an answer.

    Raises:
        ModelError: the version cannot be loaded.
    """
    model = OnnxModel.load(ref)
    if model.reference is None:
        return None
    if answers := model.reference.only(Role.ANSWER):
        return answers
    is_number = math.prod(model.outputs[0].shape[1:]) == 1
    return model.reference.only(Role.OUTPUT) if is_number else None


def is_rolled_back(story: Story, champion: str) -> bool:
    """Tell whether it is the champion itself that did not pass."""
    has_failed = story.status in (Status.ROLLED_BACK, Status.REFUSED)
    return story.is_new_champion and story.challenger == champion and has_failed


def _winner(story: Story) -> str:
    return story.challenger if story.status is Status.PASSED else story.baseline


def _comparison_id(story: Story) -> str:
    return f"{story.plan}, stage {story.stage}"
