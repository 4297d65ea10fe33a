"""What a project says of Flower: the `[federation.flower]` table of minga.toml."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Annotated

from pydantic import BaseModel, ConfigDict, Field, model_validator

from minga.federation.trainer import Scalar

_NAME = r"^([^:\s]+:[^:\s]+)?$"


@dataclass(frozen=True, slots=True, kw_only=True)
class StrategyName:
    """Which strategy a campaign wants.

    Attributes:
        reference: `package.module:attribute`, a class or a function that makes a strategy.
        arguments: what it is made with.
        on_sums: it only averages, so secure sums do for it; Minga knows that of Flower's own.
    """

    reference: str
    arguments: Mapping[str, Scalar] = field(default_factory=dict)
    on_sums: bool = False


class FlowerTable(BaseModel):
    """Flower's apps on devices, and a Flower strategy in the coordinator; each goes alone too."""

    model_config = ConfigDict(extra="forbid", frozen=True, use_attribute_docstrings=True)

    client_app: Annotated[str, Field(pattern=_NAME)] = ""
    """What trains on devices instead of the Task, `module:attribute` in the project folder: a
    ClientApp, a class derived from NumPyClient or Client, or a client_fn."""

    strategy: Annotated[str, Field(pattern=_NAME)] = ""
    """What makes the next model in the coordinator, `package.module:attribute`: one of Flower's
    own, such as flwr.server.strategy:FedMedian, or one that the coordinator was started with
    (--strategy). It takes the place of the server optimiser."""

    arguments: dict[str, Scalar] = Field(default_factory=dict)
    """What the strategy is made with."""

    on_sums: bool = False
    """The strategy only averages, so that the sum of a secure round does for it. Minga knows that
    of Flower's own."""

    @model_validator(mode="after")
    def _arguments_are_a_strategys(self) -> "FlowerTable":
        if (self.arguments or self.on_sums) and not self.strategy:
            raise ValueError("arguments and on_sums are those of a strategy; name it")
        return self

    @property
    def strategy_name(self) -> StrategyName | None:
        """The strategy, if there is one."""
        if not self.strategy:
            return None
        return StrategyName(reference=self.strategy, arguments=self.arguments, on_sums=self.on_sums)
