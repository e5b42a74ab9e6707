"""torchvision's data sets, used for downloads and for CIFAR-100's own file format; imported only when needed."""

from __future__ import annotations

from pathlib import Path
from typing import Any


def torchvision_datasets(purpose: str) -> Any:
    """The module ``torchvision.datasets``.

    Args:
        purpose: The purpose of the import, for the message.

    Raises:
        ImportError: torchvision is missing or does not fit the installed torch.
    """
    try:
        import torchvision.datasets
    # A torchvision built for another torch may fail with any of these.
    except (ImportError, RuntimeError, OSError, AttributeError) as error:
        import torch

        raise ImportError(
            f"torchvision is needed {purpose}, but importing it failed ({type(error).__name__}: {error}); install the "
            f"torchvision that belongs to torch {torch.__version__}, or give root= with a tree or zip of images"
        ) from error
    return torchvision.datasets


def download_omniglot(place: Path) -> None:
    """Both parts of Omniglot, with torchvision's progress and checksums."""
    datasets = torchvision_datasets("to download Omniglot")
    place.mkdir(parents=True, exist_ok=True)
    for background in (True, False):
        datasets.Omniglot(str(place), background=background, download=True)


def download_cifar100(place: Path) -> None:
    """CIFAR-100's python release, with torchvision's progress and checksum."""
    datasets = torchvision_datasets("to download CIFAR-100")
    place.mkdir(parents=True, exist_ok=True)
    datasets.CIFAR100(str(place), train=True, download=True)
