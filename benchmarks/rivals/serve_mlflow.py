"""`mlflow models serve`: the ONNX flavour, one worker."""

import os
import sys
import tempfile
from pathlib import Path

import mlflow
import onnx
from rivals.serve_work import HTTP_PORT, MODEL

if __name__ == "__main__":
    folder = Path(tempfile.mkdtemp(prefix="minga-mlflow-")) / "model"
    mlflow.onnx.save_model(
        onnx.load(str(MODEL)),
        folder,
        onnx_session_options={"intra_op_num_threads": 1, "inter_op_num_threads": 1},
        save_as_external_data=False,
    )
    # It calls other programs of its environment by name.
    programs = Path(sys.executable).parent
    os.environ["PATH"] = f"{programs}{os.pathsep}{os.environ['PATH']}"
    program = str(programs / "mlflow")
    where = ["--host", "127.0.0.1", "--port", str(HTTP_PORT), "--workers", "1"]
    os.execv(
        program, [program, "models", "serve", "-m", str(folder), "--env-manager", "local", *where]
    )
