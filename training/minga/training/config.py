"""The tables of `minga.toml` that the central path reads."""

from typing import Annotated, Literal, Self

from pydantic import BaseModel, ConfigDict, Field, field_serializer, model_validator

from minga.inference.uris import redacted

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
    """What `Task.data` gets; a relative path is taken from the project folder. `${NAME}` in a URI
    is taken from the environment when the source is opened."""
    sha256: str = ""
    """What the source's content must be, if it is a file or folder; other content is refused.
    `minga data check` prints it."""
    max_missing: Share = 0.0
    """Largest share of missing values of a column that had none in the reference."""
    max_out_of_range: Share = 0.01
    """Largest share of a column's values outside the reference's range."""
    max_drift: Positive = 0.25
    """Largest population stability index of a column against the reference profile."""
    min_volume: Share = 0.5
    """Smallest number of training examples, as a share of the reference's."""
    features: tuple[Annotated[str, Field(pattern=r"^[^,]+$")], ...] = Field(
        default=(), strict=False
    )
    """The columns that models may go by; empty: all. Rows keep all their columns. `minga data
    features` proposes some."""
    strict: bool = False
    """Whether what is only a warning stops a run too."""

    @field_serializer("source")
    def _without_secrets(self, source: str) -> str:
        """Settings are kept with every run; a password is not."""
        return redacted(source)


Over = Literal["training", "simulation"]


class SearchConfig(Table):
    """How hyper-parameters are searched."""

    over: Over = "training"
    """What a trial is. training: the Task is trained on the training split. simulation: the
    campaign of `[federation]` is played on the virtual devices of `[simulation]`; what is said of
    epochs here then holds for its rounds."""
    searcher: Literal["random", "grid", "tpe"] = "random"
    """What is tried: random points, all points of a grid, or what Optuna's TPE makes of the trials
    so far (Bergstra et al. 2011)."""
    scheduler: Literal["halving", "population", "none"] = "halving"
    """halving: trials that are behind are cut (ASHA, Li et al. 2020). population: the weakest take
    over the weights of the strongest (PBT, Jaderberg et al. 2017). none: all trials run to their
    end."""
    num_trials: Count = 8
    """Points of the search space that are tried, the Task's defaults first."""
    budget_s: Annotated[float, Field(ge=0)] = 0.0
    """The search ends after so many seconds, interruptions not counted; trials stop after the epoch
    that they are in. 0: no limit."""
    patience: Annotated[int, Field(ge=0)] = 0
    """The search ends when so many trials in a row gained nothing; 0: it never ends early."""
    warm_start: Annotated[int, Field(ge=0)] = 0
    """So many of the best points of earlier searches of this Task are tried after the defaults."""
    max_epochs: Count = 8
    """Epochs of a trial that is never cut; with `over = "simulation"` its rounds, in the place of
    `[federation] num_rounds`."""
    max_concurrent: Count = 2
    """Trials that run at a time; each takes one CPU."""
    gpus_per_trial: Annotated[float, Field(ge=0)] = 0.0
    """GPUs, or a share of one, that each trial takes as well."""
    grace_epochs: Count = 1
    """Epochs that every trial gets before it may be cut."""
    reduction_factor: Annotated[int, Field(ge=2)] = 2
    """At each rung one of this many trials goes on."""
    grid_points: Count = 3
    """Values of each range in a grid; of a choice it has all."""
    perturbation_epochs: Count = 2
    """Epochs of a generation of population based training."""

    @model_validator(mode="after")
    def _campaigns_keep_their_own_weights(self) -> Self:
        if self.over == "simulation" and self.scheduler == "population":
            raise ValueError(
                'scheduler = "population" hands weights from trial to trial, which a campaign '
                'cannot take over; with over = "simulation" take "halving" or "none"'
            )
        return self


class TrainConfig(Table):
    """How the chosen parameters are trained."""

    num_workers: Count = 2
    """Processes that share each batch; each takes one CPU, or one GPU."""
    min_workers: Annotated[int, Field(ge=0)] = 0
    """Training goes on with so few workers when machines are lost; when some come back Ray may
    make the workers more again. 0: it waits for num_workers."""
    epochs: Count = 10
    """Passes over the training split; the best one on the validation split is kept."""
    patience: Annotated[int, Field(ge=0)] = 0
    """Training ends when so many epochs in a row gained nothing; 0: it never ends early."""
    min_gain: Annotated[float, Field(ge=0)] = 0.0
    """An epoch gains if the objective is better than ever before by more than this."""
    device: Literal["auto", "cpu", "gpu"] = "auto"
    """auto: a GPU for each worker if Ray has so many, else CPUs."""
    precision: Literal["float32", "mixed"] = "float32"
    """mixed: GPUs compute in bfloat16, or float16 where they lack that; weights stay float32, and
    CPUs compute in float32 all the same."""
    keep_checkpoints: Count = 2
    """So many of the best checkpoints are kept while training lasts, beside the last."""
    max_failures: Annotated[int, Field(ge=0)] = 2
    """How often lost workers are replaced before training gives up. A lost machine may count twice:
    for its workers, and for the try to replace them."""

    @model_validator(mode="after")
    def _fewest_are_not_more(self) -> Self:
        if self.min_workers > self.num_workers:
            raise ValueError(
                f"min_workers = {self.min_workers} is above num_workers = {self.num_workers}"
            )
        return self


class SelectionConfig(Table):
    """How `minga run --auto` compares kinds of models."""

    contenders: tuple[str, ...] = Field(default=(), strict=False)
    """Those that compete, such as `linear`, `mlp`, `boosting`, `own`; empty: all that there are."""
    folds: Annotated[int, Field(ge=3)] = 5
    """Of cross-validation, over the training and the validation split; how examples are divided
    is said by the Task's `folds`."""
    repeats: Count = 1
    """How often examples are divided anew into folds, for a finer comparison; what is sorted by
    time is divided once."""
    confidence: Annotated[float, Field(gt=0.5, lt=1)] = 0.95
    """Of the intervals."""
    max_concurrent: Count = 2
    """Fits that run at a time; each takes one CPU."""


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
    """A champion that was made longer ago is stale."""
    max_rows: Annotated[int, Field(ge=0)] = 0
    """A champion that has answered more rows, by the monitor's closed windows, is stale; 0: never
    for that."""
    trusted_keys: tuple[str, ...] = Field(default=(), strict=False)
    """Public keys of colleagues and machines whose verdicts are believed beside this project's
    own; each is what their `minga model key` prints."""
    approvals: Annotated[int, Field(ge=0)] = 0
    """So many other people than those who registered and judged a version have to approve it before
    it is promoted, with `minga model approve`."""
    approvers: tuple[str, ...] = Field(default=(), strict=False)
    """Public keys of the people whose approval counts, one for each; empty: all trusted keys."""
