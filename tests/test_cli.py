import json
import os
import stat

import pytest
import yaml

from fastinterp.cli import main

FAST = [
    *"--epochs 1 --batch-size 400 --attack-steps 1 --compare normal".split(),
    *"--eval-steps 1 --eval-eps 0.1 0.2 --eval-examples 20 --quiet".split(),
]


@pytest.fixture(autouse=True)
def _in_a_folder_of_its_own(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("FASTINTERP_DATA", raising=False)


def test_train_prints_a_table_and_leaves_a_run_folder(tmp_path, capsys):
    assert main(["train", *FAST]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert any(line.split() == ["method", "clean", "PGD", "0.1", "PGD", "0.2"] for line in lines)
    assert [line.split()[0] for line in lines if line.strip().startswith(("normal", "int"))] == [
        "normal",
        "int",
    ]
    (run,) = (tmp_path / "runs").iterdir()
    assert run.name.startswith("digits-small-int-")
    for name in ("config.yaml", "results.json", "curves.png", "int/model.safetensors"):
        assert (run / name).is_file()
    # A finished run is resumed to the same table.
    assert main(["train", "--resume", str(run.relative_to(tmp_path)), "--quiet"]) == 0
    assert [line for line in capsys.readouterr().out.splitlines() if "int " in line]


def test_eval_of_a_trained_method(capsys):
    assert main(["train", *FAST, "--out", "run"]) == 0
    options = ["--dataset", "digits", "--steps", "2", "--examples", "50"]
    assert main(["eval", "run/int", *options, "--eps", "0.1", "--json", "one.json"]) == 0
    assert "PGD 0.1" in capsys.readouterr().out
    with open("one.json") as file:
        document = json.load(file)
    assert document.keys() == {"clean_accuracy", "accuracy", "examples", "attack"}
    assert document["examples"] == 50 and document["attack"]["steps"] == 2
    assert main(["eval", "run/int", *options, "--eps", "0.1", "0.2", "--json", "two.json"]) == 0
    with open("two.json") as file:
        results = json.load(file)["results"]
    assert [entry["eps"] for entry in results] == [0.1, 0.2]
    assert results[0]["accuracy"] == document["accuracy"]
    capsys.readouterr()
    assert main(["eval", "run/int", "--dataset", "digits", "--attack", "none"]) == 0
    assert "PGD" not in capsys.readouterr().out


def test_configuration_file_recipe_and_options(capsys):
    with pytest.raises(SystemExit):
        main(["train", "--recipe", "mnist-small-adv", "--step-size", "0.02", "--print-config"])
    printed = yaml.safe_load(capsys.readouterr().out)
    assert printed["recipe"] == "mnist-small-adv" and printed["method"] == "adv"
    assert printed["step_size"] == 0.02 and printed["epochs"] == 100
    with open("mine.yaml", "w") as file:
        yaml.safe_dump({"recipe": "mnist-small-int", "gamma": 0.5}, file)
    with pytest.raises(SystemExit):
        main(["train", "--config", "mine.yaml", "--print-config"])
    printed = yaml.safe_load(capsys.readouterr().out)
    assert printed["gamma"] == 0.5 and printed["dataset"] == "mnist"


def test_info(capsys):
    assert main(["info"]) == 0
    text = capsys.readouterr().out
    assert "attack_step" in text and "torch" in text
    assert main(["info", "--json"]) == 0
    facts = json.loads(capsys.readouterr().out)
    row = next(r for r in facts["ops"] if r["op"] == "cam_discrepancy" and r["device"] == "cpu")
    assert row["backend"] == "cpu"
    assert facts["core"]["instruction_set"] in ("baseline", "avx2", "avx512")


@pytest.mark.parametrize(
    ("command", "message"),
    [
        ("train --recipe cifar", "unknown recipe 'cifar'; use one of digits-small-int"),
        ("train --eps -0.1", "eps must be a finite number >= 0, got -0.1"),
        ("train --attack-steps 0", "steps must be at least 1, got 0"),
        ("train --batch-size 5000", "batch_size must be at most the 1300 training images"),
        ("train --eval-examples 5000", "eval_examples must be at most the 360 test images"),
        ("train --method pgd", "method must be one of normal, adv, trades, int"),
        ("train --recipe mnist-small-int --data-dir nowhere", "nowhere"),
        ("train --resume nowhere", "no run to resume in nowhere"),
        ("train --resume full", "no run to resume in full"),
        ("train --device tpu", "--device must be auto, cpu, cuda or cuda:N, got 'tpu'"),
        ("train --device cuda", "torch sees 0 CUDA devices"),
        ("train --device meta", "--device must be auto, cpu, cuda or cuda:N, got 'meta'"),
        ("train --seed -1", "seed must be between 0 and 4294967294, got -1"),
        ("train --config bad.yaml", "bad.yaml"),
        ("train --out a-file", "a-file is a file"),
        ("train --out full", "full is not empty"),
        ("eval absent.npz --dataset digits", "no weights at absent.npz"),
        ("eval bad.npz --dataset digits", "bad.npz is damaged"),
        ("eval a-file --dataset digits", "a-file is neither an .npz nor a .safetensors file"),
        ("eval absent.npz --dataset digits --model vgg", "unknown model 'vgg'"),
        ("eval absent.npz --eps -1", "eps must be"),
        ("eval absent.npz --steps 0", "steps must be at least 1"),
        ("eval absent.npz --attack fgsm", "--attack must be one of pgd, none"),
        ("eval absent.npz --json no/where.json", "there is no folder no"),
        ("eval absent.npz --json full", "full is a folder"),
        ("eval absent.npz --dataset digits --examples 1000", "no weights"),
    ],
)
def test_bad_input_is_refused_before_anything_is_written(tmp_path, capsys, command, message):
    (tmp_path / "a-file").write_text("precious")
    (tmp_path / "bad.yaml").write_text("epochs: [1")
    (tmp_path / "bad.npz").write_bytes(b"PK")
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "something").write_text("precious")
    before = sorted(tmp_path.rglob("*"))
    if "cuda" in command:
        import torch

        if torch.cuda.is_available():
            pytest.skip("there is a CUDA device")
    assert main([*command.split(), *(["--quiet"] if command.startswith("train") else [])]) == 1
    error = capsys.readouterr().err
    assert error.startswith("fastinterp: error: ") and message in error
    assert "Traceback" not in error
    assert sorted(tmp_path.rglob("*")) == before


def test_folder_that_cannot_be_written(tmp_path, capsys):
    if os.geteuid() == 0:
        # Permissions do not stop root; a folder below a file stops everybody.
        (tmp_path / "locked").write_text("")
    else:
        (tmp_path / "locked").mkdir(mode=stat.S_IRUSR | stat.S_IXUSR)
    assert main(["train", *FAST, "--out", "locked/run"]) == 1
    assert "cannot write the run folder locked/run" in capsys.readouterr().err


def test_checkpoint_of_another_model(capsys):
    assert main(["train", *FAST, "--out", "run"]) == 0
    assert main(["eval", "run/int", "--dataset", "digits", "--model", "pool"]) == 1
    assert "holds the weights of another network than Pool" in capsys.readouterr().err


def test_resuming_with_other_options_is_refused(capsys):
    assert main(["train", *FAST, "--out", "run"]) == 0
    assert main(["train", "--resume", "run", "--gamma", "0.3", "--quiet"]) == 1
    assert "gamma: 0.01, now 0.3" in capsys.readouterr().err
