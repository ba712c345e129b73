"""PGD beyond the plain loop: losses, restarts, best iterate, early stop; against foolbox."""

import numpy as np
import pytest
import torch
from torch.nn import functional as F

from fastinterp.attacks import maximise, pgd, random_start
from fastinterp.attacks.losses import LOSSES, beaten, loss_function, margin
from fastinterp.data import load_dataset
from fastinterp.evaluation import choose_examples
from fastinterp.models import create_model, init_paper, load_weights

EPS = 0.1


@pytest.fixture
def problem():
    """Small in float64 and images, of which an attack with eps 0.1 turns some and not others."""
    net = create_model("small", 1, 10).double()
    init_paper(net, np.random.RandomState(99))
    x = torch.rand(16, 1, 28, 28, dtype=torch.float64)
    with torch.no_grad():
        y = net(x).argmax(1)
    return net, x, y


def turned(net, x_adv, y):
    with torch.no_grad():
        return net(x_adv).argmax(1) != y


def attack(problem, **how):
    arguments = dict(eps=EPS, step_size=0.006, steps=6) | how
    return pgd(*problem, **arguments, generator=torch.Generator().manual_seed(3))


@pytest.mark.parametrize("targeted", [False, True])
def test_losses_are_their_formulas(targeted):
    f = torch.randn(7, 5, dtype=torch.float64)
    y = torch.randint(0, 5, (7,))
    goal = (y + 1) % 5 if targeted else y
    for name in LOSSES:
        value = loss_function(name, 5, targeted)(f, y, goal)
        for n in range(7):
            row, s = f[n], f[n].sort(descending=True).values
            rest = torch.cat([row[: goal[n]], row[goal[n] + 1 :]]).max()
            expected = {
                "ce": row.log_softmax(0)[goal[n]] * (1 if targeted else -1),
                "margin": (row[goal[n]] - rest) * (1 if targeted else -1),
                "dlr": (row[goal[n]] - row[y[n]]) / (s[0] - (s[2] + s[3]) / 2)
                if targeted
                else (rest - row[y[n]]) / (s[0] - s[2]),
            }[name]
            torch.testing.assert_close(value[n], expected)
    won = margin(f, y, goal, targeted) > 0
    assert torch.equal(won, beaten(f, goal, targeted))


def test_early_stop_turns_what_the_full_run_turns(problem):
    net, x, y = problem
    full = attack(problem, best=True, loss="margin")
    stopped = attack(problem, early_stop=True, loss="margin")
    success = turned(net, full, y)
    assert 0 < success.sum() < len(y)
    assert torch.equal(success, turned(net, stopped, y))
    # whoever resisted went all the way
    last = attack(problem, loss="margin")
    torch.testing.assert_close(stopped[~success], last[~success])
    assert (stopped - x)[success].abs().mean() < (last - x)[success].abs().mean()


@pytest.mark.parametrize("early_stop", [False, True])
def test_restarts_never_help_the_defender(problem, early_stop):
    net, _, y = problem
    before = torch.zeros(len(y), dtype=torch.bool)
    for restarts in (1, 2, 3):
        x_adv = attack(problem, restarts=restarts, random_start=True, early_stop=early_stop)
        now = turned(net, x_adv, y)
        assert (now >= before).all()
        before = now


def test_best_is_never_below_the_last_iterate(problem):
    net, _, y = problem
    how = dict(step_size=0.08, steps=5, norm="Linf")  # overshoots, so that the last is not the best

    def ce(x_adv):
        return F.cross_entropy(net(x_adv), y, reduction="none")

    best, last = attack(problem, best=True, **how), attack(problem, **how)
    better = ce(best) > ce(last)
    assert better.any() and (better | (ce(best) == ce(last)) | turned(net, best, y)).all()
    assert (turned(net, best, y) >= turned(net, last, y)).all()


def test_a_beaten_point_counts_before_a_larger_value():
    x = torch.zeros(2, 1)

    def objective(z):  # rises with z; only the first example is beaten, and only near 0.1
        return z[:, 0], (z[:, 0] > 0.05) & (z[:, 0] < 0.15) & torch.tensor([True, False])

    z = maximise(objective, x, eps=1.0, step_size=0.1, steps=5, best=True)
    torch.testing.assert_close(z[:, 0], torch.tensor([0.1, 0.5]))


def test_step_size_falls_linearly():
    seen = []

    def objective(z):
        seen.append(z.detach().clone())
        return z.sum(1)

    z = maximise(
        objective,
        torch.zeros(1, 1),
        eps=9.0,
        step_size=0.4,
        final_step_size=0.1,
        steps=4,
        clip=None,
    )
    moves = torch.cat([*seen, z]).diff(dim=0)[:, 0]
    torch.testing.assert_close(moves, torch.tensor([0.4, 0.3, 0.2, 0.1]))


@pytest.mark.parametrize("norm", ["Linf", "L2"])
def test_every_example_has_a_radius_of_its_own(norm):
    x = torch.full((3, 1, 4, 4), 0.5)
    eps = torch.tensor([0.0, 0.1, 0.3])
    z = maximise(
        lambda z: z.sum((1, 2, 3)), x, eps=eps, step_size=0.2, steps=4, norm=norm, restarts=2
    )
    p = torch.inf if norm == "Linf" else 2
    torch.testing.assert_close((z - x).flatten(1).norm(p, dim=1), eps)
    start = random_start(x, eps, norm)
    assert ((start.flatten(1).norm(p, dim=1)) <= eps * 1.00001).all()


@pytest.mark.parametrize("loss", LOSSES)
def test_targeted(problem, loss):
    net, x, y = problem
    target = (y + 3) % 10
    x_adv = attack(problem, loss=loss, target=target, steps=10, eps=0.3, step_size=0.05)
    before, after = (margin(net(z), target, targeted=True) for z in (x, x_adv))
    assert (after > before).all()


def test_the_same_seed_gives_the_same_images(problem):
    how = dict(random_start=True, restarts=3, early_stop=True)
    assert torch.equal(attack(problem, **how), attack(problem, **how))


def test_bad_arguments(problem):
    for how, message in (
        (dict(loss="cw"), "loss must be one of ce, margin, dlr, got 'cw'"),
        (dict(target=problem[2][:3]), r"target must have shape \(16,\), got \(3,\)"),
        (dict(restarts=0), "restarts must be at least 1, got 0"),
    ):
        with pytest.raises(ValueError, match=message):
            attack(problem, **how)
    with pytest.raises(ValueError, match="needs a model of at least 3 classes, this one has 2"):
        loss_function("dlr", 2)
    with pytest.raises(TypeError, match="who is beaten"):
        maximise(
            lambda z, _: z.sum(1), torch.zeros(1, 1), eps=1, step_size=1, steps=1, early_stop=True
        )


@pytest.mark.parametrize("norm", ["Linf", "L2"])
@pytest.mark.parametrize("targeted", [False, True])
def test_agrees_with_foolbox(problem, norm, targeted):
    foolbox = pytest.importorskip("foolbox")
    net, x, y = problem
    eps = 0.1 if norm == "Linf" else 1.5
    start, target = random_start(x, eps, norm), (y + 1) % 10
    base = {
        "Linf": foolbox.attacks.LinfProjectedGradientDescentAttack,
        "L2": foolbox.attacks.L2ProjectedGradientDescentAttack,
    }[norm]

    class FromOurStart(base):
        def get_random_start(self, x0, epsilon):
            return x0 + type(x0)(start)

    theirs = FromOurStart(abs_stepsize=eps / 5, steps=12, random_start=True).run(
        foolbox.PyTorchModel(net.eval(), bounds=(0, 1)),
        x,
        foolbox.criteria.TargetedMisclassification(target)
        if targeted
        else foolbox.criteria.Misclassification(y),
        epsilon=eps,
    )
    ours = pgd(
        net,
        x,
        y,
        target=target if targeted else None,
        eps=eps,
        step_size=eps / 5,
        steps=12,
        norm=norm,
        start=start,
    )
    torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-9)


@pytest.mark.slow
@pytest.mark.parametrize(("method", "eps", "expected"), [("int", 0.35, 0.010), ("int", 0.4, 0.0)])
def test_one_random_start_breaks_the_released_network(data_dir, released, method, eps, expected):
    split = load_dataset("mnist", data_dir).test
    x, y = split.batch(choose_examples(len(split), 200, 99))
    net = create_model("small", 1, 10)
    load_weights(net, released / f"mnist_smallgap_{method}_100.npz")
    generator = torch.Generator().manual_seed(0)
    how = dict(eps=eps, step_size=0.01, steps=200)
    x_adv = pgd(net, x, y, random_start=True, generator=generator, **how)
    survivors = 1 - turned(net, x_adv, y).double().mean().item()
    assert survivors == pytest.approx(expected, abs=0.01)
