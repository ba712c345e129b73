"""Attacks against maps: the paper's numbers, every goal on every map, nothing left changed."""

import numpy as np
import pytest
import torch

from fastinterp.attacks import attack_interpretation, released_draws
from fastinterp.attacks.interpretation import mass_center
from fastinterp.data import load_dataset
from fastinterp.models import create_model, init_paper, load_weights
from fastinterp.ops import kendall_tau

HOW = dict(eps=0.1, step_size=0.02, steps=6)


@pytest.fixture
def problem():
    net = create_model("small", 1, 10)
    init_paper(net, np.random.RandomState(99))
    return net, torch.rand(4, 1, 28, 28), torch.randint(0, 10, (4,))


def attack(problem, **how):
    return attack_interpretation(
        *problem, **(HOW | how), generator=torch.Generator().manual_seed(1)
    )


def options(map):
    return dict(map=map, map_options=dict(steps=4) if map == "integrated_gradients" else None)


@pytest.mark.parametrize("map", ["cam", "grad_cam", "integrated_gradients"])
def test_each_goal_is_reached_on_each_map(problem, map):
    net, x, _ = problem
    result = attack(problem, **options(map))
    maps, moved = (m.flatten(1) for m in (result.maps, result.maps_adv))
    top = maps.topk(8, dim=1).indices
    assert (moved.gather(1, top).sum(1) < maps.gather(1, top).sum(1)).all()
    assert (result.x_adv - x).abs().max() <= 0.1 + 1e-6
    assert result.x_adv.min() >= 0 and result.x_adv.max() <= 1
    assert torch.equal(result.unchanged, net(result.x_adv).argmax(1) == net(x).argmax(1))

    result = attack(problem, goal="mass_center", steps=12, **options(map))
    moved = (mass_center(result.maps_adv) - mass_center(result.maps)).norm(dim=1)
    assert (moved > 0.01).all()

    wanted = result.maps.flip(-1)
    result = attack(problem, goal="target", target_map=wanted, **options(map))
    before, after = ((m - wanted).flatten(1).norm(dim=1) for m in (result.maps, result.maps_adv))
    assert (after < before).all()


def test_grad_cam_is_the_cam_of_this_network_divided_by_its_cells(problem):
    cam, grad_cam = attack(problem), attack(problem, map="grad_cam")
    torch.testing.assert_close(grad_cam.maps, cam.maps / 49, rtol=1e-4, atol=1e-6)
    torch.testing.assert_close(grad_cam.x_adv, cam.x_adv, rtol=0, atol=1e-5)


def test_center_of_mass():
    maps = torch.zeros(2, 3, 5)
    maps[0, 1, 4], maps[1, 0, 0], maps[1, 2, 0] = -2.0, 1.0, 3.0
    torch.testing.assert_close(mass_center(maps), torch.tensor([[1.0, 4.0], [1.5, 0.0]]))


def test_the_prediction_can_be_held(problem):
    net, x, _ = problem
    free, held = attack(problem, steps=20), attack(problem, steps=20, keep_prediction=100.0)
    predicted = net(x).argmax(1)[:, None]
    logits = (net(r.x_adv).log_softmax(1).gather(1, predicted) for r in (free, held))
    assert next(logits).mean() < next(logits).mean()


def test_the_same_seed_gives_the_same_images(problem):
    assert torch.equal(attack(problem).x_adv, attack(problem).x_adv)


def test_released_draws_are_numpys():
    draws = released_draws(50, 3, (2, 4, 5), classes=7)
    rng = np.random.RandomState(99)
    index, shift = rng.permutation(50)[:3], rng.randint(6, size=3)
    start = rng.uniform(-0.3, 0.3, (3, 4, 5, 2)).transpose(0, 3, 1, 2)
    assert np.array_equal(draws.index, index) and np.array_equal(draws.shift, shift)
    np.testing.assert_allclose(draws.start(0.3), start, rtol=0, atol=1e-15)
    y = torch.tensor([0, 5, 6])
    assert (draws.target(y, 7) != y).all()


def test_bad_arguments(problem):
    net, x, y = problem
    for how, message in (
        (dict(goal="topk"), "goal must be one of top_k, mass_center, target, got 'topk'"),
        (dict(map="cams"), "map must be one of cam, grad_cam, integrated_gradients, got 'cams'"),
        (dict(k=50), "k must lie between 1 and the map's 49 cells, got 50"),
        (dict(goal="target"), "give both or neither"),
        (
            dict(goal="target", target_map=torch.zeros(3)),
            r"target_map must be broadcastable to the maps \(4, 7, 7\), got \(3,\)",
        ),
    ):
        with pytest.raises(ValueError, match=message):
            attack(problem, **how)
    with pytest.raises(ValueError, match=r"y must lie in \[0, 9\]"):
        attack((net, x, y + 10))


@pytest.mark.slow
@pytest.mark.parametrize(
    ("method", "eps", "tau", "images"),
    [
        *(("normal", 0.2, 0.348, 7), ("normal", 0.3, -0.09, 1), ("adv", 0.2, 0.910, 195)),
        *(("int", 0.2, 0.941, 190), ("int", 0.3, 0.913, 183)),
    ],
)
def test_tau_of_the_released_networks(data_dir, released, method, eps, tau, images):
    split = load_dataset("mnist", data_dir).test
    draws = released_draws(len(split), 200, (1, 28, 28))
    x, y = split.batch(draws.index)
    net = create_model("small", 1, 10)
    load_weights(net, released / f"mnist_smallgap_{method}_100.npz")
    result = attack_interpretation(net, x, y, eps=eps, start=draws.start(eps).float())
    maps, maps_adv = (m[result.unchanged].flatten(1) for m in (result.maps, result.maps_adv))
    assert len(maps) == pytest.approx(images, abs=1)
    assert kendall_tau(maps, maps_adv).mean().item() == pytest.approx(tau, abs=0.01)
