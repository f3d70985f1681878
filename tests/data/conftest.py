"""Write data files that several tests read."""

from pathlib import Path

import numpy as np
import pytest


@pytest.fixture
def archive(tmp_path: Path) -> Path:
    """Five 4×3 images of two channels, and five labels."""
    images = np.random.default_rng(0).integers(0, 256, (5, 4, 3, 2), dtype=np.uint8)
    np.savez(tmp_path / "a.npz", images=images, labels=np.arange(5))
    return tmp_path / "a.npz"
