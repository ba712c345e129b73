"""The released networks under the paper's protocol, against the numbers their weights give."""

import numpy as np
import pytest
import torch

from fastinterp.data import load_dataset
from fastinterp.evaluation import accuracy, choose_examples, evaluate_pgd
from fastinterp.models import create_model, load_weights

# clean accuracy in percent on all 10,000 test images
CLEAN = {"normal": 98.41, "adv": 96.60, "trades": 96.87, "int": 93.31}
# accuracy under PGD-200 with step 0.01 on 200 images; None was not published
PGD = {
    "normal": {0.1: 0.045},
    "adv": {0.1: 0.940, 0.2: 0.925, 0.3: 0.890},
    "trades": {0.3: 0.885},
    "int": {0.1: 0.905, 0.2: 0.840, 0.3: 0.790},
}


@pytest.fixture(scope="module")
def mnist(data_dir):
    return load_dataset("mnist", data_dir).test


def load(released, method):
    net = create_model("small", 1, 10)
    load_weights(net, released / f"mnist_smallgap_{method}_100.npz")
    return net


def test_examples_are_those_of_the_paper():
    expected = np.random.RandomState(99).permutation(10_000)[:200]
    assert np.array_equal(choose_examples(10_000, 200, 99).numpy(), expected)
    assert torch.equal(choose_examples(7, 0, 99), torch.arange(7))
    with pytest.raises(ValueError, match=r"between 0 \(all\) and 7, got 8"):
        choose_examples(7, 8, 99)


@pytest.mark.parametrize("method", CLEAN)
def test_clean_accuracy_of_the_released_networks(mnist, released, method):
    x, y = mnist.batch(slice(None))
    assert 100 * accuracy(load(released, method), x, y) == pytest.approx(CLEAN[method], abs=0.05)


@pytest.mark.parametrize("method", ["normal", "int"])
def test_one_radius_of_the_released_networks(mnist, released, method):
    eps = 0.1
    index = choose_examples(len(mnist), 200, 99)
    scores = evaluate_pgd(
        load(released, method), mnist, index, eps=[eps], steps=200, step_size=0.01
    )
    assert scores["results"][0]["accuracy"] == pytest.approx(PGD[method][eps], abs=0.01)


@pytest.mark.slow
@pytest.mark.parametrize("method", PGD)
def test_every_radius_of_the_released_networks(mnist, released, method):
    index = choose_examples(len(mnist), 200, 99)
    scores = evaluate_pgd(
        load(released, method), mnist, index, eps=list(PGD[method]), steps=200, step_size=0.01
    )
    for entry in scores["results"]:
        assert entry["accuracy"] == pytest.approx(PGD[method][entry["eps"]], abs=0.01)


def test_batches_and_models_without_a_cam_head(mnist):
    from torch import nn

    net = nn.Sequential(nn.Flatten(), nn.Linear(784, 10))
    index = choose_examples(len(mnist), 30, 1)
    arguments = dict(eps=[0.0, 0.02], steps=3, step_size=0.01)
    seen = []
    together = evaluate_pgd(net, mnist, index, **arguments)
    apart = evaluate_pgd(net, mnist, index, **arguments, batch_size=7, progress=seen.append)
    assert together["examples"] == 30 and sum(seen) == 60
    for a, b in zip(together["results"], apart["results"], strict=True):
        assert a["accuracy"] == pytest.approx(b["accuracy"])
    assert together["results"][0]["accuracy"] == pytest.approx(together["clean_accuracy"])
    x, y = mnist.batch(index)
    assert together["clean_accuracy"] == pytest.approx(
        (net(x).argmax(1) == y).double().mean().item()
    )
