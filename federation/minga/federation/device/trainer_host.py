"""The child process in which a device's own training code runs.

The agent stays small and answers the coordinator while the child trains; a crash of user code, or
memory that it runs out of, ends the child alone. The two speak frames over pipes: a 4-byte length,
a JSON header, then `header["size"]` bytes. Of a request these are tensors as safetensors, unless
the header names a file that holds them; of an answer its tensors' float32 values one after the
other, as the header's names and shapes say. Nothing is pickled. A second set of tensors, such as a
correction, travels with the first under the names of control variates.

Run as `python -m minga.federation.device.trainer_host MODULE:ATTRIBUTE`; the first frame holds the
options that the trainer is made with.
"""

import gc
import importlib
import json
import os
import select
import struct
import sys
import threading
from collections.abc import Mapping
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
from pydantic import TypeAdapter

from minga.federation.analytics import Question
from minga.federation.errors import TrainerError
from minga.federation.parameters import Layout, Parameters, from_bytes, read_parameters
from minga.federation.parts import split_control, with_control
from minga.federation.trainer import (
    CorrectsGradients,
    CountsExamples,
    HasColumns,
    LocalTrainer,
    MakesParameters,
    Scalar,
    Update,
)

_QUESTION = TypeAdapter(Question)
_LENGTH = struct.Struct("<I")
PREFIX_BYTES = _LENGTH.size


def pack_frame(header: Mapping[str, Any], body: bytes = b"") -> bytes:
    """Give the bytes of one frame."""
    head = json.dumps({**header, "size": len(body)}).encode()
    return b"".join((_LENGTH.pack(len(head)), head, body))


def head_size(prefix: bytes) -> int:
    """Give the length of the JSON header that follows a frame's first `PREFIX_BYTES`."""
    size: int = _LENGTH.unpack(prefix)[0]
    return size


def _read_frame(stream: BinaryIO) -> tuple[dict[str, Any], bytes] | None:
    """Read one frame; None at the end of the stream."""
    prefix = stream.read(PREFIX_BYTES)
    if len(prefix) < PREFIX_BYTES:
        return None
    head = json.loads(stream.read(head_size(prefix)))
    body = stream.read(head["size"])
    return (head, body) if len(body) == head["size"] else None


def _write_frame(
    stream: BinaryIO, header: Mapping[str, Any], tensors: Parameters | None = None
) -> None:
    """Write a frame; the tensors go from where they are into the pipe."""
    layout = Layout.of(tensors or {})
    said = {"names": layout.names, "shapes": layout.shapes, "size": 4 * layout.num_values}
    head = json.dumps({**header, **said}).encode()
    stream.write(_LENGTH.pack(len(head)) + head)
    for name in layout.names:
        values = np.ascontiguousarray((tensors or {})[name], np.float32)
        stream.write(values.reshape(-1).view(np.uint8).data)
    stream.flush()


def load_factory(reference: str) -> Any:
    """Import what `module:attribute` names.

    Raises:
        TrainerError: the reference is malformed, or names nothing.
    """
    module_name, colon, attribute = reference.partition(":")
    if not colon or not module_name or not attribute:
        raise TrainerError(f"a trainer is named as package.module:attribute, not {reference!r}")
    try:
        return getattr(importlib.import_module(module_name), attribute)
    except (ImportError, AttributeError) as error:
        raise TrainerError(f"the trainer {reference!r} cannot be loaded: {error}") from error


def _answer(
    trainer: LocalTrainer, call: str, parameters: Parameters, config: Mapping[str, Scalar]
) -> tuple[dict[str, Any], Parameters]:
    match call:
        case "evaluate":
            return {"metrics": dict(trainer.evaluate(parameters, config))}, {}
        case "count":
            count = trainer.num_examples if isinstance(trainer, CountsExamples) else None
            return {"num_examples": count}, {}
        case "answer":
            return _answer_question(trainer, _QUESTION.validate_json(str(config["question"])))
        case "initial":
            if not isinstance(trainer, MakesParameters):
                raise TrainerError("this trainer cannot make personal tensors; give it `initial`")
            return {}, trainer.initial(config)
        case "fit_corrected":
            if not isinstance(trainer, CorrectsGradients):
                raise TrainerError("this trainer knows no SCAFFOLD; give it `fit_corrected`")
            model, correction = split_control(parameters)
            update = trainer.fit_corrected(model, config, correction)
            return _said_of(update), with_control(update.delta, update.gradient or {})
        case _:
            update = trainer.fit(parameters, config)
            return _said_of(update), update.delta


def _answer_question(
    trainer: LocalTrainer, question: Question
) -> tuple[dict[str, Any], Parameters]:
    if not isinstance(trainer, HasColumns):
        raise TrainerError("this trainer answers no queries; give it `columns`")
    vector, num_rows = question.answer(trainer.columns(question.columns))
    return {"num_rows": num_rows}, {"answer": vector}


def _said_of(update: Update) -> dict[str, Any]:
    return {"num_examples": int(update.num_examples), "metrics": dict(update.metrics)}


def serve(trainer: LocalTrainer, requests: BinaryIO, answers: BinaryIO) -> None:
    """Answer frames until the agent closes the pipe."""
    while (frame := _read_frame(requests)) is not None:
        header, body = frame
        try:
            file = header.get("file")
            parameters = from_bytes(body) if file is None else read_parameters(Path(file))
            answer, tensors = _answer(trainer, header["call"], parameters, header["config"])
        except Exception as error:  # noqa: BLE001 - user code may raise anything; the agent is told
            _write_frame(answers, {"error": f"{type(error).__name__}: {error}"})
        else:
            _write_frame(answers, answer, tensors)


def _end_with_agent() -> None:
    """End this process as soon as the agent does, also in the middle of training.

    However the agent ends, its end of the pipe is closed then, and that hangs this one up.
    """
    pipe = select.poll()
    pipe.register(sys.stdin.fileno(), 0)  # hanging up is told unasked
    pipe.poll()
    os._exit(1)


def main() -> None:
    """Make the trainer that the command line names and serve it."""
    threading.Thread(target=_end_with_agent, daemon=True).start()
    # Whatever user code prints goes to the log, not into the frames.
    answers = os.fdopen(os.dup(1), "wb")
    os.dup2(2, 1)
    if (first := _read_frame(sys.stdin.buffer)) is None:
        return  # the agent is gone
    try:
        trainer = load_factory(sys.argv[1])(first[0]["options"])
    except Exception as error:  # noqa: BLE001 - as above
        _write_frame(answers, {"error": f"{type(error).__name__}: {error}"})
        sys.exit(1)
    gc.freeze()  # what is loaded stays
    _write_frame(answers, {"ready": True})
    serve(trainer, sys.stdin.buffer, answers)


if __name__ == "__main__":
    main()
