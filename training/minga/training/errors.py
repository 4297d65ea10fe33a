"""What goes wrong on the central path, from reading a Task to registering a model.

    TrainingError                training or search could not finish
    ├── DivergedError            the loss is no longer a finite number
    ├── TaskError (ValueError)   the researcher's Task cannot be used
    │   └── ShapeError           its model, its data and its loss disagree in shape
    ├── DataError (ValueError)   the data cannot be used
    │   ├── SchemaError          it broke the schema that it is checked against
    │   └── TamperedError        it is not what its version says
    ├── GateError                a version that failed its gates was to be promoted
    │   └── ApprovalError        it lacks the approval of other people
    ├── ConflictError            somebody else promoted another version in the meantime
    └── RegistryError            a version is missing, or its files are not what was registered
        └── VerdictError         nobody who is trusted vouches for a version as it is

Each message says what is wrong, the value seen, and what to do.
"""


class TrainingError(Exception):
    """Training or search could not finish."""


class DivergedError(TrainingError):
    """The loss is no longer a finite number."""


class TaskError(TrainingError, ValueError):
    """The Task's file, class or attributes cannot be used."""


class ShapeError(TaskError):
    """Model, data and loss of a Task disagree in shape."""


class DataError(TrainingError, ValueError):
    """The data cannot be read or used."""


class SchemaError(DataError):
    """The data broke the schema that it is checked against."""


class TamperedError(DataError):
    """The data is not what its recorded version says."""


class GateError(TrainingError):
    """A version that its gates refused was to be promoted."""


class ApprovalError(GateError):
    """A version lacks the approval of people other than those who made and judged it."""


class RegistryError(TrainingError):
    """A registered version is missing, or its files differ from what was registered."""


class ConflictError(TrainingError):
    """Somebody else promoted another version in the meantime."""


class VerdictError(RegistryError):
    """Nobody who is trusted vouches for a version as it is."""


def last_line(error: Exception) -> str:
    """Give the last line of an error that came from another process: what its traceback ends in."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return lines[-1] if lines else type(error).__name__
