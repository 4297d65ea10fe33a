"""How devices are simulated: the `[simulation]` table of minga.toml."""

from typing import Annotated, Literal

from pydantic import Field

from minga.training.config import Count, Positive, Share, Table

Spread = Annotated[float, Field(ge=0, le=5)]


class EqualTable(Table):
    """Every device has examples like every other: `name = "iid"`."""

    name: Literal["iid"] = "iid"
    """Examples are dealt out at random."""

    devices: Count = 100
    """How many devices there are."""

    examples: Annotated[int, Field(ge=0)] = 0
    """Each device draws so many examples, with repetition; 0: each example goes to one device."""

    size_spread: Spread = 0.0
    """Deviation of the logarithm of devices' sizes; 0: all have equally many examples."""


class DirichletTable(Table):
    """Devices have unlike mixes of targets (Hsu et al. 2019): `name = "dirichlet"`."""

    name: Literal["dirichlet"] = "dirichlet"
    """Each device has a mix of classes of its own."""

    devices: Count = 100
    """How many devices there are."""

    alpha: Positive = 0.3
    """The smaller, the fewer classes a device has; 100 is nearly as `iid`."""

    examples: Annotated[int, Field(ge=0)] = 0
    """Each device draws so many examples, with repetition; 0: each example goes to one device."""

    size_spread: Spread = 0.0
    """Deviation of the logarithm of devices' sizes; 0: all have equally many examples."""


class ColumnTable(Table):
    """Each value of a column is a device: `name = "column"`."""

    name: Literal["column"] = "column"
    """Examples go where they belong: to their writer, plant or patient."""

    column: str = ""
    """A name among the Task's columns; empty: the `owners` of its splits."""


class SourcesTable(Table):
    """Each source is a device, as it will be on the real ones: `name = "sources"`."""

    name: Literal["sources"] = "sources"
    """The Task reads each device's own data."""

    pattern: str = "data/site-*.csv"
    """Files or folders that match are one device each; relative to the project folder."""


PartitionTable = Annotated[
    EqualTable | DirichletTable | ColumnTable | SourcesTable, Field(discriminator="name")
]


class SimulationConfig(Table):
    """Virtual devices, for `minga simulate`; the campaign itself is the `[federation]` table's."""

    partition: PartitionTable = EqualTable()
    """Which device has which examples; `name` says how they are divided."""

    dropout: Share = 0.0
    """The chance that a device vanishes while it trains."""

    seconds_per_example: Annotated[float, Field(ge=0)] = 0.0
    """Simulated time that a device takes for an example; 0: all answer at once, in random order."""

    speed_spread: Spread = 0.0
    """Deviation of the logarithm of devices' speeds; 0: all are equally fast."""

    measure_every: Count = 1
    """The global model is measured on the validation split after so many rounds each."""

    workers: Annotated[int, Field(ge=0)] = 0
    """Processes on Ray that train devices; 1: this process alone, without Ray; 0: as many as Ray
    has processors, or GPUs, where a round is enough work for several, else this process alone."""

    vectorise: bool = True
    """Train many devices as one batched computation where that gives what one by one gives."""
