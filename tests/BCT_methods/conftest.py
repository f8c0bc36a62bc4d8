import pytest

from tests.BCT_methods.whole_runs import write_old_features


@pytest.fixture
def folder(tmp_path, make_record_set):
    """A record set of five classes of five images, and its old features."""
    labels = [0, 1, 2, 3, 4] * 5
    make_record_set(tmp_path / "set.rec", labels)
    write_old_features(tmp_path, labels)
    return tmp_path
