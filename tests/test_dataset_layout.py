"""What test_dataset.py and test_recordio_fuzz.py cannot reach: counts beyond 2**24 without millions of records."""

import types

import numpy as np
import pytest

from dataset import image_layout
from recordio import IRHeader, RecordError


class Reader(types.SimpleNamespace):
    """A fake reader for `image_layout` with keys 0 ... `size` - 1, the first a header of `counts`."""

    path, idx_path = "a.rec", types.SimpleNamespace(name="a.idx")

    def __len__(self):
        return self.size

    def __contains__(self, key):
        return 0 <= key < self.size

    def read_record(self, key):
        return IRHeader(1, np.asarray(self.counts, np.float32), 0, 0), b"" if key == 0 else b"\xff\xd8\xff"

    def offset(self, key):
        return 0

    def first_missing_key(self):
        return None


def test_an_image_count_alone_may_exceed_2_to_the_24():
    size = 2**24 + 2
    assert image_layout(Reader(size=size, counts=[size])) == (range(1, size), None)
    with pytest.raises(RecordError, match="float32 labels cannot tell"):
        image_layout(Reader(size=size, counts=[size, 2**24 + 2**10]))


@pytest.mark.parametrize("counts", [[3e38], [3e38, 3e38], [5, 3e38], [2**24, 3e38], [3e38, 5], [2**62, 2**62]])
def test_giant_counts_are_refused_quickly(counts):
    with pytest.raises(RecordError, match=r"a\.rec: key 0 at offset 0: "):
        image_layout(Reader(size=5, counts=counts))
