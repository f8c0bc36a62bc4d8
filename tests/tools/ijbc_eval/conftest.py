"""A small IJB-shaped directory: blobs as faces, official file names, many media a template, both galleries."""

import dataclasses
import json
import pathlib

import cv2
import numpy as np
import pytest
import torch

import backbones
from tools.ijbc_eval import bootstrap, compat_report, compat_text
from tools.ijbc_eval.align import REFERENCE

FPR, FPIR = 0.1, 0.3  # of the shared report


@dataclasses.dataclass
class SmallSet:
    data_dir: pathlib.Path
    subset: str
    faces: list  # (name, template, medium, landmarks [5, 2], score, subject)
    pairs: list  # (template, template, label)
    galleries: dict  # name -> list of (template, subject)
    probes: list  # (template, subject)

    @property
    def root(self):
        return self.data_dir / self.subset

    def meta(self, end):
        return self.root / "meta" / f"{self.subset.lower()}_{end}"


def draw_image(rng, colour, size=150):
    """A coloured disc and four blobs on noise, and five landmarks around the middle."""
    image = rng.integers(0, 60, (size, size, 3)).astype(np.uint8)
    cv2.circle(image, (size // 2, size // 2), 45, [int(c) for c in colour], -1)
    for _ in range(4):
        centre = rng.integers(40, size - 40, 2)
        cv2.circle(image, [int(c) for c in centre], 6, [int(c) for c in rng.integers(0, 255, 3)], -1)
    angle, scale = rng.uniform(-0.4, 0.4), rng.uniform(0.7, 1.2)
    turn = scale * np.array([[np.cos(angle), -np.sin(angle)], [np.sin(angle), np.cos(angle)]])
    landmarks = (REFERENCE - 56) @ turn.T + size / 2 + rng.normal(0, 1, (5, 2))
    return image, landmarks


def make_set(data_dir, subset="IJBC", subjects=9, seed=0):
    """Subject s is in the first gallery (s % 3 == 0), the second (1) or in none (2); three probe templates each."""
    rng = np.random.default_rng(seed)
    prefix = subset.lower()
    root = pathlib.Path(data_dir) / subset
    (root / "meta").mkdir(parents=True)
    (root / "loose_crop").mkdir()
    gallery_names = ("G1", "G2") if subset == "IJBC" else ("S1", "S2")
    made = SmallSet(pathlib.Path(data_dir), subset, [], [], {name: [] for name in gallery_names}, [])
    template = 7
    for subject in range(subjects):
        colour = rng.integers(60, 255, 3)
        for role in ("gallery", "probe", "probe", "probe"):
            if role == "gallery" and subject % 3 == 2:
                continue
            template += int(rng.integers(1, 5))
            listed = made.probes if role == "probe" else made.galleries[gallery_names[subject % 3]]
            listed.append((template, 100 + subject))
            for medium in range(int(rng.integers(1, 4))):
                for _ in range(int(rng.integers(1, 4))):
                    name = f"{len(made.faces) + 1}.jpg"
                    image, landmarks = draw_image(rng, np.clip(colour + rng.normal(0, 25, 3), 0, 255))
                    cv2.imwrite(str(root / "loose_crop" / name), image)
                    score = round(float(rng.uniform(0.5, 1)), 4)
                    made.faces.append((name, template, medium, np.round(landmarks, 3), score, 100 + subject))
    enrolled = [entry for gallery in made.galleries.values() for entry in gallery]
    made.pairs = [(g, p, int(gs == ps)) for g, gs in enrolled for p, ps in made.probes]
    write_meta(made)
    assert made.meta("face_tid_mid.txt").name == f"{prefix}_face_tid_mid.txt"
    return made


def write_meta(made):
    with open(made.meta("name_5pts_score.txt"), "w") as points, open(made.meta("face_tid_mid.txt"), "w") as media:
        for name, template, medium, landmarks, score, _ in made.faces:
            points.write(f"{name} {' '.join(f'{value:.3f}' for value in landmarks.ravel())} {score}\n")
            media.write(f"{name} {template} {medium}\n")
    made.meta("template_pair_label.txt").write_text("".join(f"{a} {b} {label}\n" for a, b, label in made.pairs))
    for end, entries in [
        *((f"gallery_{name}", rows) for name, rows in made.galleries.items()),
        ("probe_mixed", made.probes),
    ]:
        images = {}
        for name, template, *_ in made.faces:
            images.setdefault(template, []).append(name)
        lines = [f"{t},{s},img/{name},1" for t, s in entries for name in images[t]]
        made.meta(f"1N_{end}.csv").write_text("\n".join(["TEMPLATE_ID,SUBJECT_ID,FILENAME,FRAME", *lines]) + "\n")


def make_model(path, num_features=16, seed=0, network="tiny"):
    """A randomly initialised network of the repo, saved as training saves it (with a head that is to be ignored)."""
    torch.manual_seed(seed)
    model = backbones.get_model(network, num_features=num_features)
    state = model.state_dict() | {"cls_fc.weight": torch.zeros(3, num_features)}
    path.parent.mkdir(parents=True, exist_ok=True)
    torch.save(state, path)
    return path


@pytest.fixture(scope="session")
def shared_set(tmp_path_factory):
    """A set that tests only read."""
    return make_set(tmp_path_factory.mktemp("ijb"))


@pytest.fixture(scope="session")
def shared_models(tmp_path_factory):
    folder = tmp_path_factory.mktemp("models")
    return {
        name: make_model(folder / name / "model.pt", seed=seed)
        for seed, name in enumerate(["old_model", "new_model", "independent_model"])
    }


@pytest.fixture
def make_ijb():
    return make_set


@pytest.fixture
def rewrite_meta():
    return write_meta


@pytest.fixture
def save_model():
    return make_model


class Degrees:
    """A model that reads a grey image's value v as an angle: (cos, sin) of v + offset degrees."""

    num_features = 2

    def __init__(self, offset):
        self.offset = offset

    def __call__(self, images):
        angle = np.deg2rad(images.numpy()[:, 56, 56, 0].astype(float) + self.offset)
        return np.stack([np.cos(angle), np.sin(angle)], axis=1).astype(np.float32)


@pytest.fixture
def degree_models(tmp_path, monkeypatch):
    """`models(old=0, new=7)` -> {name: path}: models of these offsets, whose scores are cosines of differences of v."""

    def make(**offsets):
        paths = {name: tmp_path / f"{name}.pt" for name in offsets}
        for name, path in paths.items():
            path.write_text(name)
        load = lambda model_file, *_: Degrees(offsets[model_file.name])  # noqa: E731
        monkeypatch.setattr("tools.ijbc_eval.embed.load_model", load)
        monkeypatch.setattr("backbones.model_files.ModelFile.found_network", "tiny")
        monkeypatch.chdir(tmp_path)
        return {name: str(path) for name, path in paths.items()}

    return make


@pytest.fixture
def draw_crop():
    """`draw(path, v)` writes an aligned crop of the grey value v, and its parents."""

    def draw(path, value, size=112):
        path.parent.mkdir(parents=True, exist_ok=True)
        cv2.imwrite(str(path), np.full((size, 112, 3), value, np.uint8))

    return draw


class Plain:
    """The whole evaluation of a SmallSet by loops over single images, templates and pairs, in float64."""

    def __init__(self, made, model_file, network="tiny", skip=()):
        self.made, self.skip = made, skip
        self.model = backbones.load_backbone(str(model_file), network, "cpu")
        self.embs = {}
        for name, _, _, landmarks, _, _ in made.faces:
            if name not in skip:
                image = cv2.cvtColor(cv2.imread(str(made.root / "loose_crop" / name)), cv2.COLOR_BGR2RGB)
                image = cv2.warpAffine(image, self.umeyama(landmarks.astype(np.float32)), (112, 112), borderValue=0.0)
                self.embs[name] = self.embed(image), self.embed(image[:, ::-1])

    @staticmethod
    def umeyama(landmarks):
        """Umeyama 1991, eq. 38-43, by singular values."""
        source, target = landmarks.astype(np.float64), REFERENCE
        a, b = source - source.mean(axis=0), target - target.mean(axis=0)
        u, d, vt = np.linalg.svd(b.T @ a / 5)
        sign = np.diag([1, np.sign(np.linalg.det(u) * np.linalg.det(vt))])
        rotation = u @ sign @ vt
        scale = np.trace(np.diag(d) @ sign) / (a**2).sum(axis=1).mean()
        shift = target.mean(axis=0) - scale * rotation @ source.mean(axis=0)
        return np.hstack([scale * rotation, shift[:, None]])

    def embed(self, image):
        with torch.no_grad():
            pixels = torch.from_numpy((image.astype(np.float32) - 127.5) / 128).permute(2, 0, 1)[None]
            return self.model(pixels)[0].numpy().astype(np.float64)

    def templates(self, normalise=False, detector_score=True, flip=True):
        """template id -> L2-normalised feature."""
        groups = {}
        for name, template, medium, _, score, _ in self.made.faces:
            if name not in self.skip:
                feature = self.embs[name][0] + (self.embs[name][1] if flip else 0)
                feature = feature / np.linalg.norm(feature) if normalise else feature
                feature = feature * score if detector_score else feature
                groups.setdefault(template, {}).setdefault(medium, []).append(feature)
        sums = {template: sum(np.mean(found, axis=0) for found in media.values()) for template, media in groups.items()}
        return {template: value / np.linalg.norm(value) for template, value in sums.items()}

    @staticmethod
    def pair_scores(made, first, second):
        return np.array([first[a] @ second[b] for a, b, _ in made.pairs])

    @staticmethod
    def tpr_at(scores, label, fpr):
        """Every threshold there is, each by counting."""
        genuine, impostor = scores[label == 1], scores[label == 0]
        best = 0.0
        for threshold in set(scores.tolist()):
            if np.mean(impostor >= threshold) <= fpr:
                best = max(best, float(np.mean(genuine >= threshold)))
        return best

    @staticmethod
    def search(gallery, probes, gallery_features, probe_features, tops, fpirs):
        """Top-k and TPIR of one gallery by sorting every row: gallery, probes are lists of (template, subject)."""
        subjects = {subject for _, subject in gallery}
        ranks, found, others = [], [], []
        for template, subject in probes:
            row = sorted(((float(probe_features[template] @ gallery_features[g]), s) for g, s in gallery), reverse=True)
            if subject in subjects:
                order = [s for _, s in row]
                ranks.append(order.index(subject) + 1)
                found.append(row[0][0] if order[0] == subject else -np.inf)
            else:
                others.append(row[0][0])
        tpirs = []
        for fpir in fpirs:
            best = 0.0
            for threshold in [*others, -np.inf]:  # the rate only changes at these
                if np.mean(np.array(others) > threshold) <= fpir:
                    best = max(best, float(np.mean(np.array(found) > threshold)))
            tpirs.append(best)
        return [float(np.mean(np.array(ranks) <= k)) for k in tops], tpirs

    @staticmethod
    def published(galleries, probes, gallery_features, probe_features, tops, fpirs):
        """1:N as the scripts in circulation read it, rows of figures in fractions: each gallery, both, both stacked.

        `galleries` and `probes` as in `search`. Top-k of a gallery is over its mated probes, else over all probes.
        """

        def hits(gallery, k):
            found = 0
            for template, subject in probes:
                row = sorted(gallery, key=lambda entry: -float(probe_features[template] @ gallery_features[entry[0]]))
                found += subject in [s for _, s in row[:k]]
            return found

        rows = []
        for gallery in galleries:
            enrolled = {subject for _, subject in gallery}
            maxima, own = [], []
            for template, subject in probes:
                scores = {s: float(probe_features[template] @ gallery_features[g]) for g, s in gallery}
                best = max(scores.values())
                if subject in enrolled:
                    own.append((scores[subject], scores[subject] == best))
                else:
                    maxima.append(best)
            maxima.sort(reverse=True)
            thresholds = [maxima[max(int(len(maxima) * fpir) - 1, 0)] for fpir in fpirs]
            tpirs = [sum(first and score > least for score, first in own) / len(own) for least in thresholds]
            rows.append(([hits(gallery, k) / len(own) for k in tops], tpirs))
        together = [sum(hits(gallery, k) for gallery in galleries) / len(probes) for k in tops]
        mean = [sum(column) / len(galleries) for column in zip(*(tpirs for _, tpirs in rows))]
        stacked = [entry for gallery in galleries for entry in gallery]
        mixed = [hits(stacked, k) / len(probes) for k in tops]
        return [*rows, (together, mean), (mixed, [np.nan] * len(fpirs))]


@pytest.fixture(scope="session")
def plain_class():
    return Plain


@pytest.fixture(scope="session")
def shared_plain(shared_set, shared_models):
    return {name: Plain(shared_set, path) for name, path in shared_models.items()}


@pytest.fixture(scope="session")
def shared_cache(tmp_path_factory):
    return tmp_path_factory.mktemp("cache")


@pytest.fixture(scope="module")
def make_report(tmp_path_factory, shared_set, shared_models, shared_cache):
    old, new, independent = (shared_models[name] for name in ("old_model", "new_model", "independent_model"))

    def make(*options):
        out = tmp_path_factory.mktemp("report")
        words = f"--old {old} --new First={new} --new Same={old}:tiny --independent Free={independent} --new_net tiny"
        words += f" -d {shared_set.data_dir} --workers 0 --cache-dir {shared_cache} --fpr {FPR} --fpir {FPIR}"
        compat_report.main([*words.split(), "--bootstrap", "60", "--out", str(out), *options])
        return out

    with pytest.MonkeyPatch.context() as patch:
        for module in (bootstrap, compat_text):
            patch.setattr(module, "FEWEST_PEOPLE", 6)  # as many have pairs here
        yield make


@pytest.fixture(scope="module")
def report_dir(make_report):
    return make_report()


@pytest.fixture(scope="module")
def report(report_dir):
    return json.loads((report_dir / "report.json").read_text())
