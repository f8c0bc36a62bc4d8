"""`folder_to_rec.py` against MXNet's im2rec on the same folder, alternating; without MXNet, against a plain loop.

    python benchmarks/bench_folder_to_rec.py [--images 4000] [--side 112] [--workers 2] [--rounds 3]

JPEGs of side x side pixels, 100 a person. 112: both copy them, folder_to_rec once it has decoded them as training will;
other sizes: both scale them to 112 and encode them again. Both run as scripts, so their start (im2rec: with its list)
counts.
"""

import importlib.util
import os
import pathlib
import shutil
import subprocess
import sys
import tempfile

sys.path.insert(0, str(pathlib.Path(__file__).resolve().parents[1]))  # the repo root

import cv2
import numpy as np

import recordio
from benchmarks.common import draw_jpeg, in_turns, median, options, print_ratio

REPO = pathlib.Path(__file__).resolve().parents[1]
IM2REC = "import numpy, runpy, sys; numpy.bool = bool; runpy.run_module('mxnet.tools.im2rec', run_name='__main__')"


def draw_folder(root, images, side):
    """`images` links to a few different JPEGs, 100 a person."""
    root.mkdir()
    rng, drawn = np.random.default_rng(0), []
    for number in range(8):
        image = cv2.resize(cv2.imdecode(draw_jpeg(rng), cv2.IMREAD_COLOR), (side, side))
        drawn.append(root.parent / f"{number}.jpg")
        cv2.imwrite(str(drawn[-1]), image, [cv2.IMWRITE_JPEG_QUALITY, 95])
    for number in range(images):
        person = root / f"{number // 100:05}"
        person.mkdir(exist_ok=True)
        os.link(drawn[number % len(drawn)], person / f"{number % 100:02}.jpg")


def run(*words):
    subprocess.run([sys.executable, *map(str, words)], check=True, cwd=REPO, capture_output=True)


def folder_to_rec(root, out, side, workers):
    shutil.rmtree(out, ignore_errors=True)
    resize = ["--resize"] if side != 112 else []
    run("tools/make_dataset/folder_to_rec.py", root, out, "--workers", workers, *resize)
    return out / "train.rec"


def im2rec(root, out, side, workers):
    how = ["--resize", 112] if side != 112 else ["--pass-through"]
    run("-c", IM2REC, "--list", "--recursive", out, root)
    run("-c", IM2REC, "--num-thread", workers, *how, out, root)
    return out.with_suffix(".rec")


def plain_loop(root, out, side, workers):
    with recordio.RecordWriter(out.with_suffix(".rec")) as writer:
        for key, path in enumerate(sorted(root.rglob("*.jpg"))):
            data = path.read_bytes()
            if side != 112:
                image = cv2.imdecode(np.frombuffer(data, np.uint8), cv2.IMREAD_COLOR)
                data = cv2.imencode(".jpg", cv2.resize(image, (112, 112)), [cv2.IMWRITE_JPEG_QUALITY, 95])[1].tobytes()
            writer.write(key, recordio.pack(recordio.IRHeader(0, float(path.parent.name), key, 0), data))
    return out.with_suffix(".rec")


def main():
    args = options(__doc__, images=4000, side=112, workers=2, rounds=3)
    other = im2rec if importlib.util.find_spec("mxnet") else plain_loop
    with tempfile.TemporaryDirectory() as folder:
        root = pathlib.Path(folder, "images")
        draw_folder(root, args.images, args.side)
        tools = {tool.__name__: tool for tool in (folder_to_rec, other)}

        def part(name):
            reader = recordio.RecordReader(tools[name](root, pathlib.Path(folder, name), args.side, args.workers))
            found = sum(len(reader.read_record(key)[1]) > 0 for key in reader.keys.tolist())
            assert found == args.images, f"{name} wrote {found} of {args.images} images"

        times = in_turns({name: lambda name=name: part(name) for name in tools}, args.rounds, warmup=0)
        for name, spent in times.items():
            print(f"{name:14s} {median([args.images / one for one in spent], '.0f')} images/s")
        what = f"{other.__name__} / folder_to_rec, {args.side} pixels"
        print_ratio(what, times[other.__name__], times["folder_to_rec"], ".2f")


if __name__ == "__main__":
    main()
