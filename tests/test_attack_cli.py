"""fastinterp attack: what it writes is what it says."""

import csv
import os
import shutil
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch.nn import functional as F

from fastinterp import attacks
from fastinterp.attacks.distortions.jpeg import LUMINANCE, dct_matrix
from fastinterp.cli import main
from fastinterp.data import load_dataset
from fastinterp.evaluation import choose_examples
from fastinterp.models import create_model

OPTIONS = "--dataset digits --examples 7 --steps 3 --eps 0.1 --device cpu --out out".split()


@pytest.mark.parametrize("extra", ["", "--random-start --restarts 2 --loss margin --early-stop"])
def test_images_and_table(saved_net, tmp_path, extra):
    assert main(["attack", "net.safetensors", *OPTIONS, *extra.split(), "--batch-size", "3"]) == 0
    written = load_file(tmp_path / "out" / "adversarial.safetensors")
    index = choose_examples(360, 7, 99)
    x, y = load_dataset("digits").test.batch(index)
    x_adv = written["images"]
    assert torch.equal(written["index"], index) and torch.equal(written["labels"], y)
    assert x_adv.shape == x.shape and x_adv.min() >= 0 and x_adv.max() <= 1
    assert 0 < (x_adv - x).abs().max() <= 0.1 + 1e-6
    with safe_open(tmp_path / "out" / "adversarial.safetensors", "pt") as file:
        assert file.metadata()["eps"] == "0.1" and file.metadata()["dataset"] == "digits"
    with (tmp_path / "out" / "examples.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert [int(row["index"]) for row in rows] == index.tolist()
    with torch.no_grad():
        logits, logits_adv = saved_net(x), saved_net(x_adv)
    for name, f in (("clean", logits), ("adversarial", logits_adv)):
        assert [int(row[f"{name}_prediction"]) for row in rows] == f.argmax(1).tolist()
        losses = [float(row[f"{name}_loss"]) for row in rows]
        expected = F.cross_entropy(f, y, reduction="none").tolist()
        assert losses == pytest.approx(expected, rel=1e-4)
    sizes = [float(row["linf"]) for row in rows]
    assert sizes == pytest.approx((x_adv - x).abs().flatten(1).amax(1).tolist(), rel=1e-4)


def test_unforeseen_attacks(saved_net, tmp_path):
    options = [*OPTIONS, "--attack", "jpeg_linf", "--eps", "2", "--step-size", "0.5"]
    assert main(["attack", "net.safetensors", *options]) == 0
    path = tmp_path / "out" / "adversarial.safetensors"
    with safe_open(path, "pt") as file:
        said = file.metadata()
    assert (said["kind"], said["eps"], said["steps"]) == ("jpeg_linf", "2.0", "3")
    written = load_file(path)
    x, _ = load_dataset("digits").test.batch(written["index"])
    # no coefficient has moved by more than a quantisation step
    change = written["images"] - x
    largest = torch.einsum(
        "xu,uv,vy->xy",
        dct_matrix().T.abs(),
        torch.tensor(LUMINANCE).view(8, 8).double(),
        dct_matrix().abs(),
    )
    assert 0.1 < change.abs().max() <= largest.max() / 255


def test_seed_decides_the_random_start(saved_net, tmp_path):
    seen = []
    for out, seed in (("a", "1"), ("b", "1"), ("c", "2")):
        options = [*OPTIONS[:-1], out, "--examples", "0", "--random-start", "--steps", "1"]
        assert main(["attack", "net.safetensors", *options, "--seed", seed]) == 0
        seen.append(load_file(tmp_path / out / "adversarial.safetensors")["images"])
    assert torch.equal(seen[0], seen[1]) and not torch.equal(seen[0], seen[2])


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ("--eps -1", "eps must be a finite number >= 0, got -1.0"),
        ("--norm L1", "--norm must be one of Linf, L2, got 'L1'"),
        ("--loss mse", "--loss must be one of ce, margin, dlr, got 'mse'"),
        ("--attack fgsm", "--attack must be one of pgd, autoattack, isa, jpeg_linf, jpeg_l2"),
        ("--attack snow --restarts 2 --eps 1", "--restarts is not for --attack snow"),
        ("--attack isa", "--steps is not for --attack isa"),
        ("--restarts 0", "--restarts must be at least 1, got 0"),
        ("--final-step-size 0", "--final-step-size must be > 0, got 0"),
        ("--examples 400", "examples must be between 0 (all) and 360, got 400"),
        ("--out a-file", "--out a-file: the folder cannot be made"),
    ],
)
def test_bad_input(saved_net, tmp_path, capsys, options, message):
    (tmp_path / "a-file").write_text("precious")
    assert main(["attack", "net.safetensors", *OPTIONS, *options.split()]) == 1
    error = capsys.readouterr().err
    assert error.startswith("fastinterp: error: ") and message in error
    assert not list((tmp_path).glob("out/*")) and (tmp_path / "a-file").read_text() == "precious"


def test_a_stopped_attack_goes_on_where_it_was(saved_net, tmp_path, monkeypatch, capsys):
    command = ["attack", "net.safetensors", *OPTIONS, "--random-start", "--batch-size", "2"]
    assert main(command) == 0
    file = tmp_path / "out" / "adversarial.safetensors"
    whole = load_file(file)
    shutil.rmtree(tmp_path / "out")
    real, calls = attacks.pgd, []

    def stops(*how, **options):
        calls.append(1)
        if len(calls) == 3:
            raise KeyboardInterrupt
        return real(*how, **options)

    monkeypatch.setattr("fastinterp.cli._attack.pgd", stops)
    assert main(command) == 130 and not file.exists()
    parts = sorted((tmp_path / "out" / "unfinished").iterdir())
    assert [part.name for part in parts] == ["000000.safetensors", "000001.safetensors"]

    # of the four batches the first is used, the second, now half written, is made again
    parts[1].write_bytes(parts[1].read_bytes()[:-9])
    capsys.readouterr()
    assert main(command) == 0 and len(calls) == 3 + 3
    said = capsys.readouterr().out
    assert "out/unfinished/000001.safetensors is damaged" in said and "000000" not in said
    again = load_file(file)
    assert again.keys() == whole.keys()
    assert all(torch.equal(again[name], whole[name]) for name in whole)
    assert not (tmp_path / "out" / "unfinished").exists()


def test_batches_of_other_settings_are_not_taken(saved_net, tmp_path, monkeypatch, capsys):
    real = attacks.pgd
    command = ["attack", "net.safetensors", *OPTIONS, "--batch-size", "4"]
    monkeypatch.setattr("fastinterp.evaluation.results.KeptBatches.clear", lambda self: None)
    assert main(command) == 0
    part = tmp_path / "out" / "unfinished" / "000000.safetensors"
    flipped = bytearray(part.read_bytes())
    flipped[-1] ^= 1
    calls = []
    monkeypatch.setattr(
        "fastinterp.cli._attack.pgd",
        lambda *how, **options: calls.append(1) or real(*how, **options),
    )
    assert main(command) == 0 and not calls
    for change, message in (
        (["--eps", "0.2"], "is of other settings, images or weights"),
        ([], "is of other settings"),
    ):
        capsys.readouterr()
        assert main([*command, *change]) == 0
        assert capsys.readouterr().out.count(message) == 2
    part.write_bytes(flipped)
    assert main(command) == 0
    assert "its checksum is another" in capsys.readouterr().out


@pytest.mark.parametrize("attack", ["isa", "autoattack"])
def test_attacks_that_choose_their_own_steps(saved_net, tmp_path, attack):
    if attack == "autoattack":
        pytest.importorskip("pyautoattack")
    options = "--dataset digits --examples 4 --device cpu --out out --eps 0.05".split()
    assert main(["attack", "net.safetensors", *options, "--attack", attack]) == 0
    written = load_file(tmp_path / "out" / "adversarial.safetensors")
    x, _ = load_dataset("digits").test.batch(written["index"])
    assert (written["images"] - x).abs().max() <= 0.05 + 1e-6
    with torch.no_grad():
        before, after = (saved_net(z).argmax(1) for z in (x, written["images"]))
    moved = (written["images"] != x).flatten(1).any(1)
    assert ((before != after) == moved).all()


def test_sizes_of_unforeseen_attacks_are_not_guessed(saved_net, capsys):
    assert main(["attack", "net.safetensors", "--dataset", "digits", "--attack", "elastic"]) == 1
    message = "--attack elastic needs --eps; published sizes are 0.125 0.25 0.5 1 2 8 (cifar10)"
    assert message in capsys.readouterr().err


@pytest.mark.parametrize("command", ["attack", "explain", "report"])
def test_weights_that_do_not_fit_leave_no_trace(saved_net, tmp_path, capsys, command):
    save_file(create_model("small", 1, 7).state_dict(), "seven.safetensors")
    save_file(create_model("small", 3, 10).state_dict(), "colour.safetensors")
    whole = (tmp_path / "net.safetensors").read_bytes()
    (tmp_path / "half.safetensors").write_bytes(whole[: len(whole) // 2])
    for name, message in (
        ("seven", "head.weight is (7, 100), expected (10, 100)"),
        ("colour", "conv0.weight is (16, 3, 4, 4), expected (16, 1, 4, 4)"),
        ("half", "half.safetensors is damaged or not a weight file"),
        ("absent", "no weights at absent.safetensors"),
    ):
        options = ["--dataset", "digits", "--device", "cpu", "--out", "out"]
        assert main([command, f"{name}.safetensors", *options]) == 1
        error = capsys.readouterr().err
        assert error.startswith("fastinterp: error: ") and message in error
        assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("command", ["attack", "explain"])
def test_interrupted_runs_leave_no_half_written_file(
    saved_net, tmp_path, monkeypatch, capsys, command
):
    assert main([command, "net.safetensors", *OPTIONS]) == 0
    before = {path: path.read_bytes() for path in (tmp_path / "out").iterdir()}

    def interrupted(temporary, path):
        Path(temporary).write_bytes(b"half")
        raise KeyboardInterrupt

    monkeypatch.setattr(os, "replace", interrupted)
    assert main([command, "net.safetensors", *OPTIONS, "--eps", "0.3"]) == 130
    assert "interrupted" in capsys.readouterr().err
    assert {
        path: path.read_bytes() for path in (tmp_path / "out").rglob("*") if path.is_file()
    } == before


def test_eval_takes_the_same_options(saved_net, capsys):
    command = "--dataset digits --examples 9 --steps 2 --random-start --loss dlr --norm L2".split()
    assert main(["eval", "net.safetensors", *command, "--device", "cpu"]) == 0
    assert "PGD 0.3" in capsys.readouterr().out
