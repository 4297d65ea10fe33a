"""The node's side: it takes no time and gives weights of its own."""

import numpy as np
from flwr.app import ArrayRecord, Context, Message, MetricRecord, RecordDict
from flwr.clientapp import ClientApp

app = ClientApp()


@app.train()
def train(message: Message, context: Context) -> Message:
    """Move every weight by this node's own step."""
    step = np.float32(0.001 * (int(context.node_config["partition-id"]) + 1))
    weights = [array + step for array in message.content["arrays"].to_numpy_ndarrays()]
    content = RecordDict(
        {"arrays": ArrayRecord(weights), "metrics": MetricRecord({"num-examples": 1})}
    )
    return Message(content=content, reply_to=message)
