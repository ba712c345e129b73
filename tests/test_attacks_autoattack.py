"""AutoAttack beside our own numbers, what it leaves behind, and the strong protocol with it."""

import sys

import pytest
import torch
from torch import nn

from fastinterp.attacks import pgd
from fastinterp.attacks.autoattack import VERSIONS, autoattack
from fastinterp.cli import main
from fastinterp.data import load_dataset
from fastinterp.evaluation import accuracy

pyautoattack = pytest.importorskip("pyautoattack", reason="pyautoattack is not installed")


@pytest.fixture(scope="module")
def problem():
    """A small network that was fitted to digits, and images of them."""
    torch.manual_seed(0)
    data = load_dataset("digits").test
    x, y = data.batch(torch.arange(60))
    net = nn.Sequential(
        nn.Conv2d(x.shape[1], 12, 5, stride=2),
        nn.ReLU(),
        nn.Conv2d(12, 24, 5, stride=2),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
        nn.Linear(24, 10),
    )
    optimizer = torch.optim.Adam(net.parameters(), 1e-2)
    for _ in range(60):
        optimizer.zero_grad()
        nn.functional.cross_entropy(net(x), y).backward()
        optimizer.step()
    optimizer.zero_grad()
    return net, x, y


def attack(problem, **how):
    return autoattack(
        *problem, **(dict(eps=0.03) | how), generator=torch.Generator().manual_seed(1)
    )


def test_clean_accuracy_is_its_own_and_robust_accuracy_no_more_than_pgds(problem):
    net, x, y = problem
    theirs = pyautoattack.AutoAttack(net, eps=0.03, seed=0)
    assert theirs.clean_accuracy(x, y) == pytest.approx(accuracy(net, x, y))
    state = torch.get_rng_state()
    x_adv = attack(problem, version="apgd")
    robust = accuracy(net, x_adv, y)
    weak = accuracy(net, pgd(net, x, y, eps=0.03, step_size=0.01, steps=20), y)
    assert robust <= weak < accuracy(net, x, y)
    assert (x_adv - x).abs().max() <= 0.03 + 1e-6
    assert x_adv.min() >= 0 and x_adv.max() <= 1
    assert torch.equal(torch.get_rng_state(), state)
    # an image that was not beaten is returned as it was
    spared = net(x_adv).argmax(1) == y
    assert torch.equal(x_adv[spared], x[spared])
    torch.testing.assert_close(attack(problem, version="apgd"), x_adv)


def test_standard_is_what_the_package_calls_so():
    assert (
        tuple(pyautoattack.AutoAttack(None, version="standard").attacks_to_run)
        == (VERSIONS["standard"])
    )


def test_model_tracing_and_gradients_are_as_before(problem, monkeypatch):
    net, x, y = problem
    net.train()

    def trace(*_):
        return None

    before = sys.gettrace()
    sys.settrace(trace)
    try:
        few = net, x[:4], y[:4]
        folded = attack(few, version="apgd")
        assert sys.gettrace() is trace
    finally:
        sys.settrace(before)
    assert net.training and all(p.grad is None and p.requires_grad for p in net.parameters())
    monkeypatch.setenv("FASTINTERP_FOLD", "off")
    plain = attack(few, version="apgd")
    assert accuracy(net, plain, y[:4]) == accuracy(net, folded, y[:4])
    net.eval()


@pytest.mark.parametrize(
    ("how", "message"),
    [
        (dict(version="plus"), "version must be one of standard, apgd, got 'plus'"),
        (dict(norm="l1"), "norm must be Linf, L2 or L1, got 'l1'"),
        (dict(eps=-1.0), "eps"),
    ],
)
def test_bad_arguments(problem, how, message):
    with pytest.raises(ValueError, match=message):
        attack(problem, **how)


def test_three_classes_are_too_few():
    net = nn.Sequential(nn.Flatten(), nn.Linear(4, 3))
    with pytest.raises(ValueError, match="at least 4 classes, this has 3"):
        attack((net, torch.rand(2, 1, 2, 2), torch.tensor([0, 1])))


def test_without_the_package_the_strong_protocol_says_how_to_get_it(tmp_path, capsys, monkeypatch):
    monkeypatch.setitem(sys.modules, "pyautoattack", None)
    monkeypatch.chdir(tmp_path)
    (tmp_path / "weights.npz").touch()
    command = "report weights.npz --protocol strong --dataset digits --model small --device cpu"
    assert main(command.split()) == 1
    assert "pip install pyautoattack" in capsys.readouterr().err
    assert not (tmp_path / "reports").exists()
