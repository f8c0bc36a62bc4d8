"""Make a training set of your own images: a folder a person -> train.rec.

    python tools/make_dataset/folder_to_rec.py photos dataset/mine --landmarks landmarks.txt --val 0.1

ROOT/<person>/… holds the images of a person, in any format that Pillow or OpenCV reads, sub-folders too. Faces of
112×112 pixels are kept as they are. Others are aligned by the five points that a detector found (--landmarks: a line
`name x1 y1 … x5 y5 score` an image, name = <person>/…, in pixels of the image as displayed; eyes, nose, mouth corners,
each from left to right; or a .csv) or, if they are aligned already, scaled (--resize). Writes the folder OUT, with

    train.rec, train.idx    the images in an order drawn from --seed, EXIF orientation applied
    classes.txt, images.txt line c: the folder of class c; line r: the path below ROOT of row r
    gallery/, probe/        with --val: aligned images of the held-out people; a fifth of them are in probe/ alone
    pairs.txt               with --val: `gallery/…<TAB>probe/…<TAB>1 or 0` (same person), alternately

Each contiguous tenth of pairs.txt has as many pairs of either kind and, from 20 enrolled people on, people of its own.
OUT appears when it is complete. All unusable images are reported in one go and listed in a file for --skip. The same
images, options and seed give the same bytes, whatever the number of workers.
"""

import argparse
import contextlib
import os
import pathlib
import shlex
import shutil
import sys

sys.path.insert(0, str(pathlib.Path(__file__).resolve().parents[2]))  # the repo root

import numpy as np
from tqdm import tqdm

from core.config import expand
from core.errors import report_errors
from core.files import atomic_write, lock, sync_directory
from core.manifest import record_digest, write_manifest
from engine.workers import FileSize, Workers
from recordio import IRHeader, RecordWriter, pack
from tools.ijbc_eval.align import MISFIT
from tools.ijbc_eval.options import whole_number
from tools.make_dataset.landmarks import Landmarks
from tools.make_dataset.people import FolderError, Photos, ShuffledImages, choose_pairs, hold_out, sides
from tools.make_dataset.photos import BadPhoto, encoded_face

_BATCH = 32  # images that a worker hands over at once
_SHOWN = 5  # unusable images in the message
_HOPELESS = 1000


class Faces:
    """Item i: `[(image number, bytes, suffix, misfit, reason)]` of batch i; reason is "" for a usable image."""

    def __init__(self, photos, numbers, landmarks, resize):
        self.photos, self.numbers, self.landmarks, self.resize = photos, numbers, landmarks, resize

    def __len__(self):
        return -(-len(self.numbers) // _BATCH)

    def __getitem__(self, batch):
        return [self._face(int(number)) for number in self.numbers[batch * _BATCH : (batch + 1) * _BATCH]]

    def _face(self, number):
        name = self.photos.name(number)
        points = self.landmarks[name] if self.landmarks else None
        try:
            return number, *encoded_face(self.photos.read(number), points, self.resize), ""
        except OSError as error:
            return number, b"", "", 0.0, str(error.strerror)
        except BadPhoto as error:
            unlisted = self.landmarks and points is None
            return number, b"", "", 0.0, f"{error}{f'; no line in {self.landmarks.path.name}' if unlisted else ''}"


class Conversion:
    """Runs the workers, and keeps what they find: `bad` [(name, reason)]; how many were `aligned`, how many of these
    by landmarks `unlike` a face, and the first such name."""

    def __init__(self, photos, landmarks, resize, workers):
        self.photos, self.landmarks, self.resize, self.workers = photos, landmarks, resize, workers
        self.bad, self.good, self.aligned, self.unlike, self.first_unlike = list(photos.stray), 0, 0, 0, None

    def faces(self, numbers, what):
        """Yield `(image number, bytes, suffix)` of the usable ones of `numbers`, in order, prepared by the workers."""
        batches = Faces(self.photos, numbers, self.landmarks, self.resize)
        workers = Workers(batches, range(len(batches)), FileSize(self.photos.scratch), self.workers, "--workers")
        with tqdm(total=len(numbers), desc=what, unit="img", disable=None) as bar:
            for batch in workers.received():
                for number, data, suffix, misfit, reason in batch:
                    if reason:
                        self.bad.append((self.photos.name(number), reason))
                        continue
                    self.good += 1
                    self.aligned += misfit > 0
                    if misfit > MISFIT:
                        self.unlike, self.first_unlike = self.unlike + 1, self.first_unlike or self.photos.name(number)
                    yield number, data, suffix
                bar.update(len(batch))
                if self.hopeless():
                    return

    def hopeless(self):
        """Whether the first 1,000 images are all unusable: the rest need not be looked at."""
        return not self.good and len(self.bad) >= _HOPELESS


# --- the files of the set -------------------------------------------------------------------------------------------


def write_records(folder, photos, people, seed, conversion):
    """train.rec and train.idx, classes.txt and images.txt of the trained `people`; returns the number of images."""
    numbers = ShuffledImages(photos, people, seed)
    class_of = np.full(len(photos.names), -1)
    class_of[people] = np.arange(len(people))
    rec = folder / "train.rec"
    with atomic_write(folder / "images.txt") as names:
        with RecordWriter(rec) as writer:
            writer.write(0, pack(IRHeader(0, [len(numbers) + 1, len(people)], 0, 0), b""))
            for row, (number, data, _) in enumerate(conversion.faces(numbers, rec.name)):
                label = float(class_of[photos.person(number)])
                writer.write(row + 1, pack(IRHeader(0, label, row + 1, 0), data))
                names.write(photos.name(number) + b"\n")
        records = record_digest(rec, rec.with_suffix(".idx"))
        write_manifest(folder / "images.txt", names, "image paths", records=records)
    with atomic_write(folder / "classes.txt") as classes:
        classes.writelines(photos.names[person] + b"\n" for person in people)
        write_manifest(folder / "classes.txt", classes, "class names", records=records)
    return len(numbers)


def write_evaluation(folder, photos, enrolled, strangers, seed, conversion):
    """gallery/, probe/ and pairs.txt of the held-out people; returns the number of images and of pairs."""
    gallery, probe = sides(photos, enrolled, strangers, seed)
    pairs = choose_pairs(gallery, probe, seed)
    paired, written = {image for first, second, _ in pairs for image in (first, second)}, {}
    images = 0
    for side, numbers in (("gallery", np.concatenate(gallery)), ("probe", np.concatenate(probe))):
        for number, data, suffix in conversion.faces(numbers, side):
            path = f"{side}/{_file_name(photos.name(number), suffix)}"
            (folder / path).parent.mkdir(parents=True, exist_ok=True)
            with open(folder / path, "xb") as file:
                file.write(data)
            images += 1
            if number in paired:
                written[number] = path
    if not conversion.bad:
        with atomic_write(folder / "pairs.txt") as file:
            lines = (f"{written[first]}\t{written[second]}\t{same}\n" for first, second, same in pairs)
            file.writelines(map(os.fsencode, lines))
            write_manifest(folder / "pairs.txt", file, "pairs")
    return images, len(pairs)


def _file_name(name, suffix):
    """`person/a/b.bmp` -> `person/a-b.bmp.jpg`"""
    person, _, rest = os.fsdecode(name).partition("/")
    rest = rest.replace("/", "-")
    same = rest.lower().replace(".jpeg", ".jpg").endswith(suffix)
    return f"{person}/{rest}{'' if same else suffix}"


def make(root, out, landmarks=None, resize=False, val=0.0, skip=None, seed=0, workers=0):
    """Make the set `out` of the images below `root`; returns a line about it. Raises UserError, and leaves no `out`."""
    root, out = pathlib.Path(root).absolute(), pathlib.Path(out).absolute()
    if not root.is_dir():
        raise FolderError(f"{root}: not a directory; name the one that has a folder for each person")
    if out.resolve().is_relative_to(root.resolve()):
        raise FolderError(f"{out}: lies in {root}, whose folders are people; choose another OUT")
    if out.exists():
        raise FolderError(f"{out}: exists already; remove it or choose another OUT")
    skipped = _listed_for_skip(skip) if skip else frozenset()
    landmarks = Landmarks(landmarks) if landmarks else None
    with _appears_when_complete(out) as folder:
        photos = Photos(root, folder / "paths.tmp", skipped)
        if not len(photos):
            raise FolderError(f"{root}: no image in a folder below it; expected {root}/<person>/<image>")
        trained, enrolled, strangers = hold_out(photos, val, seed)
        conversion = Conversion(photos, landmarks, resize, workers)
        said = f"{write_records(folder, photos, trained, seed, conversion)} images, {len(trained)} classes"
        if val:
            images, pairs = write_evaluation(folder, photos, enrolled, strangers, seed, conversion)
            said += f"; held out {len(enrolled) + len(strangers)} people, {images} images, {pairs} pairs"
        if conversion.bad:
            _refuse(conversion, out)
        photos.scratch.unlink()
    if conversion.unlike:
        said += (
            f"\nnote: {conversion.unlike} of {conversion.aligned} aligned images have landmarks unlike an upright "
            f"face, such as {os.fsdecode(conversion.first_unlike)}: full profiles, points in another order than in "
            "other lines, or of the picture before EXIF turned it"
        )
    return f"{out}: {said}"


def _listed_for_skip(path):
    try:
        with open(path, "rb") as file:
            return frozenset(line.rstrip(b"\r\n").split(b"\t")[0] for line in file)
    except OSError as error:
        raise FolderError(
            f"--skip {path}: cannot be read ({error.strerror}); it is the list OUT_unusable.txt that this tool writes"
        ) from None


def _refuse(conversion, out):
    """FolderError that shows the first unusable images; all are listed in a file beside `out`."""
    listed, bad = out.with_name(f"{out.name}_unusable.txt"), sorted(conversion.bad)
    with atomic_write(listed) as file:
        for name, reason in bad:
            one_line = "?".join(os.fsdecode(name).replace("\t", "?").splitlines())
            file.write(os.fsencode(f"{one_line}\t{reason}\n"))
    shown = "; ".join(f"{os.fsdecode(name)} ({reason})" for name, reason in bad[:_SHOWN])
    more = f" and {len(bad) - _SHOWN} more" if len(bad) > _SHOWN else ""
    advice = f"mend them, or leave them out: --skip {shlex.quote(str(listed))}"
    if not (conversion.landmarks or conversion.resize):
        advice = (
            "photos need --landmarks FILE of a face detector, faces that are aligned already --resize; else " + advice
        )
    first = "the first " if conversion.hopeless() else ""
    raise FolderError(f"{first}{len(bad)} unusable image(s), listed in {listed}: {shown}{more}; {advice}")


@contextlib.contextmanager
def _appears_when_complete(out):
    """A folder beside `out` that gets its name if the block succeeds, else is removed; a killed run's is made anew."""
    part = out.with_name(f".{out.name}.tmp")
    part.mkdir(parents=True, exist_ok=True)
    with lock(part / ".lock"):
        for left in part.iterdir():
            if left.name != ".lock":
                shutil.rmtree(left) if left.is_dir() else left.unlink()
        try:
            yield part
            (part / ".lock").unlink()
            os.sync()  # once, instead of once for each of the held-out images
            os.rename(part, out)
            sync_directory(out.parent)
        finally:
            shutil.rmtree(part, ignore_errors=True)


def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("root", type=expand, metavar="ROOT", help="directory with a folder of images for each person")
    add("out", type=expand, metavar="OUT", help="directory to write, such as dataset/mine")
    how = parser.add_mutually_exclusive_group()
    how.add_argument("--landmarks", type=expand, metavar="FILE", help="five points for each image not of 112×112")
    how.add_argument("--resize", action="store_true", help="scale images not of 112×112, aligned already, as a whole")
    add("--val", type=_share, default=0.0, metavar="SHARE", help="share of the people held out for evaluation")
    add(
        "--skip",
        type=expand,
        metavar="FILE",
        help="images to leave out: a line <person>/… each, as this tool lists them",
    )
    add("--seed", type=whole_number(0), default=0, help="of the order and of who is held out (default: 0)")
    add("--workers", type=whole_number(0), default=min(os.cpu_count() or 1, 16), help="processes (default: the cores)")
    with report_errors():
        print(make(**vars(parser.parse_args(argv))))


def _share(text):
    try:
        value = float(text)
    except ValueError:
        value = -1.0
    if not 0 <= value < 1:
        raise argparse.ArgumentTypeError(f"must be at least 0 and below 1, not {text}")
    return value


if __name__ == "__main__":
    main()
