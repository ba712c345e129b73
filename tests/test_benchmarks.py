"""The whole-step benchmark: what is counted, what passes its gate, what is made of its rows."""

import csv
import importlib.util
from argparse import Namespace
from dataclasses import replace
from functools import partial

import numpy as np
import pytest
import torch
from PIL import Image
from torch import nn

from benchmarks import (
    attacks,
    data,
    gate,
    memory,
    networks,
    peers,
    record,
    replay,
    robust_recipes,
    step,
    tables,
    units,
)
from benchmarks.problem import DTYPES, Problem, balanced_weight
from fastinterp.data import Split, load_dataset
from fastinterp.training import TrainConfig, Trainer

TINY = Problem(net="small", batch=3, size=12, dtype="fp64")
CASE = "small gradient N=3 12x12 fp64 nchw"


def gradients(side):
    return side.gradients(side.step())


class Residual(nn.Module):
    """Three convolutions, batch norm on demand, a stride and a skip."""

    def __init__(self, norm):
        super().__init__()
        self.convs = nn.ModuleList(
            [nn.Conv2d(1, 4, 3, 1, 1), nn.Conv2d(4, 4, 3, 1, 1), nn.Conv2d(4, 6, 3, 2, 1)]
        )
        self.norms = nn.ModuleList(norm(width) for width in (4, 4, 6))
        self.head = nn.Linear(6, 10)

    def forward(self, x):
        x = torch.relu(self.norms[0](self.convs[0](x)))
        x = torch.relu(x + self.norms[1](self.convs[1](x)))
        x = torch.relu(self.norms[2](self.convs[2](x)))
        return self.head(x.mean((2, 3)))


@pytest.fixture(params=["piecewise linear", "batch norm"])
def counted(request, monkeypatch):
    """(network name, whether it has batch statistics) of a network of three convolutions."""
    has_norm = request.param == "batch norm"
    build = (lambda: Residual(nn.BatchNorm2d)) if has_norm else (lambda: Residual(nn.Identity))
    monkeypatch.setitem(networks.NETWORKS, "residual", networks.Network(build, 1, 12, 3))
    return "residual", has_norm


@pytest.mark.parametrize("objective", ["plain", "penalty", "gradient", "discrepancy", "ig"])
def test_our_step_reaches_the_floor_of_units(counted, objective):
    name, has_norm = counted
    problem = TINY.but(net=name, objective=objective)
    side = peers.ours(problem)
    found = units.count(side.step, side.net, problem.batch)
    assert found == pytest.approx(units.floor(objective, 3, has_norm))


def test_floors_of_the_table():
    assert units.floor("plain", 4, False) == 2.75
    assert units.floor("penalty", 4, False) == 4
    assert units.floor("gradient", 4, True) == 5.75
    assert units.floor("discrepancy", 4, False) == 9.75
    assert units.floor("discrepancy", 4, True) == 11.5
    assert units.floor("ig", 4, False) == 22.75


def test_units_of_torch_convolutions():
    conv = nn.Conv2d(2, 3, 3, stride=2)
    x = torch.rand(5, 2, 9, 9, requires_grad=True)
    with units.UnitCounter([conv.weight.shape]) as counter:
        (gx,) = torch.autograd.grad(conv(x).square().sum(), x, create_graph=True)
        assert counter.calls["forward"] == 1
        assert counter.calls["input_grad"] == 1
        # torch computes the bias and weight gradients too only where the mask asks for them
        first = dict(counter.images)
        gx.abs().sum().backward(inputs=[conv.weight])
    # the kernel as large as the map counts as a weight gradient of five images, not of two
    added = counter.images["weight_grad"] - first["weight_grad"]
    assert added > 0
    assert added % 5 == 0


def test_units_are_per_image_of_the_batch():
    conv = nn.Conv2d(2, 3, 3)
    net = nn.Sequential(conv)
    assert units.count(lambda: conv(torch.rand(10, 2, 5, 5)), net, batch=5) == 2


@pytest.mark.parametrize("objective", ["plain", "gradient", "discrepancy", "ig"])
@pytest.mark.parametrize("layout", ["nchw", "channels_last"])
def test_every_objective_passes_the_gate(objective, layout):
    problem = TINY.but(objective=objective, format=layout)
    exact, eager_error = step.exact_gradients(problem)
    assert eager_error == 0
    assert gate.relative_error(gradients(peers.ours(problem)), exact) < 1e-12


def test_two_eager_steps_are_the_same():
    first, second = (gradients(peers.eager(TINY)) for _ in range(2))
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


def test_the_gate():
    exact = [torch.ones(3), torch.ones(2, 2)]
    off = [exact[0], torch.tensor([[1.0, 1], [1, 1 + 0.7]])]
    assert gate.relative_error(off, exact) == pytest.approx(0.7 / 7**0.5)
    with pytest.raises(ValueError, match="other parameters"):
        gate.relative_error(exact[:1], exact)
    assert gate.allowed(0.0, torch.float64) < 1e-6
    assert gate.allowed(0.001, torch.float32) == pytest.approx(0.014)
    assert gate.allowed(0.3, torch.bfloat16) == 0.5
    assert gate.allowed(0.6, torch.bfloat16) == pytest.approx(0.66)


def test_the_balanced_weight_makes_the_penalty_as_large_as_cross_entropy():
    problem = TINY.but(size=28, weight=1.0)
    weight = balanced_weight(problem)
    assert weight != 1.0

    def flat(objective):
        parts = gradients(peers.eager(problem.but(objective=objective)))
        return torch.cat([g.flatten() for g in parts]).norm()

    assert 0.5 < weight * flat("penalty") / flat("plain") < 2


def test_wrong_and_broken_sides_are_said_and_not_timed(monkeypatch):
    def wrong(problem):
        side = peers.eager(problem)
        return side._replace(gradients=lambda result: [1.01 * g for g in side.gradients(result)])

    def broken(problem):
        raise NotImplementedError("no such operation\nand more")

    def absent(problem):
        raise peers.Unavailable("not installed")

    for name, build in (("wrong", wrong), ("broken", broken), ("absent", absent)):
        monkeypatch.setitem(peers.SIDES, name, peers.Entry(name, build))
    keys = ["ours", "eager", "eager-format", "wrong", "broken", "absent"]
    rows = step.run(TINY, keys, seconds=0.0, with_memory=False)
    by_side = {row["side"]: row for row in rows}
    assert list(by_side) == ["fastinterp", "eager", "wrong", "broken", "absent", step.PLAIN]
    for side in ("fastinterp", "eager", step.PLAIN):
        assert float(by_side[side]["ms_p50"]) > 0
        assert by_side[side]["note"] == ""
    assert by_side["wrong"]["note"].startswith("WRONG: relative error 1.0e-02")
    assert by_side["broken"]["note"] == "does not compile: NotImplementedError: no such operation"
    assert by_side["absent"]["note"] == "not installed"
    assert not any("ms_p50" in by_side[side] for side in ("wrong", "broken", "absent"))
    shown = step.show(TINY, rows)
    assert CASE in shown
    assert "WRONG: relative error" in shown


@pytest.mark.slow
@pytest.mark.parametrize("objective", ["plain", "gradient", "discrepancy", "ig"])
def test_jax_takes_the_same_step(objective):
    if importlib.util.find_spec("jax") is None:
        pytest.skip("jax is not installed")
    problem = Problem(batch=2, size=16, dtype="fp64", objective=objective, format="channels_last")
    exact = gradients(peers.eager(problem))
    assert gate.relative_error(gradients(peers.jax(problem)), exact) < 1e-10


@pytest.mark.slow
def test_make_fx_takes_the_same_step():
    exact = gradients(peers.eager(TINY))
    assert gate.relative_error(gradients(peers.make_fx_inductor(TINY)), exact) < 1e-10


def test_networks():
    for name, network in networks.NETWORKS.items():
        net = networks.build(name)
        x = torch.rand(2, network.channels, min(network.size, 64), min(network.size, 64))
        assert net(x).shape == (2, 10)
    wrn = networks.build("wrn16-4")
    assert sum(p.numel() for p in wrn.parameters()) == 2_748_890
    assert networks.convolutions(wrn) == 16
    assert networks.batch_statistics(wrn)
    assert not networks.batch_statistics(networks.build("small"))
    same = networks.build("wrn16-4").state_dict()
    assert all(torch.equal(v, same[k]) for k, v in wrn.state_dict().items())


def test_autocast_covers_the_forward_pass_alone():
    side = peers.eager(TINY.but(dtype="bf16"))
    assert {g.dtype for g in gradients(side)} == {torch.float32}
    assert set(DTYPES) == {"fp32", "bf16", "fp64"}


@pytest.mark.skipif(not memory.available(), reason="no peak memory in /proc")
def test_peak_memory_in_a_process_of_its_own():
    peak = memory.in_own_process("eager", TINY.but(batch=32, size=64, objective="plain"))
    kept = 8 * 32 * 16 * (32 * 32 + 2 * 16 * 16) / 2**20  # MB of the first two layers' results
    assert kept < peak < 1000
    with pytest.raises(RuntimeError, match="nonsense"):
        memory.in_own_process("nonsense", TINY)


@pytest.mark.parametrize("name", attacks.ATTACKS)
def test_attacks_end_at_the_same_images(name):
    assert attacks.check(name) <= attacks.ALLOWED


def test_attacks_that_end_elsewhere_are_not_timed(monkeypatch, tmp_path):
    loss, ours = attacks.ATTACKS["PGD"]
    monkeypatch.setitem(attacks.ATTACKS, "PGD", (loss, lambda *how: ours(*how) + 1e-6))
    with pytest.raises(SystemExit, match="PGD: the sides' images differ by 1.0e-06, not timed"):
        attacks.main(["--attacks", "PGD", "--csv", str(tmp_path / "rows.csv")])
    assert not (tmp_path / "rows.csv").exists()


def test_rows_of_attacks(monkeypatch, tmp_path):
    for name, value in (("BATCH", 4), ("ALONE", 2)):
        monkeypatch.setattr(attacks, name, value)
    path = tmp_path / "rows.csv"
    attacks.main(["--steps", "1", "--repeats", "2", "--csv", str(path)])
    (newest,) = tables.read(path)
    assert [key[2] for key in newest] == ["eager", "eager batched", "fastinterp"] * 2
    line = cells(
        tables.beside_peers(newest), "| attacks     | AAI small 28x28, 1 steps, per image | fast"
    )
    ours, eager = (float(line[i]) for i in (3, 5))
    assert line[4] == "eager" and float(line[6][:-1]) == pytest.approx(eager / ours, rel=0.01)


def row(side, ms="", note="", **more):
    timed = {"ms_p20": ms, "ms_p50": ms, "ms_p80": ms} if ms else {}
    return {"benchmark": "step", "case": CASE, "side": side, "note": note, **timed, **more}


@pytest.fixture
def pictures(tmp_path):
    """Nine photographs in three folders of classes, one of them large."""
    rng = np.random.default_rng(0)
    for i in range(9):
        size = (1100, 1300) if i == 4 else (280, 300 + i)
        coarse = Image.fromarray(rng.integers(0, 256, (5, 5, 3), dtype=np.uint8))
        path = tmp_path / data.SAMPLE / "abc"[i % 3] / f"{i}.JPEG"
        path.parent.mkdir(parents=True, exist_ok=True)
        coarse.resize(size, Image.Resampling.BICUBIC).save(path)
    return tmp_path


def test_reading_images_is_timed_beside_torchvision(pictures, monkeypatch, capsys):
    monkeypatch.setattr(data, "PER_SHARD", 4)
    path = pictures / "rows.csv"
    run = ["--data-dir", str(pictures), *"--images 20 --batch 5 --repeats 2 --workers 1".split()]
    data.main([*run, "--csv", str(path)])
    assert "over torchvision" in capsys.readouterr().out
    (newest,) = tables.read(path)
    case = "224x224, 1 workers, batches of 5, per image"
    assert list(newest) == [
        ("data", f"{source} {case}", side)
        for source in ("folders", "shards")
        for side in ("torchvision", "fastinterp")
    ]
    line = cells(tables.long(newest), f"| data        | shards {case}")
    assert line[2] == "fastinterp" and line[4] == "torchvision" and line[6].endswith("x")

    ours = data.ours
    monkeypatch.setattr(data, "ours", lambda *how: ((x + 0.01, y) for x, y in ours(*how)))
    with pytest.raises(SystemExit, match=r"the sides' images differ by 2\.\d levels, not timed"):
        data.main(run)
    monkeypatch.setattr(data, "ours", lambda *how: ((x, 1 - y) for x, y in ours(*how)))
    with pytest.raises(SystemExit, match="differ by inf levels, not timed"):
        data.main(run)


ROWS = [
    row("fastinterp", "11", ratio="2.00", conv_units="5.67", peak_mb="7", check="1e-16"),
    row("fastinterp", "10", ratio="4.00", conv_units="5.67", peak_mb="7", check="1e-16"),
    row("eager", "40", ratio="1.00"),
    row("torch.compile", note="WRONG: relative error 1.0e+00, allowed 1.0e-07", check="1.0e+00"),
    row("fastinterp, plain step", "5"),
    {**row("eager", "2", ratio="1.00"), "benchmark": "op", "case": "a"},
    {**row("fastinterp", "1", ratio="2.00"), "benchmark": "op", "case": "a"},
]


@pytest.fixture
def results(tmp_path):
    path = tmp_path / "results.csv"
    record.append(path, ROWS)
    return path


def cells(table, start):
    (line,) = (line for line in table.splitlines() if line.startswith(start))
    return [cell.strip() for cell in line.strip("|").split("|")]


def test_tables(results):
    (newest,) = tables.read(results)
    assert cells(tables.steps(newest), f"| {CASE}") == [CASE, "10", "2.00x", "4.00x", "WRONG"]
    line = cells(tables.beside_peers(newest), "| op")
    assert line == ["op", "a", "fastinterp", "1", "eager", "2", "2.00x"]
    full = [line for line in tables.floors(newest).splitlines() if CASE in line]
    assert len(full) == 4
    ours = cells(tables.floors(newest), f"| {CASE} | fastinterp  ")
    least = f"{(6 - 1 / 3) / (3 - 1 / 3):.2f}x"
    assert ours[2:] == ["10 (10 to 10)", "4.00x", "2.00x", least, "5.67", "5.67", "7", "1e-16"]
    wrong = cells(tables.floors(newest), f"| {CASE} | torch.compile")
    assert wrong[2].startswith("WRONG: relative error")


def test_pages_and_plot(results, tmp_path, monkeypatch):
    folder = tmp_path / "benchmarks"
    folder.mkdir()
    for page in (tmp_path / "README.md", folder / "README.md"):
        page.write_text(f"before\n{tables.BEGIN}old\n{tables.END}after\n")
    monkeypatch.setattr(tables, "HERE", folder)
    picture = tmp_path / "steps.png"
    assert tables.main(["--csv", str(results), "--plot", str(picture)]) == 0
    assert picture.read_bytes().startswith(b"\x89PNG")
    for page in (tmp_path / "README.md", folder / "README.md"):
        text = page.read_text()
        assert text.startswith(f"before\n{tables.BEGIN}Medians, ")
        assert text.endswith(f"{tables.END}after\n")
        assert CASE in text
        assert "old" not in text


def test_rows_of_earlier_columns_stay_readable(tmp_path):
    path = tmp_path / "old.csv"
    path.write_text("benchmark,case,side,ms_p50\nop,b,eager,3\n")
    record.append(path, [{"benchmark": "op", "case": "a", "side": "eager", "peak_mb": "5"}])
    with path.open(newline="") as file:
        reader = csv.DictReader(file)
        old, new = reader
    assert tuple(reader.fieldnames) == record.FIELDS
    assert (old["ms_p50"], old["peak_mb"]) == ("3", "")
    assert (new["case"], new["peak_mb"]) == ("a", "5")

    path.write_text("benchmark,mood\nop,good\n")
    with pytest.raises(ValueError, match="mood"):
        record.append(path, [])
    assert path.read_text() == "benchmark,mood\nop,good\n"


def test_a_replay_goes_on_where_it_was_and_of_its_own_configuration_only(tmp_path):
    config = TrainConfig(dataset="digits", model="small", method="normal", epochs=1, rng="paper")
    run = partial(replay.run, data_dir=None, folder=tmp_path / "run", threads=1)
    before, after, _ = run(config, perturbation=0.0)
    again_before, again, _ = run(config, perturbation=0.0)
    assert torch.equal(before, again_before) and torch.equal(after, again)
    moved, _, _ = run(config, perturbation=1e-3)
    assert 0 < (moved - before).norm() < 2e-3 * before.norm()
    with pytest.raises(ValueError, match="another configuration"):
        run(replace(config, epochs=2), perturbation=0.0)


def test_recipes_are_trained_attacked_and_tabled(tmp_path, monkeypatch):
    for name in robust_recipes.RECIPES:
        robust_recipes.config_of(name, 4, 10).check()
    digits = load_dataset("digits")
    train = Split(digits.train.images[:100], digits.train.labels[:100])
    few = replace(digits, name="mnist", train=train)
    args = Namespace(out=tmp_path, epochs=2, attack_steps=1, examples=5, steps=1, restarts=1)
    found = {}
    names = ["int-0.4-2-starts", "int-adv-0.4-ema"]
    for name in names:
        found |= robust_recipes.attack(robust_recipes.train(name, args, few), args, few)
    lines = robust_recipes.table(names, found, args, len(few.test)).splitlines()
    assert len(lines) == 4 and lines[2].startswith("| int-0.4-2-starts")
    monkeypatch.setattr(Trainer, "run", None)  # what is trained is found
    robust_recipes.train(names[1], args, few)
