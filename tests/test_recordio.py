"""recordio.py alone; test_recordio_mxnet.py compares it with MXNet."""

import multiprocessing
import os
import pickle
import random
import struct
import subprocess
import sys

import numpy as np
import pytest
from hypothesis import given, settings, strategies

import recordio
from recordio import MAGIC, IRHeader, RecordError, RecordReader, RecordWriter, class_label, pack, unpack, write_index

WORD = struct.pack("<I", MAGIC)


def write(path, payloads):
    with RecordWriter(path) as writer:
        for key, payload in payloads.items():
            writer.write(key, payload)
    return path


def plain_parts(payload):
    """The bytes of a record by the format's description, word by word."""
    out, part, flags = b"", b"", 0
    for at in range(0, len(payload) // 4 * 4, 4):
        word = payload[at : at + 4]
        if word == WORD:
            out += struct.pack("<II", MAGIC, (2 if flags else 1) << 29 | len(part)) + part
            part, flags = b"", 1
        else:
            part += word
    part += payload[len(payload) // 4 * 4 :]
    out += struct.pack("<II", MAGIC, (3 if flags else 0) << 29 | len(part)) + part
    return out + b"\0" * (-len(out) % 4)


@pytest.fixture
def three(tmp_path):
    """A file of three records with 40, 41 and 42 bytes at 0, 48 and 100."""
    return write(tmp_path / "a.rec", {key: bytes([key]) * (40 + key) for key in range(3)})


@pytest.mark.parametrize("label", [0, 7.0, np.float32(3), [1.0, 2.0], np.array([5, 6, 7], np.float64), []])
def test_pack_and_unpack_are_inverse(label):
    header, payload = unpack(pack(IRHeader(99, label, 2**40, 2**63), b"jpeg"))
    many = np.ndim(label) == 1 and len(label) > 0
    assert payload == b"jpeg" and header.id == 2**40 and header.id2 == 2**63
    assert header.flag == (len(label) if many else 0)
    assert np.array_equal(header.label, np.asarray(label, np.float32) if many else 0.0 if np.ndim(label) else label)
    assert class_label(header) == np.ravel(header.label)[0]


def test_pack_writes_the_documented_header():
    assert pack((0, 3.0, 4, 5), b"x") == struct.pack("<IfQQ", 0, 3.0, 4, 5) + b"x"
    assert pack((0, [3.0, 9.0], 4, 5), b"x") == struct.pack("<IfQQff", 2, 0.0, 4, 5, 3.0, 9.0) + b"x"


@pytest.mark.parametrize("broken", [b"", b"\0" * 23, struct.pack("<IfQQ", 2**31, 0, 0, 0)])
def test_unpack_refuses_a_short_header(broken):
    with pytest.raises(RecordError):
        unpack(broken)


@settings(max_examples=60, deadline=None)
@given(strategies.lists(strategies.one_of(strategies.just(WORD), strategies.binary(max_size=6)), max_size=8))
def test_payloads_are_stored_in_the_documented_format(tmp_path_factory, pieces):
    payload = b"".join(pieces)
    path = write(tmp_path_factory.mktemp("any") / "a.rec", {5: payload, 3: b"after"})
    with RecordReader(path) as reader:
        assert reader.read(5) == payload and reader.read(3) == b"after"
        assert reader.read_raw(5) == plain_parts(payload)
        assert path.read_bytes() == plain_parts(payload) + plain_parts(b"after")
        assert reader.idx_path.read_text() == f"5\t0\n3\t{len(plain_parts(payload))}\n"


def test_bytes_like_payloads_are_written_as_bytes(tmp_path):
    data = np.arange(7, dtype=np.uint8)
    with RecordReader(write(tmp_path / "a.rec", dict(enumerate([data, bytearray(data), memoryview(data)])))) as reader:
        assert {reader.read(key) for key in range(3)} == {bytes(range(7))}
    with pytest.raises(TypeError):
        write(tmp_path / "b.rec", {0: 5})


def test_a_raw_copy_is_the_same_file(tmp_path):
    path = write(tmp_path / "a.rec", {0: b"abcd" + WORD + b"x", 1: b"", 2: WORD})
    with RecordReader(path) as reader, RecordWriter(tmp_path / "b.rec") as writer:
        for key in reader.keys.tolist():
            writer.write_raw(key, reader.read_raw(key))
    assert (tmp_path / "b.rec").read_bytes() == path.read_bytes()
    assert (tmp_path / "b.idx").read_text() == path.with_suffix(".idx").read_text()


@pytest.mark.parametrize("keys", [[0, 1, 2, 3], [4, 5, 6], [3, 1, 2, 0], [10**12, 5, 700], [8]])
def test_any_set_of_keys(tmp_path, keys):
    path = write(tmp_path / "a.rec", {key: str(key).encode() for key in keys})
    with RecordReader(path) as reader:
        assert reader.keys.tolist() == keys and reader.keys.dtype == np.int64 and len(reader) == len(keys)
        for key in keys:
            assert reader.read(key) == reader.read(np.int64(key)) == str(key).encode() and key in reader
        for absent in (-1, max(keys) + 1, min(keys) - 1, 2**70):
            assert absent not in reader
            with pytest.raises(RecordError, match=rf"a\.rec: key {absent} is not in a\.idx"):
                reader.read(absent)
        with pytest.raises((TypeError, RecordError)):
            reader.read(keys[0] + 0.5)


def test_an_empty_file_has_no_records(tmp_path):
    with RecordReader(write(tmp_path / "a.rec", {})) as reader:
        assert len(reader) == 0 and 0 not in reader and reader.first_missing_key() is None
        reader.check()
        with pytest.raises(RecordError, match="key 0"):
            reader.read_labels([0])


def test_index_larger_than_a_block_and_with_other_line_ends(tmp_path, monkeypatch):
    path = write(tmp_path / "a.rec", {key: b"" for key in range(2000)})
    index = path.with_suffix(".idx")
    from record_index import read_lines

    for text in (index.read_bytes(), index.read_bytes().rstrip(b"\n"), index.read_bytes().replace(b"\n", b"\r\n")):
        index.write_bytes(text)
        keys, offsets = read_lines(index, block=1000)
        assert (keys == np.arange(2000)).all() and (offsets == 8 * np.arange(2000)).all()


@pytest.mark.parametrize(
    "line", ["x\t5", "5", "5\t", "\t5", "", "1\t2\t3", "-1\t0", "1 0", "1.0\t0", "1\t" + "9" * 30, "é\t1"]
)
def test_a_bad_index_line_is_named(three, line):
    index = three.with_suffix(".idx")
    index.write_text(f"0\t0\n1\t48\n{line}\n2\t100\n", encoding="utf-8")
    with pytest.raises(RecordError, match=r"a\.idx: line 3 is"):
        RecordReader(three)


def test_a_duplicate_key_in_the_index_is_named(three):
    three.with_suffix(".idx").write_text("0\t0\n7\t48\n7\t100\n")
    with pytest.raises(RecordError, match=r"a\.idx: duplicate key 7"):
        RecordReader(three)


def test_missing_files_are_named(tmp_path, three):
    with pytest.raises(FileNotFoundError, match=r"b\.rec"):
        RecordReader(tmp_path / "b.rec")
    three.with_suffix(".idx").unlink()
    with pytest.raises(FileNotFoundError, match=r"a\.idx: no such file; .*: python recordio\.py index .*a\.rec$"):
        RecordReader(three)


def refuses(path, key, offset, why):
    """Each way of reading names file, key and offset."""
    with RecordReader(path) as reader:
        ways = [reader.read, reader.read_raw, reader.read_record, reader.read_image]
        for read in [*ways, lambda its: reader.read_labels([its])]:
            with pytest.raises(RecordError, match=rf"a\.rec: key {key} at offset {offset}: .*{why}"):
                read(key)


def test_a_truncated_file_is_refused_where_it_ends(three):
    whole = three.read_bytes()
    for length in (len(whole) - 1, len(whole) - 2, 110, 107, 101, 100):  # 150 bytes of record 2 and its padding
        three.write_bytes(whole[:length])
        refuses(three, 2, 100, "truncated|no record can start")
        with RecordReader(three) as reader:
            assert reader.read(1) == b"\1" * 41
            with pytest.raises(RecordError, match="key 2 at offset 100"):
                reader.check()


def test_wrong_offsets_are_refused(three):
    index = three.with_suffix(".idx")
    for offset, why in ((10**17, "no record"), (152, "no record"), (50, "no record"), (56, "found 0x01010101")):
        index.write_text(f"0\t0\n1\t{offset}\n")
        refuses(three, 1, offset, why)


def test_a_wrong_magic_word_is_refused(three):
    data = bytearray(three.read_bytes())
    data[48] ^= 1
    three.write_bytes(data)
    refuses(three, 1, 48, "found 0xced7230b")


@pytest.mark.parametrize("flag", range(1, 8))
def test_unexpected_continuation_flags_are_refused(three, flag):
    data = bytearray(three.read_bytes())
    data[48 + 7] |= flag << 5
    three.write_bytes(data)
    refuses(three, 1, 48, "continuation flag")  # flag 1: the next record does not continue it


def test_an_index_into_the_middle_of_a_record_is_refused(tmp_path):
    path = write(tmp_path / "a.rec", {0: b"abcd" + WORD + b"efgh"})
    path.with_suffix(".idx").write_text("0\t12\n")
    refuses(path, 0, 12, "continuation flag 3")


def test_an_absurd_length_is_refused_without_allocating_it(three):
    data = bytearray(three.read_bytes())
    data[52:56] = struct.pack("<I", (1 << 29) - 1)
    three.write_bytes(data)
    refuses(three, 1, 48, "536870911 bytes from 56 run past the end")


def test_a_record_with_a_truncated_header_is_named(tmp_path):
    path = write(tmp_path / "a.rec", {0: b"short", 1: struct.pack("<IfQQ", 10**9, 0, 0, 0)})
    with RecordReader(path) as reader:
        for key, offset in ((0, 0), (1, 16)):
            for read in (reader.read_record, reader.read_image, lambda k: reader.read_labels([k])):
                with pytest.raises(RecordError, match=rf"a\.rec: key {key} at offset {offset}: .*bytes long"):
                    read(key)


def test_headers_and_labels_without_images(tmp_path):
    magic_id = MAGIC << 32 | 1  # puts the magic word into the header, which splits it into parts
    headers = [
        IRHeader(0, 3.0, 9, 0),
        IRHeader(0, [4.0, 8.0], 9, 0),
        IRHeader(0, 5.0, magic_id, 0),
        IRHeader(0, [6.0], magic_id, 0),
        IRHeader(0, 7.0, 9, 0),
    ]
    path = write(tmp_path / "a.rec", {key: pack(header, b"image") for key, header in zip((0, 4, 3, 2, 1), headers)})
    with RecordReader(path) as reader:
        for key in range(5):
            label, image = reader.read_image(key)
            assert (
                label == class_label(reader.read_record(key)[0])
                and image.tobytes() == b"image"
                and image.dtype == np.uint8
            )
        assert reader.read_labels([4, 4, 0, 1, 2, 3]).tolist() == [4, 4, 3, 7, 6, 5]
        assert reader.read_labels(range(5)).dtype == np.float32
        with pytest.raises(RecordError, match="key 5"):
            reader.read_labels([0, 5])


def test_files_appear_only_when_complete(tmp_path):
    path = write(tmp_path / "a.rec", {0: b"old"})
    with pytest.raises(RuntimeError), RecordWriter(path) as writer:
        writer.write(0, b"new")
        raise RuntimeError
    assert RecordReader(path).read(0) == b"old" and sorted(os.listdir(tmp_path)) == ["a.idx", "a.rec"]
    writer = RecordWriter(path)
    writer.write(0, b"new")
    assert RecordReader(path).read(0) == b"old"
    writer.close()
    writer.close()
    assert RecordReader(path).read(0) == b"new" and sorted(os.listdir(tmp_path)) == ["a.idx", "a.rec"]


def test_an_index_that_cannot_be_opened_leaves_no_files(tmp_path):
    with pytest.raises(FileNotFoundError):
        RecordWriter(tmp_path / "a.rec", tmp_path / "none" / "a.idx")
    assert os.listdir(tmp_path) == []


def test_a_key_written_twice_leaves_no_files(tmp_path):
    with (
        pytest.raises(RecordError, match=r"a\.rec: key 1 was written more than once"),
        RecordWriter(tmp_path / "a.rec") as writer,
    ):
        for key in (0, 1, 2, 1):
            writer.write(key, b"")
    assert os.listdir(tmp_path) == []


def test_keys_and_payloads_beyond_the_format_are_refused(tmp_path):
    with pytest.raises(RecordError, match="key -1"):
        write(tmp_path / "a.rec", {-1: b""})
    with pytest.raises(RecordError, match="key 3: .*too long"):
        write(tmp_path / "a.rec", {3: bytes(1 << 29)})
    assert os.listdir(tmp_path) == []


# --- an index that was lost -----------------------------------------------------------------------------------------


def index_command(path, cwd):
    """`python recordio.py index PATH`: `(exit status, stdout, stderr)`."""
    command = [sys.executable, recordio.__file__, "index", str(path)]
    done = subprocess.run(command, cwd=cwd, capture_output=True, text=True, timeout=600)
    return done.returncode, done.stdout, done.stderr


def test_a_lost_index_is_written_again(tmp_path):
    payloads = {key: bytes(key) + WORD * (key % 3) for key in range(50)}
    path = write(tmp_path / "a.rec", payloads)
    index = path.with_suffix(".idx")
    before = index.read_bytes()
    index.unlink()
    status, said, _ = index_command("a.rec", tmp_path)
    assert (status, said) == (0, "a.idx: 50 records\n") and index.read_bytes() == before
    status, said, errors = index_command("a.rec", tmp_path)
    assert (status, said) == (1, "") and errors.endswith("a.idx: exists already; delete it first if it is wrong\n")
    write(path, {})
    index.unlink()
    assert write_index(path) == 0 and index.read_bytes() == b""


def test_no_index_is_written_for_a_damaged_file(three):
    index, whole = three.with_suffix(".idx"), three.read_bytes()
    index.unlink()
    for data, why in (
        (whole[:-1], "key 2 at offset 100: .*truncated"),
        (whole + b"\0\0\0\0", r"key 3 at offset 152: no record can start"),
        (whole + bytes(12), "key 3 at offset 152: found 0x00000000"),
        (whole[:48] + b"?" + whole[49:], "key 1 at offset 48: found"),
    ):
        three.write_bytes(data)
        with pytest.raises(RecordError, match=why):
            write_index(three)
    for path in (three.parent / "absent.rec", three.parent):
        with pytest.raises(FileNotFoundError, match=f"{path.name}: no such file"):
            write_index(path)
    assert os.listdir(three.parent) == ["a.rec"]


def read_some(reader, keys):
    return [reader.read(key) for key in keys]


@pytest.mark.parametrize("method", ["fork", "spawn"])
def test_readers_work_in_other_processes(tmp_path, method):
    payloads = {key: random.Random(key).randbytes(300) for key in range(40)}
    reader = RecordReader(write(tmp_path / "a.rec", payloads))
    copy = pickle.loads(pickle.dumps(reader))
    assert read_some(copy, payloads) == list(payloads.values())
    if method == "spawn":  # the test module cannot be imported by name in a spawned process, the reader can
        with multiprocessing.get_context(method).Pool(1) as pool:
            assert pool.map(reader.read, range(40)) == list(payloads.values())
        return
    with multiprocessing.get_context(method).Pool(2) as pool:
        halves = pool.starmap(read_some, [(reader, range(20)), (reader, range(20, 40))])
    assert halves[0] + halves[1] == list(payloads.values())


def test_errors_can_be_pickled():
    error = pickle.loads(pickle.dumps(RecordError("a.rec: key 1 at offset 2: wrong")))
    assert type(error) is RecordError and str(error) == "a.rec: key 1 at offset 2: wrong"


def test_a_file_that_is_cut_meanwhile_is_named(three):
    with RecordReader(three) as reader:
        whole = three.read_bytes()
        os.truncate(three, 60)
        assert reader.read(0) == b"\0" * 40
        for read in (reader.read, reader.read_raw, reader.read_record, reader.read_image):
            for key in (1, 2):
                with pytest.raises(RecordError, match=r"a\.rec: \d+ bytes, but 152 when it was opened"):
                    read(key)
        with pytest.raises(RecordError, match=r"a\.rec: \d+ bytes, but 152 when it was opened"):
            reader.read_labels([2])
        three.write_bytes(whole)
        assert reader.read(2) == b"\2" * 42


def test_a_disk_with_short_reads_or_none(three, monkeypatch):
    pread = os.pread
    with RecordReader(three) as reader:
        monkeypatch.setattr(os, "pread", lambda file, size, offset: pread(file, min(size, 5), offset))
        assert [reader.read(key) for key in range(3)] == [bytes([key]) * (40 + key) for key in range(3)]

        def fail(*_):
            raise OSError(5, "Input/output error")

        monkeypatch.setattr(os, "pread", fail)
        with pytest.raises(RecordError, match=r"a\.rec: cannot be read at 48 \(Input/output error\); check the disk"):
            reader.read(1)
