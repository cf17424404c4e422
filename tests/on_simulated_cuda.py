"""PYTHONPATH=tests pytest -p on_simulated_cuda tests/test_gpu.py: a simulated GPU for each test."""

import pytest
import torch
from simulated_cuda import GIB, SimulatedCuda

LIMIT = GIB // 2  # small enough that a test may fill it


def pytest_configure(config):
    """test_gpu.py asks for a GPU when it is imported."""
    patch = pytest.MonkeyPatch()
    patch.setattr(torch.cuda, "is_available", lambda: True)
    patch.setattr(torch.cuda, "device_count", lambda: 1)
    config.add_cleanup(patch.undo)


@pytest.fixture(autouse=True)
def simulated_gpu():
    with SimulatedCuda(limit=LIMIT) as gpu:
        yield gpu
