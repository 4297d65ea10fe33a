"""Flower's apps on our devices and Flower's strategies in our coordinator.

| module | what |
|---|---|
| `config` | `[federation.flower]` of a project |
| `arrays` | which tensors of the global model a Flower app sees, in which order, by which name |
| `folder` | what a project folder says of its app; what a device names as its trainer |
| `app` | a `ClientApp`, a client class or a `client_fn` as a `LocalTrainer` |
| `strategy` | a strategy of either kind as one pure step of a round |
| `state` | what a strategy keeps between rounds, as data |
| `fit_strategy` | the older kind, `flwr.server.strategy` |
| `train_strategy` | the newer kind, `flwr.serverapp.strategy` |

Only public names of flwr are used, but for two that its documentation leaves out (`runtime`). None
of Flower's servers, links or command lines runs: bytes travel over our own wire alone, as
safetensors and protobuf. Flower reports its use to its makers; that is switched off before flwr is
loaded, here, since whoever loads flwr with Minga loads this first.

None of `config`, `arrays`, `folder` and `strategy` loads flwr before it is used.
"""

import os

os.environ["FLWR_TELEMETRY_ENABLED"] = "0"
