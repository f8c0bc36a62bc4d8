"""The benchmark, far below full size: it runs, and all ways give the same figures."""

import os
import pathlib
import re
import subprocess
import sys

SCRIPT = pathlib.Path(__file__).resolve().parents[3] / "benchmarks" / "bench_ijb.py"


def test_all_ways_agree(tmp_path):
    done = subprocess.run(
        [sys.executable, str(SCRIPT), "--scale", "0.03", "--images", "70", "--workers", "0"], cwd=tmp_path,
        env={**os.environ, "OMP_NUM_THREADS": "1"}, capture_output=True, text=True,
    )
    assert done.returncode == 0, done.stderr
    differences = re.findall(r"largest difference: scores (\S+), TPR (\S+), AUC (\S+)", done.stdout)
    assert len(differences) == 2 and max(float(value) for found in differences for value in found) < 1e-6
    ratios = re.findall(r"plain in (\w+) .*each the best of 3.* times faster", done.stdout)
    assert ratios == ["float64", "float32"] and "from the cache" in done.stdout and "0 workers" in done.stdout
