"""The one training loop."""

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from minga.training import Batch, Maximize, Minimize, Split
from minga.training.errors import DataError, DivergedError, TaskError
from minga.training.evaluate import evaluate, predict
from minga.training.history import best_record, is_stalled
from minga.training.loop import Learner, Shard, _batches, fit
from minga.training.network import build_network, parameters_of
from minga.training.weighting import weighted_loss, weights_of


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


def test_gradients_are_clipped(blobs, splits):
    """No step follows a gradient longer than `max_grad_norm`; shorter ones stay as they are."""
    learner = learner_of(blobs, splits, max_grad_norm=0.2)
    before, after = [], []

    def length():
        return float(torch.stack([p.grad.norm() for p in learner.network.parameters()]).norm())

    learner.optimiser.register_step_pre_hook(lambda *_: after.append(length()))
    fit(learner, splits.train, epochs=3, seed=7, on_gradient=lambda: before.append(length()))
    assert min(before) < 0.2 < max(before)
    assert after == pytest.approx([min(norm, 0.2) for norm in before], rel=1e-4)


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
    """The best epoch is the objective's, of ties the last; one without a value is none."""
    history = [{"epoch": 1, "m": 0.5}, {"epoch": 2, "m": float("nan")}, {"epoch": 3, "m": 0.7}]
    assert best_record(history, Maximize("m"))["epoch"] == 3
    assert best_record(history, Minimize("m"))["epoch"] == 1
    assert best_record(history, Maximize("other")) == {}
    tied = [{"epoch": 1, "m": 0.7}, *history]
    assert best_record(tied, Maximize("m")) is history[-1], "the one that has learned longest"


def test_prediction_does_not_depend_on_the_batch(blobs, splits):
    """Predicting leaves dropout off, gives the same for any batch, and the mode as it was."""
    network = build_network(blobs, blobs.defaults, splits.train, seed=1)
    whole = predict(network, splits.test.inputs)
    np.testing.assert_allclose(predict(network, splits.test.inputs[:7]), whole[:7], atol=1e-6)
    assert network.training
    assert set(evaluate(blobs, network, splits.test)) == {"loss", "accuracy"}


@pytest.mark.parametrize(
    "params", [{"schedule": "cosine", "warmup": 0.2}, {"accumulate": 3, "schedule": "linear"}]
)
def test_schedules_go_on_from_a_state(blobs, splits, params):
    """A rate in the middle of its schedule is what a stopped training goes on with."""
    whole, first, second = (learner_of(blobs, splits, **params) for _ in range(3))
    fit(whole, splits.train, epochs=4, seed=5)
    fit(first, splits.train, epochs=4, seed=5, on_epoch=lambda record: record["epoch"] == 2)
    second.load(first.state())
    fit(second, splits.train, epochs=4, seed=5)
    assert same(whole, second)
    assert whole.schedule.get_last_lr()[0] == pytest.approx(0, abs=1e-6)


def test_rate_rises_and_falls(blobs, splits):
    """Warm-up ends at the full rate; a cosine is at half of it half-way through the rest."""
    learner = learner_of(blobs, splits, schedule="cosine", warmup=0.2)
    learner.plan(100)
    rates = []
    for _ in range(100):
        rates.append(learner.optimiser.param_groups[0]["lr"])
        learner.optimiser.step()
        learner.schedule.step()
    assert rates[0] == pytest.approx(0.01 / 20)
    assert rates[19] == pytest.approx(0.01)
    assert rates[60] == pytest.approx(0.005)
    assert max(rates) == pytest.approx(0.01)


@pytest.mark.parametrize(
    ("params", "words"),
    [
        ({"schedule": "steps"}, "use constant, linear, cosine"),
        ({"warmup": 1.0}, "warmup = 1.0 is no share"),
        ({"class_weights": "heavy"}, "use none or balanced"),
    ],
)
def test_hyper_parameters_without_a_meaning_are_refused(blobs, splits, params, words):
    """What the loop does not understand is said before the first step."""
    with pytest.raises(TaskError, match=words):
        fit(learner_of(blobs, splits, **params), splits.train, epochs=1, seed=1)


def test_pieces_make_the_step_of_the_whole(blobs, splits):
    """Gradients of a batch's pieces add up to the batch's, and so do their losses."""
    learners = [learner_of(blobs, splits, accumulate=pieces) for pieces in (1, 4)]
    for learner in learners:
        for layer in learner.network.modules():
            if isinstance(layer, nn.Dropout):
                layer.p = 0.0  # it draws anew for each piece
        fit(learner, splits.train, epochs=2, seed=5)
    one, four = (parameters_of(learner.network) for learner in learners)
    for name in one:
        np.testing.assert_allclose(one[name], four[name], atol=1e-5)
    losses = [learner.history[-1]["train_loss"] for learner in learners]
    assert losses[0] == pytest.approx(losses[1], rel=1e-4)


def test_weighted_loss_is_that_of_torch():
    """Balanced weights, over all examples, give what torch's own class weights give."""
    generator = torch.Generator().manual_seed(3)
    outputs = torch.randn(60, 3, generator=generator)
    targets = torch.tensor([0] * 40 + [1] * 15 + [2] * 5)
    weights = weights_of({"class_weights": "balanced"}, targets.numpy())
    by_class = torch.tensor([60 / (3 * 40), 60 / (3 * 15), 60 / (3 * 5)])
    ours = weighted_loss(nn.functional.cross_entropy, outputs, targets, weights)
    torch.testing.assert_close(ours, nn.functional.cross_entropy(outputs, targets, by_class))


def test_balanced_classes_raise_the_rare_one(blobs, splits):
    """With balanced weights more examples are taken for the rare class."""

    def share(**params):
        learner = learner_of(blobs, splits, **params)
        fit(learner, splits.train, epochs=4, seed=1)
        return (predict(learner.network, splits.test.inputs) > 0).mean()

    assert share(class_weights="balanced") > share() + 0.05


def test_weights_need_classes(blobs):
    """Targets that are measurements cannot be balanced."""
    with pytest.raises(TaskError, match=r"of shape \(2000,\), have 2000 distinct values"):
        weights_of({"class_weights": "balanced"}, np.linspace(0, 1, 2000))


def test_half_precision_keeps_whole_weights(blobs, splits):
    """Computing in bfloat16 gives other bits, a falling loss, and weights in float32."""
    params = blobs.defaults
    networks = [build_network(blobs, params, splits.train, seed=1) for _ in range(2)]
    half, whole = (
        Learner(blobs, networks[0], params, half=torch.bfloat16),
        Learner(blobs, networks[1], params),
    )
    for learner in (half, whole):
        fit(learner, splits.train, epochs=4, seed=5)
    assert not same(half, whole)
    assert half.history[-1]["train_loss"] < half.history[0]["train_loss"]
    assert {tensor.dtype for tensor in half.network.parameters()} == {torch.float32}


@pytest.mark.parametrize(
    ("values", "patience", "min_gain", "stalled"),
    [
        ([0.5, 0.6, 0.6, 0.6], 2, 0.0, True),
        ([0.5, 0.6, 0.6, 0.7], 2, 0.0, False),
        ([0.5, 0.51, 0.52, 0.53], 2, 0.1, True),
        ([0.5, 0.5, 0.5], 0, 0.0, False),
        ([float("nan")] * 3, 3, 0.0, True),
    ],
)
def test_patience_ends(values, patience, min_gain, stalled):
    """Training stalls once enough epochs in a row gained nothing, and never without patience."""
    history = [{"epoch": epoch, "m": value} for epoch, value in enumerate(values, start=1)]
    assert is_stalled(history, Maximize("m"), patience=patience, min_gain=min_gain) == stalled
    turned = [{**record, "m": -record["m"]} for record in history]
    assert is_stalled(turned, Minimize("m"), patience=patience, min_gain=min_gain) == stalled
