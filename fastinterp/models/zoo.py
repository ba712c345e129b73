"""Networks of torchvision and timm by name, and torchvision's ResNet-18 for small images."""

from __future__ import annotations

from torch import nn

LIBRARIES = ("torchvision", "timm")


def check_zoo_name(name: str) -> None:
    """Raises ValueError unless ``name`` is LIBRARY:NETWORK and the library has that network.

    Raises:
        ImportError: the library is not installed.
    """
    library, _, network = name.partition(":")
    if library == "torchvision":
        from torchvision.models import list_models

        known = network in list_models()
    else:
        known = _timm().is_model(network)
    if not known:
        raise ValueError(f"model {name!r}: {library} has no network {network!r}")


def create_zoo_model(name: str, in_channels: int, num_classes: int) -> nn.Module:
    """A network by LIBRARY:NETWORK, untrained, with an input layer for ``in_channels``.

    Raises:
        ValueError: there is none of that name, or it takes three channels only.
    """
    check_zoo_name(name)
    library, _, network = name.partition(":")
    if library == "timm":
        return _timm().create_model(network, num_classes=num_classes, in_chans=in_channels)
    if in_channels != 3:
        raise ValueError(
            f"model {name!r} takes images of 3 channels, got {in_channels}; timm's networks take "
            "any number"
        )
    from torchvision.models import get_model

    # Some networks draw their weights twice unless told not to, and warn.
    extra = {"init_weights": True} if network in ("googlenet", "inception_v3") else {}
    return get_model(network, weights=None, num_classes=num_classes, **extra)


def resnet18_cifar(in_channels: int, num_classes: int) -> nn.Module:
    """torchvision's ResNet-18 with a 3x3 convolution of stride 1 in front and no max-pooling.

    Source: He et al., "Deep Residual Learning" (2016), in the form usual for 32x32 images.
    """
    from torchvision.models import resnet18

    model = resnet18(weights=None, num_classes=num_classes)
    model.conv1 = nn.Conv2d(in_channels, 64, 3, padding=1, bias=False)
    nn.init.kaiming_normal_(model.conv1.weight, mode="fan_out", nonlinearity="relu")
    model.maxpool = nn.Identity()
    return model


def _timm():
    try:
        import timm
    except ImportError as error:
        raise ImportError("models of timm need it: pip install timm") from error
    return timm
