"""The one training loop."""

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from minga.training import Batch, Maximize, Minimize, Split
from minga.training.errors import DataError, DivergedError
from minga.training.evaluate import evaluate, predict
from minga.training.history import best_record
from minga.training.loop import Learner, Shard, _batches, fit
from minga.training.network import build_network, parameters_of


def learner_of(task, splits, **params):
    """A fresh learner with the defaults and some other parameters."""
    params = {**task.defaults, **params}
    return Learner(task, build_network(task, params, splits.train, seed=1), params)


def same(one, other):
    """Whether two learners have the same weights, bit by bit."""
    mine, theirs = parameters_of(one.network), parameters_of(other.network)
    return all(np.array_equal(mine[name], theirs[name]) for name in mine)


def test_training_learns(blobs, splits):
    """The loss falls and the metrics rise above chance."""
    learner = learner_of(blobs, splits)
    history = fit(learner, splits.train, epochs=6, seed=1, validation=splits.validation)
    assert history[-1]["train_loss"] < history[0]["train_loss"]
    assert history[-1]["accuracy"] > 0.75
    assert [record["epoch"] for record in history] == [1, 2, 3, 4, 5, 6]


def test_same_seed_gives_the_same_weights(blobs, splits):
    """Training repeats bit by bit, dropout included; another seed gives others."""
    learners = [learner_of(blobs, splits) for _ in range(3)]
    for learner, seed in zip(learners, (5, 5, 6), strict=True):
        torch.rand(3)  # what was drawn before must not matter
        fit(learner, splits.train, epochs=2, seed=seed)
    assert same(learners[0], learners[1])
    assert not same(learners[0], learners[2])


def test_training_goes_on_from_a_state(blobs, splits, tmp_path):
    """Training interrupted after an epoch ends with the weights of an uninterrupted one."""
    whole, first, second = (learner_of(blobs, splits) for _ in range(3))
    fit(whole, splits.train, epochs=4, seed=5, validation=splits.validation)
    fit(first, splits.train, epochs=2, seed=5, validation=splits.validation)
    torch.save(first.state(), tmp_path / "state.pt")
    second.load(torch.load(tmp_path / "state.pt", weights_only=True))
    fit(second, splits.train, epochs=4, seed=5, validation=splits.validation)
    assert same(whole, second)
    assert whole.history == second.history


def test_training_ends_early_when_asked(blobs, splits):
    """The hook sees each record, and True ends training."""
    seen = []

    def stop_at_two(record):
        seen.append(record["epoch"])
        return record["epoch"] == 2

    fit(learner_of(blobs, splits), splits.train, epochs=9, seed=1, on_epoch=stop_at_two)
    assert seen == [1, 2]


def test_thread_count_is_left_as_it_was(blobs, splits):
    """One thread is used inside; the caller's setting comes back."""
    before = torch.get_num_threads()
    fit(learner_of(blobs, splits), splits.train, epochs=1, seed=1)
    assert torch.get_num_threads() == before


def test_divergence_is_explained(blobs, splits):
    """A loss that is no number ends training with the parameters and an advice."""
    with pytest.raises(DivergedError, match=r"epoch 1 .*'lr': 1e\+30.*smaller lr"):
        fit(learner_of(blobs, splits, lr=1e30), splits.train, epochs=3, seed=1)


def test_fewer_examples_than_workers_are_refused(blobs, splits):
    """A worker without an example would block the others."""
    one = Split(inputs=splits.train.inputs[:1], targets=splits.train.targets[:1])
    with pytest.raises(DataError, match="1 training examples for 2 workers"):
        fit(learner_of(blobs, splits), one, epochs=1, seed=1, shard=Shard(num_workers=2))


@given(st.integers(1, 200), st.integers(1, 40), st.integers(1, 5), st.integers(0, 3))
def test_shards_are_disjoint_parts_of_equal_size(num_examples, batch_size, num_workers, seed):
    """Workers take equally many steps of equal size over other examples; few are left out."""
    if num_examples < num_workers:
        return
    numbers = torch.arange(num_examples)
    parts = [
        list(
            _batches(
                Batch(numbers, numbers), batch_size, seed, Shard(rank=rank, num_workers=num_workers)
            )
        )
        for rank in range(num_workers)
    ]
    sizes = {tuple(len(batch.inputs) for batch in part) for part in parts}
    assert len(sizes) == 1
    taken = torch.cat([batch.inputs for part in parts for batch in part])
    assert len(taken.unique()) == len(taken)
    num_batches = -(-num_examples // max(batch_size, 2 * num_workers))
    assert num_examples - len(taken) <= num_batches * (num_workers - 1) + num_workers


def test_workers_compute_the_gradient_of_one(blobs, splits):
    """Mean gradients of two workers' parts are the gradient of the whole batch."""
    network = build_network(blobs, blobs.defaults, splits.train, seed=1).eval()
    examples = Batch(torch.tensor(splits.train.inputs), torch.tensor(splits.train.targets))

    def gradient(shard):
        network.zero_grad()
        blobs.step(network, next(_batches(examples, 32, 7, shard))).backward()
        return torch.cat([value.grad.flatten() for value in network.parameters()])

    halves = [gradient(Shard(rank=rank, num_workers=2)) for rank in (0, 1)]
    torch.testing.assert_close(sum(halves) / 2, gradient(Shard()))


def test_batch_normalisation_survives_a_lone_last_example(blobs, splits, monkeypatch):
    """A last batch of one example, on which batch normalisation fails, is left out."""

    def with_norm(params):
        return torch.nn.Sequential(
            torch.nn.BatchNorm1d(4), torch.nn.Linear(4, 1), torch.nn.Flatten(0)
        )

    monkeypatch.setattr(blobs, "model", with_norm)
    few = Split(inputs=splits.train.inputs[:33], targets=splits.train.targets[:33])
    assert fit(learner_of(blobs, splits), few, epochs=2, seed=1)[-1]["epoch"] == 2


def test_best_record_follows_the_objective():
    """The best epoch is the objective's, and one without a value is none."""
    history = [{"epoch": 1, "m": 0.5}, {"epoch": 2, "m": float("nan")}, {"epoch": 3, "m": 0.7}]
    assert best_record(history, Maximize("m"))["epoch"] == 3
    assert best_record(history, Minimize("m"))["epoch"] == 1
    assert best_record(history, Maximize("other")) == {}


def test_prediction_does_not_depend_on_the_batch(blobs, splits):
    """Predicting leaves dropout off, gives the same for any batch, and the mode as it was."""
    network = build_network(blobs, blobs.defaults, splits.train, seed=1)
    whole = predict(network, splits.test.inputs)
    np.testing.assert_allclose(predict(network, splits.test.inputs[:7]), whole[:7], atol=1e-6)
    assert network.training
    assert set(evaluate(blobs, network, splits.test)) == {"loss", "accuracy"}
