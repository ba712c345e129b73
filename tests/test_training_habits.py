"""What people expect of a training program: schedules, averages, clipping, autocast, traces..."""

import copy
import json
import math
import sys
import types

import pytest
import torch
from safetensors.torch import load_file
from torch.nn import functional as F

from fastinterp.data import Dataset, Split
from fastinterp.models import create_model
from fastinterp.objectives import METHODS
from fastinterp.training import RunOptions, StopRequest, TrainConfig, Trainer
from fastinterp.training.loop import create_objective
from fastinterp.training.metrics import read_metrics
from fastinterp.training.optimizer import create_optimizer
from fastinterp.training.run import execute, prepare, table

SMALL = dict(compare=[], epochs=2, batch_size=12, attack_steps=2, eps=0.1, lr=[1e-2])


def make_split(n, channels):
    generator = torch.Generator().manual_seed(n)
    images = torch.randint(0, 256, (n, channels, 28, 28), dtype=torch.uint8, generator=generator)
    return Split(images, torch.randint(0, 10, (n,), generator=generator))


def make_trainer(folder, channels=1, options=None, **change):
    config = TrainConfig(**(SMALL | change))
    config.check()
    splits = (make_split(n, channels) for n in (50, 12, 20))
    data = Dataset("digits", 10, tuple("0123456789"), *splits)
    return Trainer(config, config.method, data, folder, torch.device("cpu"), options)


def weights(trainer):
    return torch.cat([p.detach().flatten() for p in trainer.model.parameters()])


def test_cosine_and_warm_up():
    config = TrainConfig(lr=[2.0], lr_schedule="cosine", lr_warmup=10)
    assert [config.lr_at(step, 110) for step in (0, 4, 9, 10)] == [0.2, 1.0, 2.0, 2.0]
    assert config.lr_at(60, 110) == pytest.approx(1.0)
    assert config.lr_at(109, 110) == pytest.approx(1 + math.cos(math.pi * 0.99))
    config = TrainConfig(lr=[1.0, 0.1], lr_steps=[4], lr_warmup=2)
    assert [config.lr_at(step, 6) for step in range(6)] == [0.5, 1, 1, 1, 0.1, 0.1]


@pytest.mark.parametrize("name", ["adamw", "sgd"])
def test_weight_decay_spares_vectors(name):
    matrix, vector = (torch.ones(shape, requires_grad=True) for shape in ((3, 2), (3,)))
    optimizer = create_optimizer(name, [matrix, vector], lr=0.1, weight_decay=0.5, momentum=0.9)
    matrix.grad, vector.grad = torch.zeros(3, 2), torch.zeros(3)
    optimizer.step()
    torch.testing.assert_close(matrix.detach(), torch.full((3, 2), 0.95))
    assert torch.equal(vector.detach(), torch.ones(3))


@pytest.mark.parametrize("optimizer", ["adam", "adamw", "sgd"])
def test_every_optimizer_trains_and_resumes_to_the_same_bits(tmp_path, optimizer):
    how = dict(optimizer=optimizer, lr_schedule="cosine", ema=0.9, clip_grad_norm=0.5)
    whole = make_trainer(tmp_path / "whole", **how)
    start = weights(whole)
    whole.run(StopRequest(), quiet=True)
    assert (weights(whole) - start).abs().max() > 1e-4
    first = make_trainer(tmp_path / "parts", options=RunOptions(limit_steps=3), **how)
    first.run(StopRequest(), quiet=True)
    assert first.step == 3
    second = make_trainer(tmp_path / "parts", **how)
    assert second.resume() and second.step == 3
    second.run(StopRequest(), quiet=True)
    assert torch.equal(weights(whole), weights(second))
    for a, b in zip(whole.ema.parameters(), second.ema.parameters(), strict=True):
        assert torch.equal(a, b)


def test_average_of_the_weights(tmp_path):
    trainer = make_trainer(tmp_path, ema=0.75)
    expected = None
    for _ in range(4):
        trainer._step()
        now = weights(trainer).double()
        expected = now if expected is None else 0.75 * expected + 0.25 * now
    averaged = torch.cat([p.flatten() for p in trainer.ema.module.parameters()])
    torch.testing.assert_close(averaged.double(), expected, rtol=1e-5, atol=1e-7)
    assert (averaged - weights(trainer)).abs().max() > 1e-4


def test_the_average_is_evaluated_and_saved(tmp_path):
    trainer = make_trainer(tmp_path / "unused")
    config = TrainConfig(
        **(SMALL | dict(ema=0.5, method="adv", eval_eps=[0.05], eval_steps=1, eval_examples=10))
    )
    data = Dataset("digits", 10, (), trainer.train, make_split(12, 1), make_split(20, 1))
    prepare(tmp_path / "run", config, resume=False)
    device = torch.device("cpu")
    results = execute(tmp_path / "run", config, data, device, resume=False, quiet=True)
    assert [row["method"] for row in results] == ["adv", "adv (ema)"]
    assert "adv (ema)" in table(results)
    raw, averaged = (
        load_file(tmp_path / "run" / "adv" / f"{name}.safetensors") for name in ("model", "ema")
    )
    assert raw.keys() == averaged.keys() and not torch.equal(
        raw["head.weight"], averaged["head.weight"]
    )


def test_clipping(tmp_path):
    trainer = make_trainer(tmp_path, clip_grad_norm=1e-3)
    values, _ = trainer._step()
    assert values["grad_norm"] > 0.01  # what is logged is the norm before
    clipped = torch.cat([p.grad.flatten() for p in trainer.model.parameters()]).norm()
    torch.testing.assert_close(clipped, torch.tensor(1e-3), rtol=1e-3, atol=0)


@pytest.mark.parametrize("method", ["int", "adv", "trades", "ig-norm"])
def test_a_batch_in_parts_has_the_same_gradient(tmp_path, method):
    gradients, logged = [], []
    for parts in (1, 3):
        trainer = make_trainer(tmp_path, method=method, accumulate=parts, ig_steps=1)
        trainer.model.double()
        x, y = trainer._next_batch()
        start = trainer.rng.start(x, 0.1)
        logged.append(trainer.update.backward(x.double(), y, 0.1, start.double()))
        gradients.append(torch.cat([p.grad.flatten() for p in trainer.model.parameters()]))
    torch.testing.assert_close(*gradients, rtol=1e-9, atol=1e-12)
    for name, value in logged[0].items():
        torch.testing.assert_close(value, logged[1][name])


@pytest.mark.parametrize("method", METHODS)
def test_label_smoothing_is_of_the_minimised_cross_entropy(small_net, batch, method):
    x, y = batch
    start = (torch.rand_like(x) - 0.5) * 0.2
    losses = {}
    for smoothing in (0.0, 0.2):
        config = TrainConfig(attack_steps=2, label_smoothing=smoothing)
        net = copy.deepcopy(small_net)
        losses[smoothing], parts = create_objective(config, method, net)(x, y, 0.1, start)
        with torch.no_grad():
            clean = F.cross_entropy(net(x), y, label_smoothing=smoothing)
        if method in ("trades", "int", "int-one-class", "int2", "ig-norm"):
            torch.testing.assert_close(parts["ce"], clean)
        if method == "normal":
            torch.testing.assert_close(losses[smoothing].detach(), clean)
    assert losses[0.0] != losses[0.2]


@pytest.mark.parametrize("method", ["normal", "adv", "trades", "int", "int-adv", "ig-norm"])
@pytest.mark.parametrize("channels_last", [False, True])
def test_bf16_autocast_keeps_weights_gradients_and_loss_in_fp32(tmp_path, method, channels_last):
    how = dict(method=method, channels_last=channels_last, ig_steps=1, attack_steps=1, batch_size=4)
    losses, norms = [], []
    for amp in ("off", "bf16"):
        trainer = make_trainer(tmp_path, amp=amp, **how)
        values, _ = trainer._step()
        assert all(value.dtype == torch.float32 for value in values.values())
        for p in trainer.model.parameters():
            assert p.dtype == p.grad.dtype == torch.float32 and p.grad.isfinite().all()
        losses.append(values["loss"])
        norms.append(values["grad_norm"])
    assert norms[0] != norms[1]
    torch.testing.assert_close(*losses, rtol=0.05, atol=0.05)
    torch.testing.assert_close(*norms, rtol=0.1, atol=0.05)


def test_channels_last_is_kept(tmp_path):
    trainer = make_trainer(tmp_path, channels=3, channels_last=True, model="resnet18-cifar")
    x, _ = trainer._next_batch()
    assert x.is_contiguous(memory_format=torch.channels_last)
    assert trainer.model.conv1.weight.is_contiguous(memory_format=torch.channels_last)
    trainer._step()
    assert trainer.model.conv1.weight.is_contiguous(memory_format=torch.channels_last)


def test_a_fused_network_with_batch_norm_and_input_gradients(tmp_path):
    how = dict(map="input_gradient", softplus_beta=8.0, method="int-one-class", fuse=True, ema=0.9)
    how |= dict(channels=3, model="resnet18-cifar", batch_size=2, attack_steps=1)
    trainer = make_trainer(tmp_path, **how)
    values, _ = trainer._step()
    assert hasattr(trainer.model, "fusion_report") and values["discrepancy"] > 0
    running = trainer.model.bn1.running_mean.clone()
    trainer.save()
    again = make_trainer(tmp_path, **how)
    assert again.resume() and torch.equal(again.model.bn1.running_mean, running)


@pytest.mark.parametrize("map", ["grad_cam", "input_gradient", "integrated_gradients"])
def test_maps_of_int(small_net, batch, map):
    x, y = batch
    config = TrainConfig(attack_steps=2, map=map, softplus_beta=5.0, ig_steps=2)
    objective = create_objective(config, "int-one-class", small_net)
    loss, parts = objective(x, y, 0.1, (torch.rand_like(x) - 0.5) * 0.2)
    loss.backward()
    assert parts["discrepancy"] > 0
    assert all(p.grad.abs().sum() > 0 for p in small_net.parameters())


def test_metrics_say_how_fast_and_how_much_of_it_is_the_attack(tmp_path):
    trainer = make_trainer(tmp_path, epochs=5, attack_steps=8)
    trainer.run(StopRequest(), quiet=True)
    row = read_metrics(tmp_path / "metrics.jsonl")[-1]
    assert 0.2 < row["attack_share"] < 1 and row["images_per_second"] > 0
    assert row["memory_mb"] > 50 and row["grad_norm"] > 0
    normal = make_trainer(tmp_path / "normal", method="normal")
    normal.run(StopRequest(), quiet=True)
    assert read_metrics(tmp_path / "normal" / "metrics.jsonl")[-1]["attack_share"] == 0


def test_profile(tmp_path):
    make_trainer(tmp_path, options=RunOptions(profile=2)).run(StopRequest(), quiet=True)
    events = json.loads((tmp_path / "trace.json").read_text())["traceEvents"]
    attacks = [event for event in events if event.get("name") == "fastinterp.attack"]
    assert len(attacks) == 2


def test_wandb(tmp_path, monkeypatch):
    logged, how = [], {}
    run = types.SimpleNamespace(
        log=lambda row, step: logged.append((step, row["loss"])),
        finish=lambda: logged.append("end"),
    )
    fake = types.ModuleType("wandb")
    fake.init = lambda **kwargs: how.update(kwargs) or run
    monkeypatch.setitem(sys.modules, "wandb", fake)
    folder = tmp_path / "run" / "int"
    make_trainer(folder, options=RunOptions(wandb="mine")).run(StopRequest(), quiet=True)
    assert how["project"] == "mine" and how["id"] == "run-int" and how["resume"] == "allow"
    assert [entry[0] for entry in logged[:-1]] == [8] and logged[-1] == "end"
    monkeypatch.setitem(sys.modules, "wandb", None)
    with pytest.raises(ImportError, match="pip install wandb"):
        make_trainer(tmp_path, options=RunOptions(wandb="mine")).run(StopRequest(), quiet=True)


def test_bad_options_of_a_run():
    with pytest.raises(ValueError, match="limit_steps must be >= 0, got -1"):
        RunOptions(limit_steps=-1)


def test_dropout_is_the_same_after_resuming(tmp_path):
    def dropping(folder):
        trainer = make_trainer(folder, method="normal")
        trainer.model.head = torch.nn.Sequential(torch.nn.Dropout(), trainer.model.head)
        return trainer

    whole, parts = dropping(tmp_path / "whole"), dropping(tmp_path / "parts")
    untouched = torch.random.get_rng_state()
    whole.run(StopRequest(), quiet=True)
    assert torch.equal(untouched, torch.random.get_rng_state())
    for _ in range(3):
        parts._step()
    parts.save()
    parts = dropping(tmp_path / "parts")
    assert parts.resume()
    torch.manual_seed(123)
    parts.run(StopRequest(), quiet=True)
    assert torch.equal(weights(whole), weights(parts))


def test_networks_of_libraries():
    assert create_model("timm:resnet10t", 1, 7)(torch.rand(2, 1, 32, 32)).shape == (2, 7)
    assert create_model("torchvision:squeezenet1_1", 3, 5).eval()(
        torch.rand(1, 3, 64, 64)
    ).shape == (1, 5)
    net = create_model("resnet18-cifar", 3, 10).eval()
    assert net.layer1(net.maxpool(net.conv1(torch.rand(1, 3, 32, 32)))).shape == (1, 64, 32, 32)
    with pytest.raises(ValueError, match="takes images of 3 channels, got 1"):
        create_model("torchvision:resnet18", 1, 10)
