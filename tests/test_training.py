import json
import random
import signal
import subprocess
import sys
import time

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from fastinterp.data import Dataset, Split
from fastinterp.models import create_model, init_paper, load_weights
from fastinterp.training import (
    RECIPES,
    Interrupted,
    RunOptions,
    StopRequest,
    TrainConfig,
    Trainer,
    TrainingDiverged,
    checkpoint,
    recipe,
)
from fastinterp.training.metrics import read_metrics
from fastinterp.training.optimizer import EpsilonHatAdam
from fastinterp.training.rng import PaperRng, TorchRng
from fastinterp.training.run import execute, newest_folder, prepare, read_config

TINY = dict(
    model="small", method="int", compare=[], epochs=2, batch_size=10, attack_steps=2, eps=0.1
)


def split(n):
    generator = torch.Generator().manual_seed(n)
    images = torch.randint(0, 256, (n, 1, 28, 28), dtype=torch.uint8, generator=generator)
    return Split(images, torch.randint(0, 10, (n,), generator=generator))


@pytest.fixture
def data():
    return Dataset("digits", 10, tuple("0123456789"), split(45), split(11), split(20))


def trainer(folder, data, *, options=None, **change):
    config = TrainConfig(**(TINY | change))
    config.check()
    return Trainer(config, config.method, data, folder, torch.device("cpu"), options)


def test_schedules():
    config = recipe("mnist-small-int")
    assert [config.eps_at(s) for s in (0, 2000, 6000, 10000, 90000)] == [0, 0, 0.15, 0.3, 0.3]
    assert recipe("mnist-small-int-1epoch").eps_at(0) == 0.3
    stepped = TrainConfig(lr=[1e-3, 1e-4, 1e-5], lr_steps=[40_000, 60_000])
    steps = (0, 39_999, 40_000, 59_999, 60_000)
    assert [stepped.lr_at(s, 90_000) for s in steps] == [1e-3, 1e-3, 1e-4, 1e-4, 1e-5]


def test_recipes_have_the_papers_settings():
    for name in RECIPES:
        recipe(name).check()
    config = recipe("mnist-small-int")
    assert (config.epochs, config.batch_size, config.lr, config.gamma) == (100, 50, [1e-4], 0.01)
    assert (config.eps, config.attack_steps, config.step_size) == (0.3, 40, 0.01)
    assert recipe("mnist-small-adv-1epoch").epochs == 1
    config = recipe("cifar10-wresnet-int-adv")
    assert (config.epochs, config.batch_size, config.eps) == (200, 128, 8 / 255)
    assert [config.lr_at(s, 90_000) for s in (39_999, 40_000, 60_000)] == [1e-3, 1e-4, 1e-5]
    with pytest.raises(ValueError, match="unknown recipe 'mnist'; use one of digits-small-int"):
        recipe("mnist")


@pytest.mark.parametrize(
    ("change", "match"),
    [
        (dict(eps=-1), "eps must be"),
        (dict(attack_steps=0), "steps must be at least 1"),
        (dict(epochs=0), "epochs must be at least 1, got 0"),
        (dict(method="fgsm"), "method must be one of normal, adv, trades, int, .*got 'fgsm'"),
        (dict(beta=-1.0), "beta must be finite and >= 0"),
        (dict(ig_weighting="mean"), "ig_weighting must be one of sum, batch-mean"),
        (dict(compare=["nothing"]), "compare must be one of"),
        (dict(dataset="svhn"), "dataset must be one of"),
        (dict(lr=[0.1, 0.2]), "lr needs one positive value more"),
        (dict(eps_warmup=[5]), "eps_warmup must be empty or two"),
        (dict(rng="numpy"), "rng must be one of torch, paper"),
        (dict(rng="paper", model="resnet18-cifar"), "rng paper draws the weights of small, pool"),
        (dict(model="vgg"), "unknown model 'vgg'"),
        (dict(model="torchvision:vgg0"), "torchvision has no network 'vgg0'"),
        (dict(optimizer="lion"), "optimizer must be one of adam, adamw, sgd"),
        (dict(weight_decay=0.1), "weight_decay must be 0 with optimizer adam, got 0.1; use adamw"),
        (dict(lr_schedule="cosine", lr=[1.0, 0.1], lr_steps=[5]), "lr_steps must be empty with"),
        (dict(accumulate=3), "accumulate must divide batch_size 50, got 3"),
        (dict(accumulate=2, ig_weighting="batch-mean"), "batch-mean needs a batch in one part"),
        (dict(ema=1.0), r"ema must be in \[0, 1\)"),
        (dict(label_smoothing=-0.1), "label_smoothing must be in"),
        (dict(clip_grad_norm=float("nan")), "clip_grad_norm must be finite and >= 0"),
        (dict(amp="fp16"), "amp must be one of off, bf16"),
        (dict(map="lime"), "map must be one of cam, grad_cam"),
    ],
)
def test_bad_configuration(change, match):
    with pytest.raises(ValueError, match=match):
        TrainConfig(**change).check()


def test_adam_has_tensorflows_epsilon():
    torch.manual_seed(3)
    start = torch.randn(50, dtype=torch.float64)
    p = start.clone().requires_grad_()
    optimizer = EpsilonHatAdam([p], lr=1e-2, eps=1e-3)
    expected, m, v = start.clone(), torch.zeros(50), torch.zeros(50)
    for t in range(1, 30):
        grad = torch.randn(50, dtype=torch.float64) * 1e-3
        p.grad = grad.clone()
        optimizer.step()
        m = 0.9 * m + 0.1 * grad
        v = 0.999 * v + 0.001 * grad**2
        lr = 1e-2 * (1 - 0.999**t) ** 0.5 / (1 - 0.9**t)
        expected -= lr * m / (v.sqrt() + 1e-3)
    torch.testing.assert_close(p.detach(), expected, rtol=1e-10, atol=1e-12)
    assert (p.detach() - start).abs().min() > 0


def test_paper_rng_replays_numpy_and_survives_a_round_trip():
    reference = np.random.RandomState(99)
    rng = PaperRng(99)
    assert torch.equal(rng.permutation(100), torch.from_numpy(reference.permutation(100)))
    x = torch.zeros(2, 3, 4, 5)
    drawn = reference.uniform(-0.3, 0.3, (2, 4, 5, 3)).astype(np.float32)
    assert np.array_equal(rng.start(x, 0.3).permute(0, 2, 3, 1).numpy(), drawn)
    for kind in (PaperRng, TorchRng):
        one, other = kind(1), kind(2)
        one.permutation(5), one.start(x, 0.3)
        other.load_state_dict(one.state_dict())
        assert torch.equal(one.permutation(50), other.permutation(50))
        assert torch.equal(one.start(x, 0.3), other.start(x, 0.3))
    assert not torch.equal(TorchRng(1).permutation(50), TorchRng(2).permutation(50))
    untouched = torch.random.get_rng_state()
    one, same, other = (
        TorchRng(seed).create(lambda: create_model("small", 1, 10)).head.weight
        for seed in (1, 1, 2)
    )
    assert torch.equal(one, same) and not torch.equal(one, other)
    assert torch.equal(torch.random.get_rng_state(), untouched)


@pytest.mark.parametrize("rng", ["torch", "paper"])
def test_stopping_at_any_step_and_resuming_changes_no_bit(tmp_path, data, rng):
    whole = trainer(tmp_path / "whole", data, rng=rng)
    expected = whole.run(StopRequest(), quiet=True).state_dict()
    assert whole.total_steps == 8
    for at in range(9):
        first = trainer(tmp_path / f"stop{at}", data, rng=rng)
        stop = StopRequest()
        step = first._step

        def counted(stop, step=step, first=first, at=at):
            stop.requested = first.step + 1 >= at
            return step(stop)

        first._step = counted
        if at == 0:
            stop.requested = True
        if at < 8:
            with pytest.raises(Interrupted, match=f"stopped int after step {at}"):
                first.run(stop, quiet=True)
        else:
            first.run(stop, quiet=True)
        second = trainer(tmp_path / f"stop{at}", data, rng=rng)
        assert second.resume() and second.step == at
        got = second.run(StopRequest(), quiet=True).state_dict()
        assert all(torch.equal(expected[name], got[name]) for name in expected)
        final = load_file(tmp_path / f"stop{at}" / "model.safetensors")
        assert all(torch.equal(expected[name], final[name]) for name in expected)


@pytest.mark.parametrize("where", ["objective", "update"])
def test_an_exception_loses_at_most_the_current_step(tmp_path, data, where):
    expected = trainer(tmp_path / "whole", data).run(StopRequest(), quiet=True).state_dict()
    options = RunOptions(checkpoint_seconds=0 if where == "update" else 1e9)
    broken = trainer(tmp_path / "run", data, options=options)
    target = broken.objective if where == "objective" else broken.optimizer
    name = "forward" if where == "objective" else "step"
    original = getattr(target, name)

    def failing(*args):
        if broken.step == 5:
            raise MemoryError
        return original(*args)

    setattr(target, name, failing)
    with pytest.raises(MemoryError):
        broken.run(StopRequest(), quiet=True)
    second = trainer(tmp_path / "run", data)
    assert second.resume() and second.step == 5
    got = second.run(StopRequest(), quiet=True).state_dict()
    assert all(torch.equal(expected[name], got[name]) for name in expected)


def test_a_loss_that_is_not_finite_stops_the_run_and_leaves_the_batch(tmp_path, data):
    broken = trainer(tmp_path / "run", data)
    forward = broken.objective.forward

    def poisoned(*args):
        loss, parts = forward(*args)
        return (loss * torch.nan if broken.step == 5 else loss), parts

    broken.objective.forward = poisoned
    with pytest.raises(TrainingDiverged, match=r"loss of int: nan.* at step 5; .*diverged-step"):
        broken.run(StopRequest(), quiet=True)
    # The weights are those of before the step, so the saved batch replays it.
    good = trainer(tmp_path / "run", data)
    assert good.resume() and good.step == 5
    assert all(torch.isfinite(p).all() for p in good.model.parameters())
    batch = torch.load(tmp_path / "run" / "diverged-step-00000005.pt")
    x, y = good._next_batch()
    start = good._start(x, batch["eps"])
    assert all(torch.equal(batch[k], v) for k, v in dict(x=x, y=y, start=start).items())


def test_a_gradient_that_is_not_finite_is_not_applied(tmp_path, data):
    broken = trainer(tmp_path, data)
    backward = broken.update.backward

    def poisoned(*args):
        values = backward(*args)
        if broken.step == 3:
            broken.model.head.weight.grad[0, 0] = torch.inf
        return values

    broken.update.backward = poisoned
    with pytest.raises(TrainingDiverged, match="a gradient not finite, at step 3"):
        broken.run(StopRequest(), quiet=True)
    assert all(torch.isfinite(p).all() for p in broken.model.parameters())


def test_weights_that_are_not_finite_are_not_saved(tmp_path, data):
    broken = trainer(tmp_path, data)
    broken.save()
    with torch.no_grad():
        broken.model.head.weight[0, 0] = torch.inf
    broken.step = 1
    with pytest.raises(TrainingDiverged, match="weights of int: not finite"):
        broken.save()
    assert trainer(tmp_path, data).resume()


def test_checkpoint_files(tmp_path, data):
    one = trainer(tmp_path, data)
    one.save()
    one.step = 7
    newest = one.folder / "checkpoints" / "step-00000007"
    one.save()
    assert [p.name for p in (tmp_path / "checkpoints").iterdir()] == [newest.name]
    with pytest.raises(ValueError, match=r"step-00000007 cannot be read"):
        checkpoint.load(newest, create_model("pool", 1, 10))
    for part in ("model.safetensors", "state.pt"):
        content = (newest / part).read_bytes()
        for keep in (0, len(content) // 2):
            (newest / part).write_bytes(content[:keep])
            with pytest.raises(ValueError, match=r"step-00000007 cannot be read"):
                trainer(tmp_path, data).resume()
        (newest / part).write_bytes(content)
    assert trainer(tmp_path, data).resume()


def test_metrics_of_lost_steps_are_dropped(tmp_path, data):
    first = trainer(tmp_path, data, epochs=6)
    first.run(StopRequest(), quiet=True)
    rows = read_metrics(tmp_path / "metrics.jsonl")
    assert [row["step"] for row in rows] == [10, 20, 24]
    assert {"loss", "ce", "discrepancy", "images_per_second", "lr", "eps"} <= rows[0].keys()
    with (tmp_path / "metrics.jsonl").open("a") as file:
        file.write('{"step": 30}\n{"step": 40, "lo')
    trainer_again = trainer(tmp_path, data, epochs=6)
    trainer_again.resume()
    trainer_again.run(StopRequest(), quiet=True)
    assert [row["step"] for row in read_metrics(tmp_path / "metrics.jsonl")] == [10, 20, 24]


def test_a_run_of_several_methods(tmp_path, data):
    config = TrainConfig(
        **(TINY | dict(compare=["normal", "adv"], eval_eps=[0.05], eval_steps=3, eval_examples=10))
    )
    folder = tmp_path / "run"
    prepare(folder, config, resume=False)
    assert read_config(folder) == config
    results = execute(folder, config, data, torch.device("cpu"), resume=False, quiet=True)
    assert [row["method"] for row in results] == ["normal", "adv", "int"]
    assert json.loads((folder / "results.json").read_text()) == results
    assert (folder / "curves.png").read_bytes()[:4] == b"\x89PNG"
    for row in results:
        net = create_model("small", 1, 10)
        load_weights(net, folder / row["method"])
    with pytest.raises(FileExistsError, match="not empty; add --resume auto"):
        prepare(folder, config, resume=False)
    with pytest.raises(ValueError, match=r"another configuration \(gamma: 0.01, now 0.5\)"):
        prepare(folder, TrainConfig(**(config.to_dict() | dict(gamma=0.5))), resume=True)
    with pytest.raises(FileNotFoundError, match="no run to resume"):
        prepare(tmp_path / "elsewhere", config, resume=True)


def test_sizes_beyond_the_data(data):
    with pytest.raises(ValueError, match="batch_size must be at most the 45 training images"):
        TrainConfig(batch_size=50).check(data)
    with pytest.raises(ValueError, match=r"eval_examples must be at most the 20 test images"):
        TrainConfig(batch_size=5, eval_examples=21).check(data)


def test_auto_resumes_the_newest_run_of_that_recipe_only(tmp_path):
    for name in ("r-20250101-000000", "r-1epoch-20260101-000000", "r-20250102-000000-2"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "config.yaml").write_text("")
        time.sleep(0.02)
    assert newest_folder(tmp_path, "r").name == "r-20250102-000000-2"
    assert newest_folder(tmp_path, "r-1epoch").name == "r-1epoch-20260101-000000"
    assert newest_folder(tmp_path, "other") is None


def test_a_run_killed_while_writing_its_configuration_can_start_again(tmp_path):
    (tmp_path / ".writing-config.yaml").write_text("datas")
    prepare(tmp_path, TrainConfig(), resume=False)
    assert read_config(tmp_path) == TrainConfig()


COMMAND = [sys.executable, "-m", "fastinterp", "train", "--threads", "1"]
SHORT = "--epochs 1 --batch-size 50 --attack-steps 3 --compare --eval-steps 1 --eval-examples 10"


def start(folder, *more):
    return subprocess.Popen(
        [*COMMAND, *more], cwd=folder, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    )


def kill_and_resume(tmp_path, kills, seed):
    """Kills short runs at random moments, resumes them and compares with an unbroken one."""
    options = [*SHORT.split(), "--checkpoint-seconds", "0"]

    def started(name):
        process = start(tmp_path, *options, "--out", name)
        while not (tmp_path / name).exists() and process.poll() is None:
            time.sleep(0.001)
        return process

    process = started("whole")
    began = time.monotonic()
    assert process.wait() == 0, process.stdout.read()
    span = time.monotonic() - began  # from the creation of the run folder to the exit
    expected = load_file(tmp_path / "whole" / "int" / "model.safetensors")
    moments, killed = random.Random(seed), 0
    for kill in range(kills):
        out = tmp_path / f"killed{kill}"
        process = started(out.name)
        time.sleep(moments.uniform(0, 0.6 * span))  # another run may be the faster one
        process.send_signal(signal.SIGKILL)
        killed += process.wait() == -signal.SIGKILL
        again = start(tmp_path, *options, "--out", out.name, "--resume", "auto")
        assert again.wait() == 0, again.stdout.read()
        got = load_file(out / "int" / "model.safetensors")
        assert all(torch.equal(expected[name], got[name]) for name in expected)
        assert not list(out.rglob(".writing-*"))
    assert killed >= kills / 2
    print(f"{killed} of {kills} killed while running")


def test_kill_and_resume(tmp_path):
    kill_and_resume(tmp_path, kills=2, seed=0)


@pytest.mark.slow
def test_kill_at_twenty_random_moments(tmp_path):
    kill_and_resume(tmp_path, kills=20, seed=1)


def test_ctrl_c_saves_and_says_how_to_go_on(tmp_path):
    process = start(tmp_path, *SHORT.split(), "--epochs", "50", "--out", "run")
    metrics = tmp_path / "run" / "int" / "metrics.jsonl"
    while not read_metrics(metrics) and process.poll() is None:
        time.sleep(0.02)
    process.send_signal(signal.SIGINT)
    output = process.communicate()[0]
    assert process.returncode == 130
    assert "stopped int after step" in output
    assert "go on with: fastinterp train --resume run" in output
    step = int(checkpoint.latest(tmp_path / "run" / "int" / "checkpoints").name[5:])
    assert f"after step {step};" in output and step >= 10


@pytest.mark.slow
@pytest.mark.parametrize(("method", "bound"), [("normal", 0.02), ("int", 0.035)])
def test_one_epoch_replays_the_released_weights(tmp_path, data_dir, released, method, bound):
    """Norm of the difference over norm of the update, all weights together (minutes)."""
    from fastinterp.cli import main

    name = f"mnist-small-{method}-1epoch"
    main(
        f"train --recipe {name} --rng paper --data-dir {data_dir} --out {tmp_path / 'run'} "
        "--eval-steps 1 --quiet".split()
    )

    def flat(net):
        return torch.cat([p.detach().flatten() for p in net.parameters()])

    ours, theirs, initial = (create_model("small", 1, 10) for _ in range(3))
    load_weights(ours, tmp_path / "run" / method)
    load_weights(theirs, released / f"mnist_smallgap_{method}_1.npz")
    init_paper(initial, np.random.RandomState(99))
    deviation = (flat(ours) - flat(theirs)).norm() / (flat(theirs) - flat(initial)).norm()
    print(f"{name}: {deviation:.4f}")
    assert deviation < bound


@pytest.mark.slow
@pytest.mark.parametrize("method", ["int", "adv"])
def test_a_fused_run_equals_one_that_is_not(method, tmp_path):
    generator = torch.Generator().manual_seed(0)
    images = torch.randint(256, (16, 3, 16, 16), dtype=torch.uint8, generator=generator)
    split = Split(images, torch.arange(16) % 10)
    data = Dataset("x", 10, ("",) * 10, split, split, split)
    settings = dict(batch_size=8, optimizer="sgd", lr=[0.01], eps=0.05, attack_steps=2)
    settings |= dict(step_size=0.02, ig_steps=2, model="resnet18-cifar", method=method, gamma=0.1)
    weights = []
    for fused in (False, True):
        config = TrainConfig(**settings, fuse=fused)
        trainer = Trainer(config, method, data, tmp_path, torch.device("cpu"))
        trainer.model.double()  # else rounding turns signs of the attack's steps
        batch = trainer._next_batch
        trainer._next_batch = lambda batch=batch: tuple(
            t.double() if t.is_floating_point() else t for t in batch()
        )
        start = torch.cat([p.detach().flatten() for p in trainer.model.parameters()])
        for _ in range(3):
            trainer._step()
        end = torch.cat([p.detach().flatten() for p in trainer.model.parameters()])
        weights.append(end - start)
    assert (weights[0] - weights[1]).norm() < 1e-6 * weights[0].norm()
