"""The benchmark and the measurement of large data sets run, and measure what they say."""

import json
import subprocess
import sys

import pytest
from conftest import ROOT

pytestmark = pytest.mark.usefixtures("processes")


def script(name, *arguments):
    command = [sys.executable, ROOT / "tests" / name, *arguments]
    done = subprocess.run(list(map(str, command)), capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout


def test_benchmark_compares_the_same_losses(tmp_path):
    said = script(
        "bench.py", "--rows=8", "--layers=1", "--vocab=2048", "--rounds=1",
        f"--json={tmp_path / 'bench.json'}")  # fmt: skip
    result = json.loads((tmp_path / "bench.json").read_text())
    assert result["loss_error"] < 1e-6
    assert 0 < result["padding_efficiency"] < 1
    for name in ("elm", "naive loop", "HF Trainer"):
        line = result["contestants"][name]
        assert name in said
        assert line["tokens_per_second"] > 0
        assert line["peak_mib"] > 0
        assert len(line["seconds"]) == 2
    assert result["contestants"]["naive loop"]["over_naive"] == 1.0


def test_memory_of_a_start_does_not_grow_with_the_data():
    """50 times the rows: less than 200 MB of anonymous memory more."""
    gib = {}
    for line in script("scale.py", "--rows=50000", "--vectors=10000").splitlines():
        gib[line.split(":")[0]] = float(line.split(", ")[-1].split()[0])
    assert len(gib) == 4
    for start in ("started", "resumed"):
        assert gib[f"large, {start}"] - gib[f"small, {start}"] < 0.2
