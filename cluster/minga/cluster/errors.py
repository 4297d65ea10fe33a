"""What is wrong with a project, or with what Minga runs on this machine.

    ProjectError (ValueError)    minga.toml, its folder, or what is asked of them cannot be used
    BusyError                    another process works in the project
    SubmissionError              a Ray cluster does not answer, or does not take or run a job
    StackError                   a process of the local stack does not start, or ended
    DemoError                    a step of the demo did not give what it must
    ReproductionError            a run cannot be trained again, or gave other weights
    ResponseError                the journal of alarms cannot be used, or what is asked of a case

Each message says what is wrong, the value seen, and what to do. The parts below have error trees
of their own: `minga.training.errors`, `minga.serving.errors`, `minga.federation.errors`.
"""


class ProjectError(ValueError):
    """A project folder or its minga.toml cannot be used."""


class BusyError(Exception):
    """Another process searches, trains or simulates in the project."""


class SubmissionError(Exception):
    """A Ray cluster does not answer, or does not take or run a job."""


class StackError(Exception):
    """A process of the local stack does not start, or ended by itself."""


class DemoError(Exception):
    """A step of the demo did not give what it must."""


class ReproductionError(Exception):
    """A run cannot be trained again, or gave other weights."""


class ResponseError(Exception):
    """The journal of alarms cannot be used, or a case is not where it is asked to be."""
