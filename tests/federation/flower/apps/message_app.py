"""The newer style: functions of messages, a mod, state, a lifespan."""

import ridge
from flwr.app import ArrayRecord, ConfigRecord, Context, Error, Message, MetricRecord, RecordDict
from flwr.clientapp import ClientApp


def count_calls(message, context, call_next):
    """Count messages in the context's state."""
    counts = context.state.config_records.setdefault("counts", ConfigRecord({"calls": 0}))
    counts["calls"] += 1
    return call_next(message, context)


app = ClientApp(mods=[count_calls])


@app.train()
def train(message: Message, context: Context) -> Message:
    """Train on one partition."""
    config = message.content["config"]
    if config.get("fail"):
        return Message(Error(7, "no data today"), reply_to=message)
    arrays = message.content["arrays"]
    data = ridge.load_data(context.node_config["partition-id"])
    weights = ridge.train(
        arrays.to_numpy_ndarrays(),
        *data,
        epochs=context.run_config["local.epochs"],
        rate=context.run_config["learning-rate"],
    )
    metrics = {
        "num-examples": len(data[0]),
        "loss": ridge.loss_of(weights, *data),
        "calls": context.state["counts"]["calls"],
        "round": config.get("server-round", 0),
    }
    content = RecordDict({"arrays": ArrayRecord(weights), "metrics": MetricRecord(metrics)})
    return Message(content, reply_to=message)


@app.evaluate()
def evaluate(message: Message, context: Context) -> Message:
    """Measure."""
    data = ridge.load_data(context.node_config["partition-id"])
    loss = ridge.loss_of(message.content["arrays"].to_numpy_ndarrays(), *data)
    metrics = MetricRecord({"num-examples": len(data[0]), "loss": loss})
    return Message(RecordDict({"metrics": metrics}), reply_to=message)
