"""What TensorBoard shows of a registered version: its graph, and how it compares with others."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from minga.training.space import Params


def draw_version(
    folder: Path, version: int, onnx: bytes, *, params: Params, metrics: Mapping[str, float]
) -> None:
    """Write a version's graph, and its hyper-parameters with what they came to.

    Args:
        folder: of TensorBoard's files.
        version: its number, which names its own folder.
        onnx: the whole model, preparation included.
        params: for TensorBoard's table of hyper-parameters.
        metrics: on the test split, for the same table.
    """
    # Takes half a second to import, and only those who register need it.
    from tensorboardX import SummaryWriter
    from tensorboardX.summary import hparams

    told = {f"test_{name}": value for name, value in metrics.items()}
    with SummaryWriter(str(folder / f"version-{version}")) as board:
        board.file_writer.add_onnx_graph(_graph(onnx))
        for summary in hparams(dict(params), told):
            board.file_writer.add_summary(summary)
        for name, value in told.items():
            board.add_scalar(name, value)


def _graph(onnx: bytes) -> Any:
    """Give the operators of a model and what flows between them, without the weights.

    tensorboardX has such a function too; it writes to stdout, and whole trees into attributes.
    """
    from onnx import load_from_string
    from tensorboardX.proto.graph_pb2 import GraphDef
    from tensorboardX.proto.node_def_pb2 import NodeDef

    graph = load_from_string(onnx).graph
    maker = {name: node.output[0] for node in graph.node for name in node.output}
    nodes = [NodeDef(name=each.name, op="Input") for each in graph.input]
    nodes += [NodeDef(name=each.name, op="Const") for each in graph.initializer]
    nodes += [
        NodeDef(
            name=node.output[0],
            op=node.op_type,
            input=[maker.get(name, name) for name in node.input if name],
        )
        for node in graph.node
    ]
    return GraphDef(node=nodes)
