"""Manifests and digests. tests/test_provenance.py holds every reader to them."""

import json

import pytest

from core import files, manifest
from core.files import atomic_write
from core.manifest import ManifestError, digest, manifest_path, read_manifest, record_digest, write_manifest


def write(path, content, **facts):
    with atomic_write(path) as file:
        file.write(content)
        write_manifest(path, file, "features", **facts)


def test_a_manifest_says_what_the_file_is_and_was_made_from(tmp_path, monkeypatch):
    path = tmp_path / "a.npy"
    monkeypatch.setattr(manifest.sys, "argv", ["/any/where/get_feature.py", "--SD", "a b"])
    write(path, b"rows", model="1f", rows=3, old_model=None)
    facts = json.loads(manifest_path(path).read_text())
    assert facts == {
        **{"what": "features", "content": digest(path), "model": "1f", "rows": 3},
        "command": "get_feature.py --SD 'a b'",
    }
    found = read_manifest(path)
    assert found == facts
    found.require("model", "1f", "model.pt", "train")
    found.require("records", "2e", "train.rec", "not stated")
    found.require("model", None, "nothing known", "train")
    with pytest.raises(ManifestError, match=f"{path}: made from another model than model.pt; train it again$"):
        found.require("model", "2e", "model.pt", "train it again")


def test_a_file_that_changed_and_a_damaged_manifest_are_refused(tmp_path):
    path = tmp_path / "a.npy"
    write(path, b"rows")
    path.write_bytes(b"Rows")
    with pytest.raises(ManifestError, match="a.npy: has changed since a.npy.json was .*; run X, or delete a.npy.json"):
        read_manifest(path, "run X")
    for content in (b"", b"{", b"[]", b"3", b"{}", b"\xff\xfe", b'{"content": null}'):
        manifest_path(path).write_bytes(content)
        with pytest.raises(ManifestError, match="a.npy"):
            read_manifest(path, "run X")


def test_a_kill_between_the_two_does_not_pass_unnoticed(tmp_path, monkeypatch):
    path, publish = tmp_path / "a.npy", files.publish

    def killed(file, temporary, target):
        if target == path:
            raise KeyboardInterrupt
        publish(file, temporary, target)

    for before in (None, b"old"):
        if before:
            write(path, before)
        with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
            patch.setattr(files, "publish", killed)
            write(path, b"new")
        if before:
            with pytest.raises(ManifestError, match="has changed since"):
                read_manifest(path)
        else:
            assert not path.exists()


@pytest.mark.parametrize("size", [0, 1, 100, 4096])
def test_digests_follow_contents_wherever_the_file_lies(tmp_path, monkeypatch, size):
    """Small files are read whole, large ones (above WHOLE) where the sample falls: at both ends, too."""
    monkeypatch.setattr(manifest, "WHOLE", 1000)
    monkeypatch.setattr(manifest, "BLOCKS", 4)
    monkeypatch.setattr(manifest, "BLOCK", 16)
    content = bytes(number % 251 for number in range(size))
    (tmp_path / "a").write_bytes(content)
    (tmp_path / "b").write_bytes(content)
    before = digest(tmp_path / "a")
    assert digest(tmp_path / "b") == before
    for place in {0, size // 2, size - 1} if 0 < size <= 1000 else {0, 15, 1360, 4095} & set(range(size)):
        (tmp_path / "b").write_bytes(content[:place] + b"\xff" + content[place + 1 :])
        assert digest(tmp_path / "b") != before, place
    (tmp_path / "b").write_bytes(content + b"\0")
    assert digest(tmp_path / "b") != before


def test_a_record_set_is_its_records_and_its_index(tmp_path):
    rec, idx = tmp_path / "a.rec", tmp_path / "a.idx"
    found = set()
    for records, index in ((b"1", b"2"), (b"3", b"2"), (b"1", b"4")):
        rec.write_bytes(records)
        idx.write_bytes(index)
        found.add(record_digest(rec, idx))
    assert len(found) == 3
