"""fastinterp report: what it says follows from its figures, and a stopped one goes on."""

import csv
import json
import re
from dataclasses import replace

import pytest
import torch
from safetensors.torch import save_file
from torch import nn

from fastinterp.cli import main
from fastinterp.data import Split
from fastinterp.evaluation import figures, measure_maps
from fastinterp.evaluation import findings as rules
from fastinterp.evaluation.page import Notice, Section, Table, Text, to_html, to_markdown
from fastinterp.evaluation.pieces import UNBOUNDED
from fastinterp.evaluation.protocol import protocol
from fastinterp.evaluation.results import Results
from fastinterp.evaluation.summary import Summary, show_eps
from fastinterp.models import create_model

TINY = "--dataset digits --examples 8 --steps 1 2 --eps 0.1 0.3 --device cpu".split()


@pytest.fixture(autouse=True)
def _in_a_folder_of_its_own(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("FASTINTERP_DATA", raising=False)


@pytest.fixture
def weights(tmp_path):
    """Two untrained networks."""
    paths = []
    for name in ("net_a_1", "net_b_1"):
        paths.append(str(tmp_path / f"{name}.safetensors"))
        save_file(create_model("small", 1, 10).state_dict(), paths[-1])
    return paths


def bits(correct, examples=200):
    return "1" * correct + "0" * (examples - correct)


def summary(**changes):
    """Network ``n`` as a sound one, but for ``changes``: values by kind, or (kind, eps)."""
    settings = replace(
        protocol("paper", "mnist"),
        eps=(0.3, 0.35),
        steps=(10, 200),
        aai_eps=(),
        isa_classes=(),
        bound_examples=0,
    )
    found = {}
    rising = [0.1 * k for k in range(21)]
    sound = {
        "no-start": {"10": bits(160), "200": bits(150)},
        "random-start": {"200": bits(148)},
    }
    for name in ("n", "other"):
        found[name, "clean", None] = {"correct": bits(190)}
        for eps in settings.eps:
            for kind, correct in sound.items():
                found[name, kind, eps] = {"correct": correct, "seconds": 1.0}
        found[name, "transfer", 0.3] = {"correct": bits(150), "others": [bits(170)]}
        found[name, "unbounded", UNBOUNDED] = {"correct": bits(0)}
        found[name, "landscape", 0.3] = {
            "no start": rising,
            "random start": rising,
            "signs": [v / 2 for v in rising],
        }
    for key, value in changes.items():
        kind, _, eps = key.partition("_at_")
        for known in [k for k in found if k[:2] == ("n", kind.replace("_", "-"))]:
            if not eps or known[2] == float(eps.replace("_", ".")):
                found[known] = {**found[known], **value}
    return Summary(settings, ["n", "other"], found, torch.arange(200))


def test_a_sound_network_gets_no_warning():
    found = rules.findings(summary())
    assert len(found) == 5 and not any(f.warning for f in found)
    assert found[0].text.startswith("n and other: at no radius does a stronger attack leave")


def test_the_report_says_where_a_random_start_breaks_what_the_weak_attack_did_not():
    broken = summary(
        no_start_at_0_35={"correct": {"10": bits(160), "200": bits(36)}},
        random_start_at_0_35={"correct": {"200": bits(2)}},
    )
    first, second = rules.weak_attack(broken)
    assert first.warning and not second.warning and second.text.startswith("other:")
    assert first.text == (
        "n at eps 0.35: 18.0 % of the images survive PGD-200, no random start, but only 1.0 % "
        "under PGD-200, one random start. 17.0 points of its accuracy there are an artefact of "
        "the weak attack."
    )


@pytest.mark.parametrize(
    ("rule", "changes", "text"),
    [
        ("transfer", dict(transfer={"correct": bits(190)}), "crafted on other at eps 0.3 leave"),
        (
            "more_steps",
            dict(no_start_at_0_3={"correct": {"10": bits(100), "200": bits(150)}}),
            "PGD with 200 steps leaves 75.0 %, with 10 steps 50.0 %",
        ),
        ("unbounded", dict(unbounded={"correct": bits(3)}), "1.5 % of the images survive PGD"),
        ("landscape", dict(landscape={"signs": [9.0] * 21}), "Noise beats the gradient"),
        (
            "landscape",
            dict(landscape={"no start": [0.0, 5.0, 3.0]}),
            "mean loss is 5 and at the end 3",
        ),
    ],
)
def test_signs_of_masked_gradients_are_warned_of(rule, changes, text):
    warned = [f for f in getattr(rules, rule)(summary(**changes)) if f.warning]
    assert warned and warned[0].text.startswith("n") and text in warned[0].text
    assert not any(f.warning for f in getattr(rules, rule)(summary()))


def test_proposition_1_is_checked_point_by_point():
    tested = summary()
    tested.found["n", "bound", None] = {
        "margin": [1.0, 2.0],
        "discrepancy": [1.0, 2.5],
        "eps": [0.1, 0.2],
    }
    (finding,) = rules.proposition_1(tested)
    assert not finding.warning and "holds on all 2 images" in finding.text
    tested.found["n", "bound", None]["discrepancy"][1] = 1.9
    (finding,) = rules.proposition_1(tested)
    assert finding.warning and "1 of 2 images lie below" in finding.text


def test_what_sneaking_hides_is_counted_over_the_images_flipped_at_every_eps():
    tested = summary()
    tested.protocol = replace(
        tested.protocol, isa_classes=("one", "two"), isa_ratios=(1.0, 1.5, 2.0)
    )
    one = {"1.0": [0.4, None, 0.6, 9.0], "1.5": [0.3, None, 0.5, None], "2.0": [0.2, None, 0.4, 1]}
    two = {ratio: [0.5, None, 0.5, 0.5] for ratio in one}
    for classes, discrepancy in (("one", one), ("two", two)):
        tested.found["n", f"isa-{classes}", None] = {
            "eps": [0.1, None, 0.3, 0.2],
            "discrepancy": discrepancy,
        }
    found = tested.sneaking("n", "one")
    assert found.images == 2 and found.means == pytest.approx((0.5, 0.4, 0.3))
    assert found.slope == pytest.approx(-0.2)
    assert tested.sneaked == ["n"] and tested.sneaking("other", "one") is None
    (finding,) = rules.sneaking(tested)
    assert not finding.warning and finding.text == (
        "n: given 2 times the least eps, a sneaking attack hides 40 % of the one-class discrepancy "
        "(0.500 to 0.300) and 0 % of the two-class one (0.500 to 0.500)."
    )
    rows = [row for row in tested.rows() if row.metric == "normalised_discrepancy"]
    assert [(row.eps, row.examples) for row in rows[:3]] == [(1.0, 2), (1.5, 2), (2.0, 2)]
    assert len(rows) == 6
    larger = {"eps": [0.1], "discrepancy": {ratio: [4.0] for ratio in one}}
    for classes in ("one", "two"):
        tested.found["other", f"isa-{classes}", None] = larger
    for axis in figures.sneaking_curves(tested).axes:
        assert axis.get_ylim()[0] == 0 and axis.get_ylim()[1] > 4


def test_least_eps_is_where_the_prediction_turns():
    """One pixel and two classes, of which the second wins above 0.5."""
    net = nn.Sequential(
        nn.Conv2d(1, 2, 1), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(2, 2, bias=False)
    )
    with torch.no_grad():
        net[0].weight.copy_(torch.tensor([0.0, 2.0]).view(2, 1, 1, 1))
        net[0].bias.copy_(torch.tensor([1.0, 0.0]))
        net[3].weight.copy_(torch.eye(2))
    images = torch.tensor([102, 255, 0], dtype=torch.uint8).view(3, 1, 1, 1)
    split = Split(images, torch.tensor([0, 1, 1]))
    found = measure_maps.bound(
        net, split, torch.arange(3), rounds=14, steps=10, seed=0, batch_size=2
    )
    assert found["eps"] == pytest.approx([0.1, 0.5], abs=1e-3)  # the last image is wrong at once
    assert found["margin"] == pytest.approx([0.1, 0.5], abs=1e-6)
    assert found["discrepancy"] == pytest.approx(found["margin"], abs=1e-2)
    assert all(d >= m - 1e-6 for d, m in zip(found["discrepancy"], found["margin"], strict=True))


def test_worst_of_several_attacks_is_taken_image_by_image():
    settings = replace(protocol("strong", "mnist"), eps=(0.3,), steps=(2,))
    each = {"no-start": {"2": "1111"}, "random-start": {"2": "1110"}}
    each |= {"strong-ce": "1101", "strong-margin": "1111", "strong-dlr": "0111"}
    each |= {"autoattack": "1111"}
    found = {("n", kind, 0.3): {"correct": correct} for kind, correct in each.items()}
    found["n", "clean", None] = {"correct": "11110"}
    tested = Summary(settings, ["n"], found, torch.tensor([3, 2, 1, 4]))
    assert tested.accuracy("n", "worst", 0.3).correct == 1
    (left,) = rules.trained_eps(tested)
    assert not left.warning and left.text == (
        "n at eps 0.3, which training aims at: 100.0 % under PGD-2, no random start, 25.0 % in the "
        "worst of all attacks; 3 of 4 images fall to a stronger attack only."
    )
    assert tested.accuracy("n", "no-start", 0).correct == 3
    assert tested.clean("n").examples == 5


def test_protocols_are_the_papers():
    paper, strong = protocol("paper", "mnist"), protocol("strong", "mnist")
    assert paper.eps == (0.05, 0.1, 0.2, 0.3, 0.35, 0.4) and paper.steps == (1, 10, 100, 200)
    assert (paper.examples, paper.seed, paper.step_size, paper.aai_k) == (200, 99, 0.01, 8)
    assert strong.examples == 0 and strong.losses == ("ce", "margin", "dlr")
    assert dict(strong.unforeseen)["fog"] == 2048 and not paper.unforeseen
    cifar = protocol("paper", "cifar10")
    assert [show_eps(eps, "cifar10") for eps in cifar.eps][:2] == ["2/255", "4/255"]
    assert show_eps(0.2, "mnist") == "0.2"
    assert (paper.isa_classes, strong.isa_classes) == (("one", "two", "all"), ())
    for bad in (
        dict(eps=(-1.0,)),
        dict(isa_ratios=(0.5,)),
        dict(steps=(2, 1)),
        dict(steps=()),
        dict(examples=-1),
    ):
        with pytest.raises(ValueError, match=next(iter(bad))):
            replace(paper, **bad)


def test_results_are_computed_once_and_again_where_a_file_is_not_to_be_trusted(tmp_path):
    said, computed = [], []

    def get(value=1, **settings):
        def compute():
            computed.append(value)
            return {"value": value, "radii": (0.1, 0.2)}

        results = Results(tmp_path / "pieces", said.append)
        return results.get("n/pgd-0.1", {"eps": 0.1, "steps": (1, 2), **settings}, compute)

    assert get() == {"value": 1, "radii": [0.1, 0.2]} and get(2)["value"] == 1
    assert computed == [1] and not said
    assert get(3, weights="other")["value"] == 3
    assert "is of other weights: computed again" in said.pop()
    (path,) = (tmp_path / "pieces").rglob("*.json")
    whole = path.read_text()
    altered = json.loads(whole) | {"result": {"value": 9}}
    for content in (whole[: len(whole) // 2], "", "[]", json.dumps(altered), "\0" * 10):
        path.write_text(content)
        assert get(4, weights="other")["value"] == 4
        assert "is damaged" in said.pop() and not said
    assert computed == [1, 3] + [4] * 5


def test_report_is_one_page_and_goes_on_where_it_was(weights, tmp_path, capsys, monkeypatch):
    command = ["report", *weights, *TINY, "--out", "out"]
    calls = []
    real = Results.get

    def stops(self, name, settings, compute):
        calls.append(name)
        if len(calls) == 6:
            raise KeyboardInterrupt
        return real(self, name, settings, compute)

    monkeypatch.setattr(Results, "get", stops)
    assert main(command) == 130
    assert not (tmp_path / "out" / "report.html").exists()
    monkeypatch.setattr(Results, "get", real)
    finished = sorted((tmp_path / "out" / "pieces").rglob("*.json"))
    assert len(finished) == 5
    written = [path.stat().st_mtime_ns for path in finished]
    damaged = finished[0]
    damaged.write_text(damaged.read_text()[:50])
    assert main(command) == 0
    said = capsys.readouterr().out
    assert f"{damaged.relative_to(tmp_path)} is damaged" in said
    assert [path.stat().st_mtime_ns for path in finished[1:]] == written[1:]

    page = (tmp_path / "out" / "report.html").read_text()
    sources = re.findall(r'(?:src|href)="([^"]*)"', page)
    assert len(sources) >= 4 and all(s.startswith("data:image/") for s in sources)
    assert "<script" not in page and "url(" not in page
    for text in ("Wilson", "Transfer at eps 0.3", "Kendall", "step_size", "torch"):
        assert text in page
    markdown = (tmp_path / "out" / "report.md").read_text()
    assert "| network" in markdown and "## Findings" in markdown
    with (tmp_path / "out" / "results.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert {row["network"] for row in rows} == {"a", "b"}
    for row in rows:
        if row["metric"] == "accuracy":
            assert float(row["low"]) <= float(row["value"]) <= float(row["high"])
    assert {row["eps"] for row in rows} >= {"0.0", "0.1", "0.3"}


def test_strong_protocol_of_a_run_with_its_training_curves(tmp_path):
    train = "train --epochs 1 --batch-size 400 --attack-steps 1 --compare normal --eval-steps 1"
    options = " --eval-eps 0.1 --eval-examples 5 --quiet --out run --device cpu"
    assert main((train + options).split()) == 0
    options = "--protocol strong --examples 6 --steps 2 --eps 0.2 --device cpu --out out".split()
    assert main(["report", "run", *options]) == 0
    text = (tmp_path / "out" / "report.md").read_text()
    assert "AutoAttack, apgd: accuracy by eps" in text and "| pyautoattack" in text
    for part in ("5 restarts, margin", "5 restarts, dlr", "worst of these", "Training run of int"):
        assert part in text
    assert "Cost of a training step" in text
    with (tmp_path / "out" / "results.csv").open() as file:
        rows = [row for row in csv.DictReader(file) if row["attack"] == "jpeg_l1"]
    assert [(row["network"], row["eps"], row["examples"]) for row in rows] == [
        *(("normal", "256.0", "6"), ("int", "256.0", "6"))
    ]
    (line,) = re.findall(r"\| network +\| clean +\| jpeg_linf 0.25 .*", text)
    assert line.split(" | ")[-1].startswith("gabor 400")
    assert "Loss and discrepancy in training" in (tmp_path / "out" / "report.html").read_text()


def test_pages_escape_what_they_are_given():
    content = [Text("a < b"), Notice("<b>", True), Table("t|t", ["<h>"], [["x|y"], [("1", "<2>")]])]
    page = to_html("<title>", "&", [Section("<s>", content)])
    assert "&lt;title&gt;" in page and "a &lt; b" in page and "&lt;2&gt;" in page
    assert "<h>" not in page and "<b>" not in page
    assert "x\\|y" in to_markdown("t", "l", [Section("s", content)])


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ("--protocol weak", "protocol must be one of paper, strong, got 'weak'"),
        ("--eps -0.1", "eps must be finite numbers > 0, got -0.1"),
        ("--steps 5 1", "steps must be increasing numbers >= 1, got [5, 1]"),
        ("--examples 5000", "examples must be between 0 (all) and 360, got 5000"),
        ("--autoattack plus", "autoattack must be one of standard, apgd or empty, got 'plus'"),
        ("--batch-size 0", "--batch-size must be at least 1, got 0"),
        ("--model vgg", "unknown model 'vgg'"),
        ("--model pool", "holds the weights of another network than Pool"),
        ("--dataset cifar", "unknown dataset 'cifar'"),
        ("--out a-file", "--out a-file: the folder cannot be made"),
    ],
)
def test_bad_input(weights, tmp_path, capsys, options, message):
    (tmp_path / "a-file").write_text("precious")
    assert main(["report", *weights, "--dataset", "digits", *options.split()]) == 1
    error = capsys.readouterr().err
    assert error.startswith("fastinterp: error: ") and message in error
    assert (tmp_path / "a-file").read_text() == "precious"


def test_weights_that_do_not_fit(weights, tmp_path, capsys):
    save_file(create_model("small", 1, 7).state_dict(), tmp_path / "seven.safetensors")
    assert main(["report", weights[0], "seven.safetensors", *TINY, "--out", "out"]) == 1
    error = capsys.readouterr().err
    assert "head.weight is (7, 100), expected (10, 100)" in error
    assert main(["report", weights[0], weights[0], *TINY, "--out", "out"]) == 1
    assert "the same weights are given twice" in capsys.readouterr().err
    (tmp_path / "run").mkdir()
    assert main(["report", "run", *TINY, "--out", "out"]) == 1
    assert "no weights at run" in capsys.readouterr().err


def test_one_class_is_refused(weights, capsys, monkeypatch):
    from fastinterp.cli import _networks
    from fastinterp.data import Split, load_dataset

    data = load_dataset("digits")
    one = Split(data.test.images[:9], torch.full((9,), 3))
    monkeypatch.setattr(_networks, "load_dataset", lambda *_: replace(data, test=one))
    for command in ("report", "eval", "attack", "explain"):
        assert main([command, weights[0], "--dataset", "digits"]) == 1
        assert "the 9 test images of digits are all of class 3" in capsys.readouterr().err
