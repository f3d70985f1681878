"""Compare the networks built here with the published ones."""

from pathlib import Path

import pytest
import torch
from torch import nn

from l3d.data.sources import load_data, load_model
from l3d.zoo import resnet20


def test_resnet20_has_the_published_shape(tmp_path: Path) -> None:
    """20 weighted layers and 0.27M parameters, as in the publication's table; foreign weights are refused."""
    model = resnet20()
    assert sum(isinstance(module, (nn.Conv2d, nn.Linear)) for module in model.modules()) == 20
    assert sum(p.numel() for p in model.parameters()) == 269_722
    assert model(torch.zeros(2, 3, 32, 32)).shape == (2, 10)
    from safetensors.torch import save_file

    save_file({"conv1.weight": torch.zeros(1)}, tmp_path / "foreign.safetensors")
    (tmp_path / "broken.safetensors").write_bytes(b"nothing")
    for name, message in {
        "missing": "no such file",
        "foreign": "not the weights of this ResNet-20",
        "broken": "not a safetensors file",
    }.items():
        with pytest.raises((ValueError, FileNotFoundError), match=message):
            resnet20(str(tmp_path / f"{name}.safetensors"))


@pytest.mark.data
def test_resnet20_classifies_cifar10(data_dir: Path) -> None:
    """Loaders and network together reach the accuracy of the published weights on 2,000 test images."""
    spec, weights = "python:l3d.zoo:resnet20", str(data_dir / "resnet20-cifar10.safetensors")
    model = load_model(spec, weights=weights)
    path = data_dir / "cifar10-2000.npz"
    images = load_data(f"npz:{path}", mean=[0.485, 0.456, 0.406], std=[0.229, 0.224, 0.225])
    labels = load_data(f"npz:{path}", key="labels")
    with torch.no_grad():
        right = torch.cat([model(batch).argmax(1) for batch in images.split(250)]) == labels
    accuracy = right.double().mean().item()
    print(f"accuracy on {len(labels)} images: {accuracy:.2%}")
    assert accuracy > 0.88
