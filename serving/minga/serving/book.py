"""What operators ask of a model's traffic, and what became of it: two tags in the registry.

A `Plan` is written by whoever asks, and only read by the service; a `Story` is written by the
service. So neither overwrites the other, both outlive the service, and every machine that
reaches the registry can read them.
"""

from collections.abc import Callable
from enum import StrEnum
from typing import Any, Final, Protocol, TypeVar

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from minga.inference.comparing import Mode
from minga.serving.errors import ServingError
from minga.serving.judging import Expectation

PLAN_TAG: Final = "minga.traffic.plan"
STORY_TAG: Final = "minga.traffic.story"
_MAX_TEXT: Final = 500  # of one story's sentence: MLflow bounds a tag


class Plan(BaseModel):
    """What is to be compared, as an operator asked for it."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    id: str = Field(min_length=1)
    """Names it; another comparison of the same versions has another."""
    mode: Mode
    """What the challenger does."""
    version: str = Field(min_length=1)
    """The challenger."""
    share: float = Field(1.0, gt=0, le=1)
    """The part of the requests that it sees; a canary's comes from the configuration."""
    expects: Expectation = Expectation.BASELINE
    """What a canary's predictions are to look like."""


class Status(StrEnum):
    """What has become of a comparison."""

    RUNNING = "running"
    PASSED = "passed"
    ROLLED_BACK = "rolled back"
    REFUSED = "refused"
    STOPPED = "stopped"


class Story(BaseModel):
    """What became of a plan so far."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    plan: str
    """The plan's id."""
    mode: Mode
    baseline: str
    """The version that was served before."""
    challenger: str
    is_new_champion: bool = False
    """Whether nobody asked, but the champion changed."""
    expects: Expectation = Expectation.BASELINE
    """What a canary's predictions are to look like."""
    share: float
    """The part of the requests that the challenger sees now."""
    stage: int = 0
    """A canary's stage."""
    status: Status = Status.RUNNING
    reason: str = ""
    """Why it is where it is."""
    since: str
    """When the stage began, or the end came."""
    figures: dict[str, Any] = Field(default_factory=dict)
    """What both versions did in the stage."""

    def become(self, **changes: Any) -> "Story":
        """Give the story with another turn."""
        if "reason" in changes:
            changes["reason"] = changes["reason"][:_MAX_TEXT]
        return self.model_copy(update=changes)


class Book(Protocol):
    """Keeps plans and stories.

    Every method may raise `ServingError` where the book is away.
    """

    def read(self, model: str) -> tuple[Plan | None, Story | None]:
        """Give a model's plan and story."""
        ...

    def write(self, model: str, story: Story) -> None:
        """Keep a model's story instead of the one before."""
        ...

    def plan(self, model: str, plan: Plan | None) -> None:
        """Keep a plan instead of the one before.

        None takes it back, and lets a story that has ended be forgotten; one that runs is ended
        by the service.
        """
        ...


class MemoryBook:
    """A book that is lost with its process."""

    def __init__(self) -> None:
        self._plans: dict[str, Plan] = {}
        self._stories: dict[str, Story] = {}

    def read(self, model: str) -> tuple[Plan | None, Story | None]:
        """See `Book.read`."""
        return self._plans.get(model), self._stories.get(model)

    def write(self, model: str, story: Story) -> None:
        """See `Book.write`."""
        self._stories[model] = story

    def plan(self, model: str, plan: Plan | None) -> None:
        """See `Book.plan`."""
        if plan is not None:
            self._plans[model] = plan
            return
        self._plans.pop(model, None)
        if has_ended(self._stories.get(model)):
            del self._stories[model]


DocumentT = TypeVar("DocumentT", bound=BaseModel)


class RegistryBook:
    """A book in the tags of MLflow's registered models.

    Args:
        client: MLflow's, or what has its three methods for tags.
        unreachable: makes the error of a registry that does not answer.
        errors: what the client raises then.
    """

    def __init__(
        self,
        client: Any,
        *,
        unreachable: Callable[[Exception], ServingError],
        errors: tuple[type[Exception], ...],
    ) -> None:
        self._client = client
        self._unreachable = unreachable
        self._errors = errors

    def read(self, model: str) -> tuple[Plan | None, Story | None]:
        """See `Book.read`; a tag that is none of ours is as good as none."""
        try:
            tags = self._client.get_registered_model(model).tags
        except self._errors as error:
            raise self._unreachable(error) from error
        return _parse(Plan, tags.get(PLAN_TAG)), _parse(Story, tags.get(STORY_TAG))

    def write(self, model: str, story: Story) -> None:
        """See `Book.write`."""
        self._set(model, STORY_TAG, story.model_dump_json())

    def plan(self, model: str, plan: Plan | None) -> None:
        """See `Book.plan`."""
        if plan is not None:
            self._set(model, PLAN_TAG, plan.model_dump_json())
            return
        try:
            tags = self._client.get_registered_model(model).tags
            story = _parse(Story, tags.get(STORY_TAG))
            for tag in (PLAN_TAG, STORY_TAG) if has_ended(story) else (PLAN_TAG,):
                if tag in tags:
                    self._client.delete_registered_model_tag(model, tag)
        except self._errors as error:
            raise self._unreachable(error) from error

    def _set(self, model: str, tag: str, text: str) -> None:
        try:
            self._client.set_registered_model_tag(model, tag, text)
        except self._errors as error:
            raise self._unreachable(error) from error


def has_ended(story: Story | None) -> bool:
    """Tell whether there is a story that goes on no more."""
    return story is not None and story.status is not Status.RUNNING


def _parse(kind: type[DocumentT], text: str | None) -> DocumentT | None:
    if text is None:
        return None
    try:
        return kind.model_validate_json(text)
    except ValidationError:
        return None
