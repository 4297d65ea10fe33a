"""A simulation as one writes it by hand: torch, one device after the other, nothing else."""

import time
from typing import Any

import torch
from harness import answer_requests
from rivals.simulation_work import LEARNING_RATE, Work, batches, network, pace


def answer(request: dict[str, Any]) -> dict[str, Any]:
    """Run all rounds."""
    work = Work.load(request["work"])
    model = network(work.first)
    loss_of = torch.nn.CrossEntropyLoss()
    data = [
        (torch.from_numpy(work.inputs[own]), torch.from_numpy(work.targets[own]))
        for own in work.devices
    ]
    shared = [parameter.detach().clone() for parameter in model.parameters()]
    stamps: list[float] = []
    for cohort in work.cohorts:
        total, weight = [torch.zeros_like(value) for value in shared], 0
        for device in cohort:
            with torch.no_grad():
                for parameter, value in zip(model.parameters(), shared, strict=True):
                    parameter.copy_(value)
            optimiser = torch.optim.SGD(model.parameters(), lr=LEARNING_RATE)
            for inputs, targets in batches(*data[device]):
                optimiser.zero_grad()
                loss_of(model(inputs), targets).backward()
                optimiser.step()
            count = len(data[device][0])
            with torch.no_grad():
                for held, parameter in zip(total, model.parameters(), strict=True):
                    held.add_(parameter, alpha=count)
            weight += count
        shared = [held / weight for held in total]
        stamps.append(time.perf_counter())
    return {"pace": pace(stamps), "accuracy": work.accuracy([w.numpy() for w in shared])}


if __name__ == "__main__":
    answer_requests(answer)
