"""Export a trained backbone to ONNX, compare the two on face crops, and carry its manifest along.

    python tools/export/export_onnx.py work_dirs/f128_r50_arc_data100/model.pt -net r50 r50.onnx

The graph maps `images`, float32 [B, 3, 112, 112], RGB, (x − 127.5)/127.5, any B, to `embeddings`, float32 [B, D], as
the network gives them or, with --normalise, of length 1. OUT.onnx appears if torch and ONNX Runtime agree on the crops.
What the model is (network, width, digests of model.pt, training set and old model, input) is in the graph's metadata
and in OUT.onnx.json. Needs onnx and onnxruntime.
"""

import argparse
import inspect
import io
import pathlib
import sys
import warnings

sys.path.insert(0, str(pathlib.Path(__file__).resolve().parents[2]))  # the repo root

import cv2
import numpy as np
import torch

from backbones import find_network, load_backbone
from core.config import REPO, expand
from core.errors import UserError, report_errors
from core.files import atomic_write
from core.manifest import digest, read_manifest, write_manifest
from dataset import IMAGE_SHAPE, RecordDataset, to_input

PREPROCESSING = "RGB, 112x112 aligned, float32 [B, 3, 112, 112], (x - 127.5) / 127.5"
_CROPS = 32  # compared
_LEAST_COSINE = 0.9999  # between both runtimes' embeddings of a crop; different convolutions leave 1 - 1e-6
_OPSET = 17
_CARRIED = ("method", "step", "finished", "records", "old_model")  # of the manifest of model.pt


class ExportError(UserError):
    """A model that cannot be exported; the message says what to do."""


class Normalised(torch.nn.Module):
    """A network whose embeddings have length 1."""

    def __init__(self, network):
        super().__init__()
        self.network = network

    def forward(self, images):
        return torch.nn.functional.normalize(self.network(images))


def read_crops(place):
    """Up to 32 crops of 112×112, uint8 [n, 112, 112, 3], RGB, spread over a record set or a folder with sub-folders.

    Raises ExportError for a folder without such crops, and as RecordDataset.
    """
    if place.is_file() or place.with_suffix(".rec").is_file() or (place / "train.rec").is_file():
        records = RecordDataset(place)
        rows = np.linspace(0, len(records) - 1, min(len(records), _CROPS)).astype(int)
        return torch.stack([records[row][0] for row in rows])
    paths = sorted(path for path in place.rglob("*") if path.suffix.lower() in (".jpg", ".jpeg", ".png"))
    paths = [paths[row] for row in np.linspace(0, len(paths) - 1, min(len(paths), _CROPS)).astype(int)]
    images = [image for path in paths if (image := cv2.imread(str(path))) is not None and image.shape == IMAGE_SHAPE]
    if not images:
        raise ExportError(f"--crops {place}: no .jpg or .png of 112 x 112 pixels, and no .rec; name another place")
    return torch.from_numpy(np.stack(images)[..., ::-1].copy())


def noise():
    """Stands in for crops where there are none."""
    return torch.randint(0, 256, (_CROPS, *IMAGE_SHAPE), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))


def traced(network, facts):
    """The network, in eval mode on the CPU, as the bytes of an ONNX graph with the facts as metadata."""
    import onnx

    # Newer torch has a second exporter, which needs onnxscript; older torch only this one, without the option.
    how = {"dynamo": False} if "dynamo" in inspect.signature(torch.onnx.export).parameters else {}
    file = io.BytesIO()
    with torch.no_grad(), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # that this exporter is the old one
        torch.onnx.export(
            network,
            (torch.zeros(2, 3, 112, 112),),
            file,
            input_names=["images"],
            output_names=["embeddings"],
            dynamic_axes={"images": {0: "batch"}, "embeddings": {0: "batch"}},
            opset_version=_OPSET,
            **how,
        )
    graph = onnx.load_model_from_string(file.getvalue())
    onnx.helper.set_model_props(graph, {name: str(value) for name, value in facts.items()})
    return graph.SerializeToString()


def compare(network, graph, crops):
    """`(largest difference, smallest cosine)` of torch's and ONNX Runtime's embeddings, one by one and all at once.

    The difference is relative to the largest number in torch's.
    Raises ExportError if they are not the same embeddings.
    """
    import onnxruntime

    images = to_input(crops)
    with torch.no_grad():
        expected = network(images).numpy()
    session = onnxruntime.InferenceSession(graph, providers=["CPUExecutionProvider"])
    together = session.run(None, {"images": images.numpy()})[0]
    alone = np.concatenate([session.run(None, {"images": image[None].numpy()})[0] for image in images])
    found, expected = np.stack([together, alone]).astype(np.float64), expected[None].astype(np.float64)
    lengths = np.linalg.norm(found, axis=2) * np.linalg.norm(expected, axis=2)
    smallest = float(((found * expected).sum(axis=2) / lengths).min())
    if not smallest > _LEAST_COSINE:
        raise ExportError(f"torch and ONNX Runtime give other embeddings, cosine {smallest:.6f}; update onnxruntime")
    return float(np.abs(found - expected).max() / np.abs(expected).max()), smallest


def facts_of(model, network, width, normalise):
    """What the manifest and the graph's metadata say of the export, {name: plain value}."""
    manifest = read_manifest(model)
    stated = manifest.get("network", network)
    if stated != network:
        raise ExportError(f"{model}: its manifest says -net {stated}, not {network}")
    facts = {"network": network, "width": width, "model": digest(model), "preprocessing": PREPROCESSING}
    facts["embeddings"] = "length 1" if normalise else "as the network gives them"
    return facts | {key: manifest[key] for key in _CARRIED if key in manifest}


def export(model, out, network=None, normalise=False, crops=None):
    """Write the file `out` and its manifest; returns lines about it. crops: uint8 [n, 112, 112, 3]; None: noise."""
    try:
        import onnx  # noqa: F401
        import onnxruntime  # noqa: F401
    except ImportError as error:
        raise ExportError(f"exporting needs {error.name}: pip install onnx onnxruntime") from None
    network = network or find_network(model)
    backbone = load_backbone(model, network)
    facts = facts_of(model, network, backbone.num_features, normalise)
    backbone = Normalised(backbone).eval() if normalise else backbone
    graph = traced(backbone, facts)
    largest, smallest = compare(backbone, graph, noise() if crops is None else crops)
    out.parent.mkdir(parents=True, exist_ok=True)
    with atomic_write(out) as file:
        file.write(graph)
        write_manifest(out, file, "onnx", **facts)
    shown = f"{len(crops)} crops" if crops is not None else "noise, for want of crops (--crops)"
    return (
        f"{out}: {network}, {facts['width']} wide, embeddings {facts['embeddings']}\n"
        f"torch and ONNX Runtime on {shown}: largest relative difference {largest:.1e}, smallest cosine {smallest:.7f}"
    )


def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("model", type=expand, help="a run's model.pt, or any checkpoint that ijbc_eval.py reads")
    add("-net", metavar="NETWORK", help="its network (default: one that fits)")
    add("out", type=expand, metavar="OUT.onnx")
    add("--normalise", action="store_true", help="embeddings of length 1")
    usual = REPO / "dataset/ms1m-retinaface-t1"
    add(
        "--crops",
        type=expand,
        metavar="PLACE",
        help=f"a .rec or a folder of 112×112 crops to compare on (default: {usual.relative_to(REPO)} if it is there, "
        "else noise)",
    )
    with report_errors():
        args = parser.parse_args(argv)
        place = args.crops or (usual if (usual / "train.rec").is_file() else None)
        crops = read_crops(place) if place else None
        print(export(args.model, args.out, args.net, args.normalise, crops))


if __name__ == "__main__":
    main()
