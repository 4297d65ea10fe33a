"""One version of one model on onnxruntime: verified, warmed up, self-tested, then run.

A model that cannot answer is refused when it is loaded, never when a caller asks: its bytes
are checked against the digest that the registry recorded, its inputs and outputs must be
tensors of the protocol's datatypes, and it must compute zeros before it serves.
"""

import hashlib
import time
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from reprlib import repr as excerpt  # a caller must not choose a message's length
from typing import Any, Final

import numpy as np
import onnxruntime as ort
from onnxruntime.capi import onnxruntime_pybind11_state as native

from minga.inference.errors import BadRequestError, ModelError
from minga.inference.protocol import InferRequest, InferResponse
from minga.inference.statistics import Statistics
from minga.inference.tensors import Array, Datatype, TensorSpec

PLATFORM: Final = "onnxruntime_onnx"  # as Triton names it, which clients compare with

_DATATYPES: Final = {
    "tensor(bool)": Datatype.BOOL,
    "tensor(uint8)": Datatype.UINT8,
    "tensor(uint16)": Datatype.UINT16,
    "tensor(uint32)": Datatype.UINT32,
    "tensor(uint64)": Datatype.UINT64,
    "tensor(int8)": Datatype.INT8,
    "tensor(int16)": Datatype.INT16,
    "tensor(int32)": Datatype.INT32,
    "tensor(int64)": Datatype.INT64,
    "tensor(float16)": Datatype.FP16,
    "tensor(float)": Datatype.FP32,
    "tensor(double)": Datatype.FP64,
    "tensor(string)": Datatype.BYTES,
}
# onnxruntime's errors share no base class below Exception.
_NATIVE_ERRORS: Final = (
    native.EPFail,
    native.EngineError,
    native.Fail,
    native.InvalidArgument,
    native.InvalidGraph,
    native.InvalidProtobuf,
    native.NoModel,
    native.NoSuchFile,
    native.NotFound,
    native.NotImplemented,
    native.RuntimeException,
)
# What a variable dimension may be in the self-test: most models take 1, convolutions over
# images of any size need more.
_TRIAL_DIMS: Final = (1, 64)
_TIMED_RUNS: Final = 3
_TRIAL_VALUES: Final = (0, 1, 2)


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelRef:
    """Where a version of a model lies, and what it must be.

    Attributes:
        name: the model's name in URLs; letters, digits and anything but a slash.
        version: the version's name in URLs, as the registry gives it.
        path: the ONNX file, weights inside.
        sha256: the file's digest in hexadecimal.
        baseline: the mean of each feature in the training data, by which answers are explained;
            empty if it is not known.
    """

    name: str
    version: str
    path: str
    sha256: str
    baseline: tuple[float, ...] = ()

    def __post_init__(self) -> None:
        for part in (self.name, self.version):
            if not part or "/" in part:
                raise ModelError(
                    f"a model's name and version are parts of a URL; {part!r} is empty or has a '/'"
                )
        # JSON, in which a reference is kept and sent, knows lists alone.
        object.__setattr__(self, "baseline", tuple(self.baseline))

    def __str__(self) -> str:
        return f"'{self.name}' version {self.version}"


class OnnxModel:
    """A version of a model that is ready to answer. Safe to run from several threads at once.

    Attributes:
        ref: which version this is.
        inputs: what it takes.
        outputs: what it gives.
        is_rowwise: whether a row's outputs do not depend on the rows beside it, as tried at load.
        statistics: what it has done; its server counts.

    Args:
        ref: which version this is.
        content: the ONNX file, checked against `ref.sha256`.
        num_threads: threads of one run; 1 is best where requests come in parallel.

    Raises:
        ModelError: the content is not what `ref` says, or cannot be served.
    """

    def __init__(self, ref: ModelRef, content: bytes, *, num_threads: int = 1) -> None:
        digest = hashlib.sha256(content).hexdigest()
        if digest != ref.sha256:
            raise ModelError(
                f"model {ref} at {ref.path} has digest {digest[:12]}..., "
                f"registered was {ref.sha256[:12]}...: the file was altered; register it again"
            )
        self.ref = ref
        self._session = _open_session(ref, content, num_threads)
        self.inputs = _specs(ref, self._session.get_inputs())
        self.outputs = _specs(ref, self._session.get_outputs())
        self._inputs = {spec.name: spec for spec in self.inputs}
        self._output_names = tuple(spec.name for spec in self.outputs)
        self._has_batch = all(spec.shape[:1] == (-1,) for spec in (*self.inputs, *self.outputs))
        self.statistics = Statistics()
        self._zeros = self._self_test()
        self._zeros_bytes = max(sum(array.nbytes for array in self._zeros.values()), 1)
        self._zeros_s = self._time(self._zeros)
        self.is_rowwise = self._test_rows()

    @classmethod
    def load(cls, ref: ModelRef, *, num_threads: int = 1) -> "OnnxModel":
        """Read a version from its file.

        Raises:
            ModelError: the file cannot be read, is not what `ref` says, or cannot be served.
        """
        try:
            content = Path(ref.path).read_bytes()
        except OSError as error:
            raise ModelError(
                f"model {ref}: cannot read {ref.path}: {error.strerror}; register it again"
            ) from error
        return cls(ref, content, num_threads=num_threads)

    def response(self, request: InferRequest, outputs: Mapping[str, Array]) -> InferResponse:
        """Make the response to a request of what was computed for it."""
        return InferResponse(
            model_name=self.ref.name,
            model_version=self.ref.version,
            outputs=outputs,
            id=request.id,
        )

    def run(self, inputs: Mapping[str, Array], *, outputs: Iterable[str] = ()) -> dict[str, Array]:
        """Compute outputs from inputs.

        Args:
            inputs: one array per input of the model, of its datatype and shape.
            outputs: the outputs to compute; none means all.

        Raises:
            BadRequestError: the inputs do not fit the model, or it cannot compute from them.
        """
        return self.compute(inputs, self.check(inputs, tuple(outputs)))

    def compute(self, inputs: Mapping[str, Array], names: tuple[str, ...]) -> dict[str, Array]:
        """Compute outputs from inputs that `check` has passed.

        Raises:
            BadRequestError: the model cannot compute from them.
        """
        try:
            # onnxruntime reads numpy's native order only, which is the wire's on every CPU it has.
            values = self._session.run(names, dict(inputs))
        except _NATIVE_ERRORS as error:
            # The same graph computed its self-test, so what differs is the caller's input.
            raise BadRequestError(
                f"model {self.ref} cannot compute from these inputs: {_first_line(error)}"
            ) from error
        return dict(zip(names, values, strict=True))

    def estimate_s(self, num_bytes: int) -> float:
        """Guess how long a request of this many bytes computes, from the self-test's time."""
        return self._zeros_s * (1 + num_bytes / self._zeros_bytes)

    def check(self, inputs: Mapping[str, Array], outputs: tuple[str, ...]) -> tuple[str, ...]:
        """Check that inputs and outputs are the model's, and name the outputs to compute.

        Raises:
            BadRequestError: they are not.
        """
        if inputs.keys() != self._inputs.keys():
            raise BadRequestError(
                f"model {self.ref} takes inputs {sorted(self._inputs)}, "
                f"got {excerpt(sorted(inputs))}"
            )
        for name, array in inputs.items():
            spec = self._inputs[name]
            if array.dtype != spec.datatype.dtype:
                raise BadRequestError(
                    f"input '{name}' must be {spec.datatype} (numpy {spec.datatype.dtype}), "
                    f"got {array.dtype}"
                )
            if not spec.fits(array.shape):
                raise BadRequestError(
                    f"input '{name}' must have shape {list(spec.shape)} (-1: any), "
                    f"got {list(array.shape)}"
                )
        unknown = [name for name in outputs if name not in self._output_names]
        if unknown:
            raise BadRequestError(
                f"model {self.ref} gives outputs {list(self._output_names)}, not {excerpt(unknown)}"
            )
        return outputs or self._output_names

    def rows(self, inputs: Mapping[str, Array]) -> int:
        """Count the rows of inputs: 1 where a first dimension is no batch, or they differ."""
        lengths = {array.shape[:1] for array in inputs.values()}
        if self._has_batch and len(lengths) == 1:
            return int(lengths.pop()[0])
        return 1

    def _self_test(self) -> dict[str, Array]:
        """Compute zeros of the smallest shape that the model takes, and give them back."""
        failure: BadRequestError | None = None
        for dim in _TRIAL_DIMS:
            zeros = {spec.name: _zeros(spec, dim) for spec in self.inputs}
            try:
                outputs = self.run(zeros)
            except BadRequestError as error:
                failure = error
                continue
            for spec in self.outputs:
                if outputs[spec.name].dtype != spec.datatype.dtype:
                    raise ModelError(
                        f"model {self.ref} fails its self-test: output '{spec.name}' is "
                        f"{outputs[spec.name].dtype}, declared is {spec.datatype}"
                    )
            return zeros
        raise ModelError(f"model {self.ref} fails its self-test on zeros: {failure}")

    def _test_rows(self) -> bool:
        """Tell whether rows computed together give what each gives alone."""
        if not self._has_batch:
            return False
        try:
            alone = [self.run(self._trial(value)) for value in _TRIAL_VALUES]
            rows = [self._trial(value) for value in _TRIAL_VALUES]
            together = self.run(
                {name: np.concatenate([row[name] for row in rows]) for name in self._inputs}
            )
        except BadRequestError:
            return False
        return all(
            _nearly_equal(together[name], np.concatenate([outputs[name] for outputs in alone]))
            for name in self._output_names
        )

    def _trial(self, value: int) -> dict[str, Array]:
        """Make one row of inputs that hold nothing but a value."""
        return {
            name: zeros + zeros.dtype.type(value) if zeros.dtype != object else zeros + str(value)
            for name, zeros in self._zeros.items()
        }

    def _time(self, zeros: Mapping[str, Array]) -> float:
        def timed() -> float:
            start = time.perf_counter()
            self.run(zeros)
            return time.perf_counter() - start

        return min(timed() for _ in range(_TIMED_RUNS))


def _open_session(ref: ModelRef, content: bytes, num_threads: int) -> Any:
    options = ort.SessionOptions()
    # Explicit counts also keep onnxruntime from pinning threads, which containers forbid.
    options.intra_op_num_threads = num_threads
    options.inter_op_num_threads = 1
    options.add_session_config_entry("session.intra_op.allow_spinning", "0")
    options.log_severity_level = 4  # its errors reach the caller as exceptions
    try:
        session = ort.InferenceSession(content, options, providers=["CPUExecutionProvider"])
    except _NATIVE_ERRORS as error:
        raise ModelError(
            f"model {ref} at {ref.path} is no ONNX model that onnxruntime {ort.__version__} "
            f"can load: {_first_line(error)}"
        ) from error
    # It keeps the file for other providers to fall back on, which doubles the model's memory.
    session._model_bytes = None
    return session


def _specs(ref: ModelRef, nodes: Iterable[Any]) -> tuple[TensorSpec, ...]:
    specs = []
    for node in nodes:
        datatype = _DATATYPES.get(node.type)
        if datatype is None:
            raise ModelError(
                f"model {ref}: '{node.name}' is a {node.type}, which the protocol cannot carry; "
                "export the model with plain tensors"
            )
        shape = tuple(dim if isinstance(dim, int) else -1 for dim in node.shape)
        specs.append(TensorSpec(name=node.name, datatype=datatype, shape=shape))
    return tuple(specs)


def _zeros(spec: TensorSpec, dim: int) -> Array:
    """Make zeros (or empty strings) of a batch of one; other variable dimensions are `dim`."""
    shape = tuple(
        given if given != -1 else (1 if axis == 0 else dim) for axis, given in enumerate(spec.shape)
    )
    if spec.datatype is Datatype.BYTES:
        return np.full(shape, "", dtype=object)
    return np.zeros(shape, spec.datatype.dtype)


def _nearly_equal(left: Array, right: Array) -> bool:
    if left.shape != right.shape:
        return False
    if left.dtype.kind != "f":
        return bool((left == right).all())
    return bool(np.allclose(left, right, rtol=1e-3, atol=1e-5, equal_nan=True))


def _first_line(error: Exception) -> str:
    lines = str(error).strip().splitlines()
    return lines[0] if lines else type(error).__name__
