"""Which error ends the command with which exit code.

Errors are known by name, not by class: looking one up imports no part of Minga,
and an error can only be raised by a module that is loaded already.

| code | meaning |
|---|---|
| 1 | an error that Minga did not foresee |
| 2 | the command line itself is wrong |
| 3 | a package that the command needs is not installed |
| 130 | stopped by the user |

The rest of the table is `EXIT_CODES`.
"""

import errno
import os

EVERYTHING = "'minga[cluster]'"
"""The extra with which every command works; a device that trains needs `minga[train]` alone."""

EXTRAS = {
    "s3fs": "'minga[s3]'",
    "tensorflow_metadata": "'minga[tfdv]'",
    "psycopg": "'psycopg[binary]'",
}
"""Packages that are in an extra of their own, or do not come with Minga."""

DISK_FULL = frozenset({errno.ENOSPC, errno.EDQUOT})

REGISTRY_ERRORS = frozenset({"mlflow.exceptions.MlflowException", "sqlalchemy.exc.SQLAlchemyError"})
"""What the registry's own client raises where nothing turns it into an error of Minga's."""

REGISTRY_UNREACHABLE = "minga.serving.errors.RegistryUnreachableError"

EXIT_CODES: dict[str, int] = {
    # minga.cluster.errors
    "minga.cluster.errors.ProjectError": 10,
    "minga.cluster.errors.BusyError": 42,
    "minga.cluster.errors.SubmissionError": 54,
    "minga.cluster.errors.StackError": 17,
    "minga.cluster.errors.DemoError": 18,
    "minga.cluster.errors.ReproductionError": 48,
    "minga.cluster.errors.ResponseError": 52,
    # minga.training.errors
    "minga.training.errors.TaskError": 11,
    "minga.training.errors.ShapeError": 12,
    "minga.training.errors.DataError": 13,
    "minga.training.errors.TrainingError": 14,
    "minga.training.errors.GateError": 15,
    "minga.training.errors.RegistryError": 16,
    "minga.training.errors.SchemaError": 44,
    "minga.training.errors.TamperedError": 45,
    "minga.training.errors.ConflictError": 46,
    "minga.training.errors.VerdictError": 47,
    "minga.training.errors.ApprovalError": 53,
    # minga.inference.errors and minga.serving.errors
    "minga.inference.errors.InferenceError": 20,
    "minga.serving.errors.ServingError": 21,
    "minga.inference.errors.PortInUseError": 22,
    "minga.inference.errors.ServerUnreachableError": 23,
    "minga.inference.errors.RejectedError": 24,
    "minga.inference.errors.BadRequestError": 25,
    "minga.inference.errors.ModelError": 26,
    "minga.inference.errors.AccessError": 50,
    "minga.serving.errors.VersionRefusedError": 26,
    "minga.inference.errors.MonitorError": 51,
    "minga.serving.errors.NoChampionError": 27,
    "minga.serving.errors.RegistryUnreachableError": 28,
    # minga.federation.errors
    "minga.federation.errors.EnrolmentError": 30,
    "minga.federation.errors.IdentityError": 31,
    "minga.federation.errors.UnreachableError": 32,
    "minga.federation.errors.PortInUseError": 22,  # whichever part wanted the port
    "minga.federation.errors.CampaignError": 34,
    "minga.federation.errors.FederationError": 35,
    "minga.federation.errors.AuditError": 36,
    "minga.federation.errors.BudgetError": 37,
}


def exit_code_of(error: BaseException) -> int:
    """Give the exit code of the nearest listed class among the error's bases."""
    names = _names_of(error)
    for name in names:
        if name in EXIT_CODES:
            return EXIT_CODES[name]
    if REGISTRY_ERRORS.intersection(names):
        return EXIT_CODES[REGISTRY_UNREACHABLE]
    return 3 if isinstance(error, ModuleNotFoundError) else 1


def _names_of(error: BaseException) -> list[str]:
    """Name an error's class and its bases, the nearest first."""
    return [f"{kind.__module__}.{kind.__qualname__}" for kind in type(error).__mro__]


def message_of(error: BaseException) -> str:
    """Give the message of a known error as it is; name the class of an unknown one."""
    text = _without_secrets(str(error).strip())
    if isinstance(error, ModuleNotFoundError):
        package = (error.name or "").partition(".")[0]
        extra = EXTRAS.get(package, EVERYTHING)
        return f"{error.name} is not installed, and this command needs it: pip install {extra}"
    if REGISTRY_ERRORS.intersection(_names_of(error)):
        reason = (text.splitlines() or [type(error).__name__])[0]
        return (
            f"the model registry does not answer as it should: {reason}\n"
            "Is MINGA_TRACKING_URI right, and is its server up?"
        )
    if exit_code_of(error) != 1:
        return text
    if isinstance(error, OSError) and (error.filename is not None or error.errno in DISK_FULL):
        where = "" if error.filename is None else f"{error.filename} "
        return f"{where}cannot be used: {error.strerror}; check the path, its rights, free space"
    return (
        f"unexpected {type(error).__name__}: {text}\n"
        "Run again with --debug to see where, and report it."
    )


def _without_secrets(text: str) -> str:
    """Cut the registry's password out of what its client says."""
    from minga.inference.uris import scrubbed

    return scrubbed(text, os.environ.get("MINGA_TRACKING_URI", ""))
