"""The benchmark, far below full size: it runs, and both ways give the same figures."""

import os
import pathlib
import re
import subprocess
import sys

SCRIPT = pathlib.Path(__file__).resolve().parents[3] / "benchmarks" / "bench_ijb.py"


def test_both_ways_agree(tmp_path):
    done = subprocess.run(
        [sys.executable, str(SCRIPT), "--scale", "0.03", "--images", "70", "--workers", "0"], cwd=tmp_path,
        env={**os.environ, "OMP_NUM_THREADS": "1"}, capture_output=True, text=True,
    )
    assert done.returncode == 0, done.stderr
    [(scores, tpr, area)] = re.findall(r"largest difference: scores (\S+), TPR (\S+), AUC (\S+)", done.stdout)
    assert max(float(scores), float(tpr), float(area)) < 1e-6
    assert "times faster" in done.stdout and "from the cache" in done.stdout and "0 workers" in done.stdout
