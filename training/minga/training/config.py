"""The tables of `minga.toml` that the central path reads."""

from typing import Annotated

from pydantic import BaseModel, ConfigDict, Field

Count = Annotated[int, Field(ge=1)]
Share = Annotated[float, Field(ge=0, le=1)]
Positive = Annotated[float, Field(gt=0)]


class Table(BaseModel):
    """A table of `minga.toml`: strict types, no unknown keys, no changes afterwards."""

    model_config = ConfigDict(
        strict=True, frozen=True, extra="forbid", use_attribute_docstrings=True
    )


class DataConfig(Table):
    """Where the data is and how far it may stray from its reference."""

    source: str
    """What `Task.data` gets; a relative path is taken from the project folder."""
    max_missing: Share = 0.0
    """Largest share of missing values of a column that had none in the reference."""
    max_out_of_range: Share = 0.01
    """Largest share of a column's values outside the reference's range."""
    max_drift: Positive = 0.25
    """Largest population stability index of a column against the reference profile."""
    min_volume: Share = 0.5
    """Smallest number of training examples, as a share of the reference's."""
    strict: bool = False
    """Whether what is only a warning stops a run too."""


class SearchConfig(Table):
    """How hyper-parameters are searched."""

    num_trials: Count = 8
    """Points of the search space that are tried."""
    max_epochs: Count = 8
    """Epochs of a trial that is never cut."""
    max_concurrent: Count = 2
    """Trials that run at a time; each takes one CPU."""
    grace_epochs: Count = 1
    """Epochs that every trial gets before it may be cut."""
    reduction_factor: Annotated[int, Field(ge=2)] = 2
    """At each rung one of this many trials goes on (ASHA, Li et al. 2020)."""


class TrainConfig(Table):
    """How the chosen parameters are trained."""

    num_workers: Count = 2
    """Processes that share each batch; each takes one CPU."""
    epochs: Count = 10
    """Passes over the training split; the best one on the validation split is kept."""
    max_failures: Annotated[int, Field(ge=0)] = 2
    """How often lost workers are replaced before training gives up."""


class GateConfig(Table):
    """What a version must reach to be promoted."""

    floors: dict[str, float] = Field(default_factory=dict)
    """Metric -> the value that it must reach on the test split (a ceiling if it is minimised)."""
    max_regression: Annotated[float, Field(ge=0)] = 0.01
    """How much worse than the champion the objective may be, at the interval's bad end."""
    confidence: Annotated[float, Field(gt=0.5, lt=1)] = 0.95
    """Of that interval."""
    num_resamples: Annotated[int, Field(ge=50)] = 200
    """Bootstrap resamples of the test split behind the comparison with the champion."""
    max_slice_gap: Positive = 0.1
    """How much worse than on the whole test split the objective may be on a slice."""
    min_slice_examples: Count = 30
    """A slice with fewer examples is reported, not judged: chance alone would refuse it."""
    noise: Annotated[float, Field(ge=0)] = 0.1
    """Noise on the numbers among the inputs, in units of each column's deviation."""
    max_noise_loss: Positive = 0.1
    """How much worse the objective may be under that noise."""
    missing: Share = 0.1
    """Share of all input values that are taken away, to see what the model does without."""
    max_missing_loss: Positive = 0.3
    """How much worse the objective may be without them."""
    max_calibration_error: Positive = 0.1
    """Largest expected calibration error, where the Task gives probabilities."""
    max_selection_gap: Share | None = None
    """Largest difference between the shares of the Task's groups that get the positive answer
    (demographic parity); reported and not judged without it."""
    max_odds_gap: Share | None = None
    """Largest difference between the Task's groups in the rate of true or of false positives
    (equalised odds); reported and not judged without it."""
    max_parity_error: Positive = 1e-4
    """Largest difference between the outputs of the ONNX model and of the network."""
    max_latency_ms: Positive = 50.0
    """95th percentile of the time for one example, on one thread."""
    max_size_mb: Positive = 100.0
    """Size of the ONNX model."""
    trial_timeout_s: Positive = 60.0
    """How long a fresh process of each runtime may take to load the model and to answer."""
    max_age_days: Positive = 90.0
    """A champion that was made longer ago is reported as stale."""
    trusted_keys: tuple[str, ...] = Field(default=(), strict=False)
    """Public keys of colleagues and machines whose verdicts are believed beside this project's
    own; each is what their `minga model key` prints."""
