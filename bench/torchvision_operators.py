"""torchvision beside a torch that it was not built for."""

import functools
import importlib.metadata

import torch


@functools.cache
def declare_operators_of_torchvision() -> torch.library.Library | None:
    """Lets torchvision from PyPI, which timm imports and which is built for CUDA, be imported beside torch for CPUs.

    torchvision gives shapes to two operators when it is imported. Without CUDA its library does not load, and defines
    none. The result keeps the definitions alive, and is kept here.
    """
    try:
        version = importlib.metadata.version("torchvision")
    except importlib.metadata.PackageNotFoundError:
        return None
    if version.endswith("+cpu") or torch.version.cuda is not None:
        return None
    library = torch.library.Library("torchvision", "DEF")
    for name in ("nms", "qnms"):
        library.define(f"{name}(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
    return library
