"""The protocol files: what is read, and that the cache notices changes."""

import os

import numpy as np
import pytest

from tools.ijbc_eval import protocol
from tools.ijbc_eval.files import EvalError
from tools.ijbc_eval.protocol import Protocol


def pair_ids(faces, pairs):
    ids = faces.template_ids
    return ids[pairs.first_templates[pairs.first]], ids[pairs.second_templates[pairs.second]]


def test_everything_arrives(shared_set, tmp_path):
    protocol = Protocol(shared_set.data_dir, "IJBC", tmp_path)
    faces, ids = protocol.faces(), sorted({face[1] for face in shared_set.faces})
    assert faces.template_ids.tolist() == ids
    assert [name.decode() for name in faces.names] == [face[0] for face in shared_set.faces]
    np.testing.assert_allclose(faces.landmarks, [face[3] for face in shared_set.faces], rtol=1e-6)
    np.testing.assert_allclose(faces.scores, [face[4] for face in shared_set.faces], rtol=1e-6)
    assert [ids[row] for row in faces.template] == [face[1] for face in shared_set.faces]
    same = faces.medium[:, None] == faces.medium[None]
    media = [face[1:3] for face in shared_set.faces]
    assert same.tolist() == [[one == other for other in media] for one in media]
    pairs = protocol.pairs(faces)
    first, second = pair_ids(faces, pairs)
    assert list(zip(first, second, pairs.label)) == shared_set.pairs
    assert [ids[row] for row in pairs.first_templates] == sorted({first for first, *_ in shared_set.pairs})
    assert [ids[row] for row in pairs.second_templates] == sorted({second for _, second, _ in shared_set.pairs})
    for name, listed in shared_set.galleries.items():
        found = protocol.galleries(faces)[name]
        assert [(ids[row], subject) for row, subject in zip(found.template, found.subject)] == listed
    found = protocol.probes(faces, protocol.galleries(faces))
    assert [(ids[row], subject) for row, subject in zip(found.template, found.subject)] == shared_set.probes


@pytest.fixture
def readers(monkeypatch):
    """How often each part was read from its files."""
    counts = {"read_faces": 0, "read_pairs": 0, "read_subjects": 0}

    def counted(name, original):
        def read(*arguments):
            counts[name] += 1
            return original(*arguments)

        return read

    for name in counts:
        monkeypatch.setattr(protocol, name, counted(name, getattr(protocol, name)))
    return counts


def read_all(made, cache, fresh=False):
    protocol = Protocol(made.data_dir, made.subset, cache, fresh)
    faces = protocol.faces()
    return faces, protocol.pairs(faces), protocol.probes(faces, protocol.galleries(faces))


def test_the_cache_is_used_until_a_file_changes(tmp_path, make_ijb, rewrite_meta, readers):
    made, cache = make_ijb(tmp_path / "data", subjects=4), tmp_path / "cache"
    read_all(made, cache)
    faces, pairs, _ = read_all(made, cache)
    assert readers == {"read_faces": 1, "read_pairs": 1, "read_subjects": 3}
    assert pairs.label.dtype == bool and faces.names.dtype.kind == "S"
    path = made.meta("template_pair_label.txt")
    times, text = path.stat(), path.read_text()
    first, rest = text.split("\n", 1)
    path.write_text(f"{first[:-1]}{1 - int(first[-1])}\n{rest}")  # as long as before, and dated as before
    os.utime(path, ns=(times.st_atime_ns, times.st_mtime_ns))
    assert read_all(made, cache)[1].label[0] != pairs.label[0]
    assert readers == {"read_faces": 1, "read_pairs": 2, "read_subjects": 3}
    made.faces[0] = (*made.faces[0][:2], 77, *made.faces[0][3:])
    rewrite_meta(made)
    read_all(made, cache)
    assert readers == {"read_faces": 2, "read_pairs": 3, "read_subjects": 6}
    read_all(made, cache, fresh=True)
    assert readers == {"read_faces": 3, "read_pairs": 4, "read_subjects": 9}


def test_two_data_directories_do_not_share_a_cache(tmp_path, make_ijb):
    one, other = (make_ijb(tmp_path / name, subjects=4, seed=seed) for seed, name in enumerate("ab"))
    for made in (one, other, one):
        assert len(read_all(made, tmp_path / "cache")[0].names) == len(made.faces)


def _another_type(path):
    with np.load(path) as saved:
        arrays = {key: saved[key] for key in saved.files}
    key = next(key for key, array in arrays.items() if array.dtype.kind == "i" and array.size)
    np.savez(path, **arrays | {key: arrays[key].astype(np.float64)})


def _one_bit(path):
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)


def _array_alone(path):
    with open(path, "wb") as file:
        np.save(file, np.zeros(3))


@pytest.mark.parametrize(
    "damage",
    [
        lambda path: path.write_bytes(path.read_bytes()[:100]),
        lambda path: path.write_bytes(b""),
        lambda path: path.write_bytes(bytes(path.stat().st_size)),
        _another_type,
        _one_bit,
        _array_alone,
    ],
)
@pytest.mark.parametrize("fresh", [False, True])
def test_a_damaged_cache_is_read_again(tmp_path, make_ijb, capsys, damage, fresh):
    made, cache = make_ijb(tmp_path / "data", subjects=4), tmp_path / "cache"
    expected = read_all(made, cache)
    paths = sorted((cache / "meta").iterdir())
    assert len(paths) == 5  # faces, pairs, two galleries, probes
    for path in paths:
        damage(path)
    for lines, again in ((0 if fresh else 5, fresh), (0, False)):
        for found, part in zip(read_all(made, cache, again), expected):
            for key, array in vars(part).items():
                np.testing.assert_array_equal(vars(found)[key], array)
                assert vars(found)[key].dtype == array.dtype
        assert capsys.readouterr().err.count(": damaged cache (") == lines


def test_a_cache_of_an_earlier_version_is_read_again_without_a_word(tmp_path, make_ijb, readers, capsys):
    made, cache = make_ijb(tmp_path / "data", subjects=4), tmp_path / "cache"
    read_all(made, cache)
    for path in (cache / "meta").iterdir():
        np.savez(path, stamps=np.array("2"), names=np.array([b"1.jpg"]))
    read_all(made, cache)
    assert list(readers.values()) == [2, 2, 6] and not capsys.readouterr().err


@pytest.mark.parametrize(
    ("one", "other"), [("./{}", "{}"), ("img/{}", "img/./{}"), (".//img/../{}", "./{}"), ("r/" * 100 + "{}",) * 2]
)
def test_names_with_folders(tmp_path, make_ijb, rewrite_meta, one, other):
    made = make_ijb(tmp_path / "data", subjects=4)
    plain, faces, texts = [face[0] for face in made.faces], made.faces, []
    for place in (other, one):
        made.faces = [(place.format(face[0]), *face[1:]) for face in faces]
        rewrite_meta(made)
        texts.append(made.meta("face_tid_mid.txt").read_text())
    made.meta("face_tid_mid.txt").write_text(texts[0])
    found = Protocol(made.data_dir, "IJBC", tmp_path / "cache").faces()
    folder = "img/" if other.startswith("img") else one[:-2] if other.startswith("r") else ""
    assert found.names.tolist() == [f"{folder}{name}".encode() for name in plain]
    assert found.image.tolist() == list(range(len(plain)))


def test_landmarks_unlike_a_face_are_pointed_out_every_time(tmp_path, make_ijb, rewrite_meta, capsys):
    made = make_ijb(tmp_path / "data", subjects=4)
    read_all(made, tmp_path / "cache")
    assert not capsys.readouterr().err
    for row, order in ((4, [1, 0, 2, 4, 3]), (6, [4, 3, 2, 1, 0])):
        made.faces[row] = (*made.faces[row][:3], made.faces[row][3][order], *made.faces[row][4:])
    rewrite_meta(made)
    for _ in range(2):
        read_all(made, tmp_path / "cache")
        line = f"score.txt: 2 of {len(made.faces)} lines have landmarks unlike an upright face, the first in line 5:"
        assert line in capsys.readouterr().err


def test_large_template_numbers(tmp_path, make_ijb, rewrite_meta):
    """Beyond the size for which templates are looked up in a table."""
    made = make_ijb(tmp_path / "data", subjects=4)
    far = 10**12
    made.faces = [(face[0], face[1] + far, *face[2:]) for face in made.faces]
    made.pairs = [(a + far, b + far, label) for a, b, label in made.pairs]
    made.probes = [(template + far, subject) for template, subject in made.probes]
    made.galleries = {name: [(t + far, s) for t, s in rows] for name, rows in made.galleries.items()}
    rewrite_meta(made)
    faces, pairs, _ = read_all(made, tmp_path / "cache")
    assert list(zip(*pair_ids(faces, pairs))) == [pair[:2] for pair in made.pairs]


def test_a_list_of_two_columns(tmp_path, make_ijb):
    """Without a line end, the last subject may be cut short: nothing else would tell."""
    made = make_ijb(tmp_path / "data", subjects=4)
    path = made.meta("1N_probe_mixed.csv")
    rows = [f"{template},{subject}" for template, subject in made.probes]
    protocol = Protocol(made.data_dir, "IJBC", tmp_path / "cache")
    path.write_text("\n".join(["TEMPLATE_ID,SUBJECT_ID", *rows]) + "\n")
    faces = protocol.faces()
    assert protocol.probes(faces, protocol.galleries(faces)).subject.tolist() == [subject for _, subject in made.probes]
    path.write_text(path.read_text()[:-2])
    message = rf"probe_mixed\.csv line {len(rows) + 1}: .*add a newline"
    with pytest.raises(EvalError, match=message):
        protocol.probes(faces, protocol.galleries(faces))


def test_rows_of_a_template_in_several_places_and_windows_line_ends(tmp_path, make_ijb):
    made = make_ijb(tmp_path / "data", subjects=4)
    path = made.meta("1N_probe_mixed.csv")
    header, *rows = path.read_text().splitlines()
    path.write_bytes("\r\n".join([header, *rows, *rows[::-1], ""]).encode())
    protocol = Protocol(made.data_dir, "IJBC", tmp_path / "cache")
    faces = protocol.faces()
    found = protocol.probes(faces, protocol.galleries(faces))
    ids = faces.template_ids
    assert [(ids[row], subject) for row, subject in zip(found.template, found.subject)] == made.probes
