"""A training set as large as they come, but for its pixels: a sparse .rec, an index of a million lines."""

import numpy as np
import pytest
import torch

from benchmarks.common import write_index_lines
from core.config import load_config
from record_index import binary_path
from recordio import RecordReader
from tests.conftest import draw_record_set
from tests.engine.test_stopped_runs import signalled
from tests.engine.test_trainer import config

LINES, IMAGES, CLASSES = 1_000_000, 40, 5


@pytest.fixture
def rec(tmp_path):
    """Images repeat; most lie beyond 4 GB, where an offset no longer fits 32 bits."""
    few = draw_record_set(tmp_path / "few.rec", [i % CLASSES for i in range(IMAGES)], header=True)
    places = np.linspace(1e9, 9e9, IMAGES).astype(np.int64) // 4 * 4
    with RecordReader(few) as reader, open(tmp_path / "large.rec", "wb") as file:
        record = bytearray(reader.read_raw(0))
        record[32:36] = np.float32(LINES).tobytes()  # the first label: the number of keys
        file.write(record)
        for key, place in enumerate(places.tolist(), 1):
            file.seek(place)
            file.write(reader.read_raw(key))
    offsets = places[np.arange(LINES) % IMAGES]
    offsets[0] = 0
    write_index_lines(tmp_path / "large.idx", offsets)
    return tmp_path / "large.rec"


def test_ten_steps_and_a_resume(tmp_path, rec):
    assert rec.stat().st_blocks * 512 < 1 << 22 < 1 << 33 < rec.stat().st_size
    seen = []

    def run(name, steps, *overrides):
        class Noted(signalled("losses", steps - 1)):
            def losses(self, batch):
                seen.extend(batch.index.tolist())
                return super().losses(batch)

        trainer = Noted(load_config(config(tmp_path, rec, name, num_workers=1), overrides))
        trainer.train()
        assert trainer.step == steps and trainer.cfg.num_image == LINES - 1
        return [*trainer.backbone.state_dict().values(), trainer.classifier.weight.detach()]

    whole = run("whole", 20)
    assert binary_path(tmp_path / "large.idx").stat().st_size > 8 * LINES
    run("parts", 10)
    parts = run("parts", 20, "--resume", "True")
    assert all(torch.equal(one, other) for one, other in zip(whole, parts))
    assert len(seen) == 160 and seen[:80] == seen[80:]
    with RecordReader(rec) as reader:
        assert sum(reader.offset(row + 1) > 2**32 for row in seen) > 40
