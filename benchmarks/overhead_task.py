"""The Task of `overhead.py`: will a milling machine fail? It tells when each epoch has ended."""

# ruff: noqa: D102, RUF012 - a Task as researchers write it

import time
from pathlib import Path

import numpy as np
import torch
from torch import nn

from minga.training import Maximize, Split, Splits, Task, loguniform

NUM_ROWS = 10_000
COLUMNS = ("air_temp_k", "process_temp_k", "speed_rpm", "torque_nm", "tool_wear_min")


class MachineFailure(Task):
    """Tells failures from five sensors and the machine's type, with one or two hidden layers."""

    name = "machine-failure"
    columns = (*COLUMNS, "type_l", "type_m", "type_h")
    defaults = {
        "lr": 1e-3,
        "hidden": 64,
        "layers": 1,
        "batch_size": 64,
        "times": "",
        "turns": "",
        "side": "",
    }
    search_space = {"lr": loguniform(1e-4, 1e-2)}
    objective = Maximize("average_precision")

    def data(self, source):
        inputs, targets = read(source)
        order = np.random.default_rng(0).permutation(len(inputs))
        parts = np.split(order, [int(0.6 * len(order)), int(0.8 * len(order))])
        splits = [Split(inputs=inputs[part], targets=targets[part]) for part in parts]
        return Splits(train=splits[0], validation=splits[1], test=splits[2])

    def model(self, params):
        self.times = str(params["times"])
        self.side = None
        if params["turns"]:
            from turns import Side

            self.side = Side(str(params["turns"]), str(params["side"]))
        hidden = int(params["hidden"])
        layers = [nn.Linear(len(self.columns), hidden), nn.ReLU()]
        for _ in range(int(params["layers"]) - 1):
            layers += [nn.Linear(hidden, hidden), nn.ReLU()]
        return nn.Sequential(*layers, nn.Linear(hidden, 1), nn.Flatten(0))

    def loss(self, outputs, targets):
        return nn.functional.binary_cross_entropy_with_logits(outputs, targets)

    def metrics(self, outputs, targets):
        from sklearn.metrics import average_precision_score

        value = float(average_precision_score(targets, outputs))
        if self.times:
            with Path(self.times).open("a", encoding="ascii") as file:
                file.write(f"{time.time()}\n")
        if self.side:
            self.side.epoch_ended()
        return {"average_precision": value}


def read(source):
    """Read ai4i2020, or make a set of its shape where the file is absent: `made`."""
    if Path(source).name == "made":
        generator = np.random.default_rng(1)
        inputs = generator.normal(size=(NUM_ROWS, 8)).astype(np.float32)
        risk = inputs[:, 3] + inputs[:, 4] * inputs[:, 2] + generator.normal(size=NUM_ROWS)
        return inputs, (risk > np.quantile(risk, 0.966)).astype(np.float32)
    import pandas as pd

    table = pd.read_csv(source)
    kinds = [(table["type"] == kind).to_numpy(np.float32) for kind in "LMH"]
    inputs = np.column_stack([table[name].to_numpy(np.float32) for name in COLUMNS] + kinds)
    return inputs, table["failure"].to_numpy(np.float32)


def plain_loop(task, splits, params, *, epochs, seed):
    """Train without Minga, as one would by hand.

    The same network, batches, clipping and validation as `minga.training.loop`.
    """
    torch.set_num_threads(1)
    torch.manual_seed(seed)
    mean = torch.tensor(splits.train.inputs.mean(0))
    deviation = torch.tensor(splits.train.inputs.std(0))
    network = task.model(params)
    optimiser = torch.optim.Adam(network.parameters(), lr=params["lr"])
    train = [torch.tensor(array) for array in (splits.train.inputs, splits.train.targets)]
    inputs = torch.tensor(splits.validation.inputs)
    for _ in range(epochs):
        network.train()
        losses = []
        for part in torch.randperm(len(train[0])).split(params["batch_size"]):
            optimiser.zero_grad()
            loss = task.loss(network((train[0][part] - mean) / deviation), train[1][part])
            loss.backward()
            nn.utils.clip_grad_norm_(network.parameters(), 5.0)
            optimiser.step()
            losses.append(loss.detach())
        torch.stack(losses).mean().item()
        network.eval()
        with torch.inference_mode():
            outputs = network((inputs - mean) / deviation)
            task.loss(outputs, torch.tensor(splits.validation.targets)).item()
        task.metrics(outputs.numpy(), splits.validation.targets)
