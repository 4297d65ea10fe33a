"""The command tree and the one place where errors become messages and exit codes.

Commands are named by import path, so `minga --help` loads none of them.
"""

import os
import signal
import sys
from importlib.metadata import version

from cyclopts import App

from minga.cli.failures import exit_code_of, message_of

app = App(
    name="minga",
    help="One model from an idea to a fleet of devices, and kept good there.",
    version=lambda: version("minga"),
    default_parameter=None,
    suppress_keyboard_interrupt=False,  # `main` says what was kept
)

COMMANDS: dict[str, tuple[str, str]] = {
    "demo": ("minga.cli.demo:demo", "Run the whole loop on real data, start to finish."),
    "init": ("minga.cli.project:init", "Write a runnable example project into a folder."),
    "run": ("minga.cli.project:run", "Check data, search, train, gate and register a model."),
    "tune": ("minga.cli.project:tune", "Search hyper-parameters with Ray Tune."),
    "train": ("minga.cli.project:train", "Train once with given parameters and register."),
    "simulate": ("minga.cli.simulate:simulate", "Play a federation on virtual devices."),
    "submit": ("minga.cli.submit:submit", "Send run, tune, train or simulate to a Ray cluster."),
    "job": ("minga.cli.submit:app", "List, follow and cancel jobs on a Ray cluster."),
    "data": ("minga.cli.data:app", "Keep a schema, check data against it, report on data."),
    "model": ("minga.cli.model:app", "List, show, promote registered model versions."),
    "explain": ("minga.cli.explain:explain", "Explain a version's answers, column by column."),
    "reproduce": ("minga.cli.reproduce:reproduce", "Train a run again and compare the weights."),
    "lineage": ("minga.cli.lineage:lineage", "Show what came from what: data, versions, services."),
    "serve": ("minga.cli.serve:serve", "Serve registered models over the Open Inference Protocol."),
    "watch": ("minga.cli.watch:app", "Show drift, performance and alarms of served models."),
    "traffic": ("minga.cli.traffic:app", "Compare two versions on a served model's traffic."),
    "predict": ("minga.cli.predict:predict", "Send one request to a served model."),
    "key": ("minga.cli.key:app", "Make, list, revoke API keys of served models."),
    "coordinator": ("minga.cli.coordinator:app", "Run the federation's server, make tokens."),
    "root": ("minga.cli.root:app", "Keep a federation's root authority on an offline machine."),
    "device": ("minga.cli.device:app", "Enrol and run an edge device; list and revoke devices."),
    "audit": ("minga.cli.audit:app", "Show, verify, export the coordinator's audit log."),
    "federate": ("minga.cli.federate:federate", "Train the champion further on the fleet."),
    "analyse": ("minga.cli.analyse:analyse", "Ask the fleet for statistics of its data."),
    "observe": ("minga.cli.observe:observe", "Write rules, dashboard, route for Prometheus & Co."),
    "respond": ("minga.cli.respond:app", "Let alarms retrain the champion; tell the story."),
    "status": ("minga.cli.status:status", "Show what runs, which versions, which devices."),
}

for _name, (_path, _help) in COMMANDS.items():
    app.command(_path, name=_name, help=_help)


def _show_own_help(words: list[str]) -> None:
    """Let the chosen command's help be its docstring, not only its line in the list."""
    if words and words[0] in COMMANDS and app[words[0]].default_command is not None:
        app[words[0]].help = None


def main(arguments: list[str] | None = None) -> None:
    """Run one command and leave with its exit code.

    Args:
        arguments: the words after `minga`; None takes them from the process.
    """
    words = list(sys.argv[1:] if arguments is None else arguments)
    debug = "--debug" in words or os.environ.get("MINGA_DEBUG") == "1"
    words = [word for word in words if word != "--debug"]
    # gRPC reads it when it is loaded. Its notes tell of each handshake that fails, and whoever
    # reaches a port can make as many of these as fill the disk.
    os.environ.setdefault("GRPC_VERBOSITY", "ERROR")
    # Asked to end, a command leaves as after Ctrl-C: what it started is ended too.
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))
    try:
        _show_own_help(words)
        app(words)
    except KeyboardInterrupt as stop:
        kept = f"; {stop}" if str(stop) else ""
        sys.stderr.write(f"minga: stopped by you{kept}\n")
        sys.exit(130)
    except Exception as error:  # the last resort turns errors into words
        if debug:
            raise
        sys.stderr.write(f"minga: {message_of(error)}\n")
        sys.exit(exit_code_of(error))
