"""fastinterp explain: overlays of test images and of files."""

import numpy as np
import pytest
import torch
from PIL import Image

from fastinterp import maps
from fastinterp.cli import main
from fastinterp.evaluation.overlays import MAPS, explain, overlay_figure

OPTIONS = "--dataset digits --steps 2 --device cpu --out out".split()


def picture(path, size=(28, 28), mode="L"):
    channels = () if mode == "L" else (3,)
    pixels = np.random.RandomState(0).randint(0, 256, (size[1], size[0], *channels), np.uint8)
    Image.fromarray(pixels, mode).save(path)


def test_overlays_of_test_images(saved_net, tmp_path, capsys):
    assert main(["explain", "net.safetensors", *OPTIONS, "--index", "3", "7"]) == 0
    out = capsys.readouterr().out
    assert "test-3" in out and "2 overlays in out" in out
    for name in ("test-3", "test-7"):
        with Image.open(tmp_path / "out" / f"{name}.png") as image:
            assert image.width > 5 * image.height > 500


def test_overlays_of_files_and_folders(saved_net, tmp_path, capsys):
    (tmp_path / "folder").mkdir()
    picture(tmp_path / "folder" / "one.png")
    picture(tmp_path / "folder" / "two.jpg", mode="RGB")
    picture(tmp_path / "three.png")
    (tmp_path / "folder" / "notes.txt").write_text("no image")
    images = ["--images", "folder", "three.png"]
    assert main(["explain", "net.safetensors", *OPTIONS, *images]) == 0
    assert sorted(p.name for p in (tmp_path / "out").iterdir()) == [
        *("one.png", "three.png", "two.png")
    ]


@pytest.mark.parametrize("kind", MAPS)
def test_maps_and_discrepancy_are_of_the_true_and_the_reached_class(saved_net, kind):
    x, x_adv = torch.rand(2, 4, 1, 28, 28).unbind()
    y = torch.tensor([0, 1, 2, 3])
    found = explain(saved_net, x, x_adv, y, kind)
    reached = saved_net(x_adv).argmax(1)
    assert torch.equal(found.after, reached) and torch.equal(found.before, saved_net(x).argmax(1))
    assert found.maps.shape[:2] == (4, 2)
    if kind == "cam":
        for column, classes in enumerate((y, reached)):
            expected = maps.cam(saved_net, x_adv, classes, detach=True)[:, 0]
            torch.testing.assert_close(found.maps_adv[:, column], expected)
        each = (found.maps - found.maps_adv).abs().sum((2, 3))
        torch.testing.assert_close(found.discrepancy, each.mean(1))
    assert explain(saved_net, x, x_adv, None, kind).true.equal(saved_net(x).argmax(1))


def test_pictures_of_a_row_share_a_colour_scale_around_zero(saved_net):
    x, x_adv = torch.rand(2, 2, 1, 28, 28).unbind()
    found = explain(saved_net, x, x_adv, torch.tensor([1, 2]))
    figure = overlay_figure(found, tuple("abcdefghij"))
    for i in range(2):
        axes = figure.axes[6 * i : 6 * i + 6]
        limits = {axis.images[-1].get_clim() for j, axis in enumerate(axes) if j % 3}
        top = max(m[i].abs().max().item() for m in (found.maps, found.maps_adv))
        assert limits == {(-top, top)}
        assert f"{found.discrepancy[i].item():.3g}" in axes[0].get_ylabel()
        assert axes[1].get_title() == f"map of {'abc'[i + 1]} (true)"


def test_bad_images(saved_net, tmp_path, capsys):
    (tmp_path / "folder").mkdir()
    picture(tmp_path / "folder" / "fine.jpg")
    whole = (tmp_path / "folder" / "fine.jpg").read_bytes()
    (tmp_path / "folder" / "half.jpg").write_bytes(whole[: len(whole) // 2])
    picture(tmp_path / "wide.png", size=(32, 28))
    (tmp_path / "empty").mkdir()
    for images, message in (
        ("folder", "folder/half.jpg is damaged or no image"),
        ("wide.png", "wide.png is 32x28 pixels, but the network takes 28x28: crop or resize it"),
        ("absent.png", "there is no image file or folder absent.png"),
        ("empty", "empty has no images (.jpeg, .jpg"),
        ("net.safetensors", "net.safetensors is damaged or no image"),
    ):
        assert main(["explain", "net.safetensors", *OPTIONS, "--images", images]) == 1
        assert message in capsys.readouterr().err
    for options, message in (
        ("--index 360", "--index must lie in 0 .. 359, got 360"),
        ("--index 0 --images wide.png", "give one"),
        ("--map saliency", "--map must be one of cam, grad_cam"),
        ("--out net.safetensors", "--out net.safetensors: the folder cannot be made"),
    ):
        assert main(["explain", "net.safetensors", *OPTIONS, *options.split()]) == 1
        assert message in capsys.readouterr().err
    assert not (tmp_path / "out").exists()
