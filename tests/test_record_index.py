"""The binary index beside a `.idx`: written once, held against the text, written again where it is not this text's."""

import json
import multiprocessing
import os
import pickle
import subprocess
import sys

import numpy as np
import pytest
from hypothesis import given, settings, strategies

import record_index
from core.config import REPO
from core.manifest import digest, record_digest
from dataset import RecordDataset
from record_index import HEADER, RecordError, binary_path, open_index
from recordio import RecordReader, RecordWriter
from tests.plain_recordio import hold_against_plain


@pytest.fixture(autouse=True)
def none_is_small(monkeypatch):
    monkeypatch.setattr(record_index, "SMALL", 0)


@pytest.fixture
def said(caplog):
    """`said()`: the lines logged since the last call."""

    def lines():
        found = [record.getMessage() for record in caplog.records]
        caplog.clear()
        return found

    return lines


def write_lines(path, keys, offsets):
    path.write_text("".join(f"{key}\t{offset}\n" for key, offset in zip(keys, offsets)))


def holds(index, keys, offsets):
    """Whether the index says what these lines say."""
    by_key = dict(zip(keys, offsets))
    assert np.array_equal(np.asarray(index.keys[:]), keys) and index.count == len(keys)
    assert all(index.says(key, offset) for key, offset in by_key.items())
    absent = [key for key in (-1, max(keys) + 1, min(keys) - 1) if key not in by_key]
    assert not any(0 <= index.row(key) < index.count for key in absent)
    found, there = index.offsets_of(np.array([*keys, *absent]))
    assert found[: len(keys)].tolist() == list(offsets) and there.tolist() == [True] * len(keys) + [False] * len(absent)
    gaps = [key for key in range(len(keys) + 1) if key not in by_key]
    assert index.facts["missing"] == (gaps[0] if gaps[0] < len(keys) else None)
    assert by_key[index.facts["last"]] == max(offsets)


KINDS = {
    "in order": np.arange(5000),
    "from 7": np.arange(7, 5007),
    "shuffled": np.random.default_rng(0).permutation(5000),
    "with gaps": np.arange(5000) * 3,
    "shuffled with gaps": np.random.default_rng(0).permutation(5000) * 10**12,
    "one": np.array([4]),
}


@pytest.mark.parametrize("keys", KINDS.values(), ids=KINDS)
def test_it_says_what_the_text_says(tmp_path, keys, monkeypatch):
    offsets = np.random.default_rng(1).permutation(len(keys)) * 4 + 2**33
    write_lines(tmp_path / "a.idx", keys.tolist(), offsets.tolist())
    index = open_index(tmp_path / "a.idx")
    assert isinstance(index.offsets, record_index._Column)
    holds(index, keys.tolist(), offsets.tolist())
    assert index.facts["digest"] == digest(tmp_path / "a.idx")
    monkeypatch.setattr(record_index, "read_lines", None)  # the text is not read again
    holds(open_index(tmp_path / "a.idx"), keys.tolist(), offsets.tolist())
    holds(pickle.loads(pickle.dumps(index)), keys.tolist(), offsets.tolist())
    monkeypatch.undo()
    in_memory = open_index(tmp_path / "a.idx")
    assert isinstance(in_memory.offsets, np.ndarray)
    holds(in_memory, keys.tolist(), offsets.tolist())
    assert sorted(os.listdir(tmp_path)) == ["a.idx", "a.idx.bin"]


@settings(max_examples=40, deadline=None)
@given(
    keys=strategies.lists(strategies.integers(0, 12), unique=True, max_size=8),
    spoilt=strategies.sampled_from([b"", b"x", b"5\t1\n", b"3\t0"]),
)
def test_a_reader_with_it_answers_as_the_plain_one(tmp_path_factory, keys, spoilt):
    folder = tmp_path_factory.mktemp("any")
    with RecordWriter(folder / "a.rec") as writer:
        for key in keys:
            writer.write(key, bytes([key]) * (30 + key))
    rec, idx = (folder / "a.rec").read_bytes(), (folder / "a.idx").read_bytes()
    hold_against_plain(folder, rec, idx + spoilt)
    hold_against_plain(folder, rec, idx)


def change_header(data, **facts):
    """The file with other facts, as a writer of them would write it."""
    text = json.dumps({**json.loads(data[33:HEADER]), **facts}).encode()
    return f"{record_index._check(text)} ".encode() + text.ljust(HEADER - 33) + data[HEADER:]


SPOILT = {
    "empty": (lambda data: b"", "damaged"),
    "header cut": (lambda data: data[:100], "damaged"),
    "header changed": (lambda data: data.replace(b'"first": 1', b'"first": 2'), "damaged"),
    "no text": (lambda data: b"\xff" * len(data), "can't decode"),
    "cut": (lambda data: data[:-8], "truncated"),
    "longer": (lambda data: data + bytes(8), "truncated"),
    "another number of lines": (lambda data: change_header(data, lines=2999), "truncated"),
    "an index of another size": (lambda data: change_header(data, size=7), "of another a.idx"),
    "zeros": (lambda data: data[:HEADER] + bytes(len(data) - HEADER), "of another a.idx"),
    "another first key": (lambda data: change_header(data, first=2), "of another a.idx"),
}


@pytest.mark.parametrize("spoil, why", SPOILT.values(), ids=SPOILT)
def test_a_damaged_or_foreign_one_is_written_again(tmp_path, spoil, why, said):
    keys, offsets = list(range(1, 3001)), list(range(0, 12000, 4))
    write_lines(tmp_path / "a.idx", keys, offsets)
    binary = binary_path(tmp_path / "a.idx")
    open_index(tmp_path / "a.idx")
    assert said() == [f"{binary}: writing it, so that no other process reads the text"]
    whole = binary.read_bytes()
    binary.write_bytes(spoil(whole))
    holds(open_index(tmp_path / "a.idx"), keys, offsets)
    lines = said()
    assert why in lines[0] and lines[0].startswith(f"{binary}: ") and lines[0].endswith("; writing it again")
    assert binary.read_bytes() == whole
    open_index(tmp_path / "a.idx")
    assert said() == []


@pytest.mark.parametrize("line", [0, 1234, 2999])
def test_another_text_of_the_same_size(tmp_path, line, said):
    """One line can hide between the sampled ones; other records have other offsets from there on."""
    offsets = list(range(10_000, 22_000, 4))
    write_lines(tmp_path / "a.idx", range(3000), offsets)
    open_index(tmp_path / "a.idx")
    before = record_digest(tmp_path / "a.idx", tmp_path / "a.idx")
    offsets[line:] = [offset + 4 for offset in offsets[line:]]
    write_lines(tmp_path / "a.idx", range(3000), offsets)
    said()
    index = open_index(tmp_path / "a.idx")
    assert "of another a.idx" in said()[0]
    holds(index, list(range(3000)), offsets)
    assert index.facts["digest"] == digest(tmp_path / "a.idx") != before


def test_a_wrong_text_is_named_and_leaves_nothing(tmp_path):
    for text, why in (("0\t0\nx\t4\n", "line 2 is"), ("1\t0\n1\t4\n", "duplicate key 1")):
        (tmp_path / "a.idx").write_text(text)
        with pytest.raises(RecordError, match=f"a.idx: {why}"):
            open_index(tmp_path / "a.idx")
        assert "a.idx.bin" not in os.listdir(tmp_path)


def test_where_nothing_can_be_written_the_text_is_read(tmp_path, said):
    write_lines(tmp_path / "a.idx", range(9), range(0, 36, 4))
    (tmp_path / ".a.idx.bin.lock").mkdir()  # refused by the system, also for root
    index = open_index(tmp_path / "a.idx")
    (line,) = said()
    assert "a.idx.bin: cannot be written (Is a directory): each process reads the text" in line
    assert isinstance(index.offsets, np.ndarray)
    holds(index, list(range(9)), list(range(0, 36, 4)))


def test_one_that_is_cut_meanwhile_is_an_error_line(tmp_path):
    write_lines(tmp_path / "a.idx", np.random.default_rng(0).permutation(9).tolist(), range(0, 36, 4))
    index = open_index(tmp_path / "a.idx")
    os.truncate(binary_path(tmp_path / "a.idx"), HEADER + 30)
    assert index.pair(1)
    for read in (lambda: index.pair(5), lambda: index.offsets_of(np.arange(9)), lambda: index.keys[3]):
        with pytest.raises(RecordError, match=r"a\.idx\.bin: truncated at line \d; delete it"):
            read()


def open_and_count(path, queue):
    record_index.SMALL, reads = 0, []
    parse = record_index.read_lines
    record_index.read_lines = lambda *args: reads.append(1) or parse(*args)
    index = open_index(path)
    queue.put((len(reads), index.says(4999, 4 * 4999)))


def test_of_several_processes_one_reads_the_text(tmp_path):
    write_lines(tmp_path / "a.idx", range(5000), range(0, 20_000, 4))
    context = multiprocessing.get_context("fork")
    queue = context.SimpleQueue()
    processes = [context.Process(target=open_and_count, args=(tmp_path / "a.idx", queue)) for _ in range(4)]
    for process in processes:
        process.start()
    found = [queue.get() for _ in processes]
    for process in processes:
        process.join()
    assert sorted(found) == [(0, True)] * 3 + [(1, True)]
    assert sorted(os.listdir(tmp_path)) == ["a.idx", "a.idx.bin"]


def test_a_killed_writer_leaves_nothing_that_another_waits_for(tmp_path):
    write_lines(tmp_path / "a.idx", range(50), range(0, 200, 4))
    code = (
        "import os, record_index, pathlib; record_index.SMALL = 0\n"
        "record_index.np.resize = lambda *_: os._exit(9)\n"
        f"record_index.open_index(pathlib.Path({str(tmp_path / 'a.idx')!r}))"
    )
    assert subprocess.run([sys.executable, "-c", code], cwd=REPO, capture_output=True).returncode == 9
    assert len(os.listdir(tmp_path)) == 3  # its lock and its temporary file
    holds(open_index(tmp_path / "a.idx"), list(range(50)), list(range(0, 200, 4)))
    assert sorted(os.listdir(tmp_path)) == ["a.idx", "a.idx.bin"]


@pytest.mark.parametrize("header", [True, "insightface", False])
def test_a_training_set_with_it_is_the_same(tmp_path, make_record_set, header, monkeypatch):
    path = make_record_set(tmp_path, [0, 1, 2, 3, 0, 1, 2, 3, 3], header=header)
    with_it = RecordDataset(path)
    assert binary_path(with_it.reader.idx_path).is_file()
    monkeypatch.setattr(record_index, "SMALL", 1 << 24)
    plain = RecordDataset(path)
    assert with_it.digest() == plain.digest() and with_it.labels().tolist() == plain.labels().tolist()
    assert all((with_it[row][0] == plain[row][0]).all() and with_it[row][1:] == plain[row][1:] for row in range(9))
    assert pickle.loads(pickle.dumps(with_it))[4][1:] == plain[4][1:]


def test_records_written_anew_have_no_old_index_beside_them(tmp_path):
    for size in (8, 12):
        with RecordWriter(tmp_path / "a.rec") as writer:
            for key in range(9):
                writer.write(key, bytes(size))
        assert not binary_path(tmp_path / "a.idx").exists()
        with RecordReader(tmp_path / "a.rec") as reader:
            assert reader.read(5) == bytes(size) and binary_path(tmp_path / "a.idx").exists()
