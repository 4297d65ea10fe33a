"""What every server of `serving.py` is told, in an environment of its own: model and ports.

Each runs as `python -m rivals.serve_NAME` and answers for one network, named `net`, whose input
is `input` and whose output is `output`. Like ours it runs onnxruntime on one thread.
"""

import os
from pathlib import Path
from typing import Any, Final

NAME: Final = "net"
MODEL: Final = Path(os.environ.get("MINGA_BENCH_MODEL", ""))
HTTP_PORT: Final = int(os.environ.get("MINGA_BENCH_HTTP_PORT", "0"))
GRPC_PORT: Final = int(os.environ.get("MINGA_BENCH_GRPC_PORT", "0"))
MAX_BATCH: Final = int(os.environ.get("MINGA_BENCH_MAX_BATCH", "1"))
"""Rows that may be computed together; 1 where batching costs more than it brings."""


def session() -> Any:
    """Open the network in onnxruntime."""
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = 1
    options.inter_op_num_threads = 1
    options.log_severity_level = 4
    return onnxruntime.InferenceSession(str(MODEL), options, providers=["CPUExecutionProvider"])
