"""Let tests import the modules beside them; KITTI's two real frames, where they are at hand."""

import os
import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parent))


@pytest.fixture(scope="session")
def kitti() -> Path:
    """Folder of KITTI's object frames 000000 and 000001: scan, image and calibration."""
    folder = Path(os.environ.get("LIGHTNING_EFF_DATA", "")) / "kitti"
    if "LIGHTNING_EFF_DATA" not in os.environ or not (folder / "000000.bin").is_file():
        pytest.skip("the KITTI frames are missing: LIGHTNING_EFF_DATA must name the folder that holds kitti/")
    return folder
