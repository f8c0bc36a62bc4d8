"""Torch, ONNX and MXNet models behind one call: uint8 images in, float32 embeddings out.

The evaluation and the extraction of old features open models of any origin by this code.
"""

import contextlib
import dataclasses
import functools
import os
import pathlib
import re
import sys

import numpy as np
import torch

from backbones import BackboneError, find_network, load_backbone
from core.config import expand
from core.distributed import default_device
from core.manifest import Manifest, digest, manifest_path, read_manifest

# File names that do not identify the model; its directory does (work_dirs/<config name>/model.pt).
_PLAIN_NAMES = {"model", "backbone", "checkpoint", "best", "last"}


@dataclasses.dataclass(frozen=True)
class Preprocessing:
    """What a model gets: (x − mean) / std of the pixels 0 … 255, channels first, in the order RGB or BGR."""

    mean: float = 127.5
    std: float = 127.5
    bgr: bool = False

    def apply(self, images):
        """RGB uint8 [B, 112, 112, 3] -> float32 [B, 3, 112, 112]."""
        images = images.flip(3) if self.bgr else images
        return ((images.float() - self.mean) / self.std).permute(0, 3, 1, 2).contiguous()

    def __str__(self):
        return f"{'BGR' if self.bgr else 'RGB'} (x - {self.mean:.17g}) / {self.std:.17g}"


@dataclasses.dataclass(frozen=True)
class ModelFile:
    """The model of -m and -net: `x.pt`, `x.pth` or `x.safetensors` (a state dict of the backbone `network`; None: found
    by its keys), `x.onnx`, or `prefix,epoch`. preprocessing: None = the caller's default."""

    file: str
    network: str | None = None
    preprocessing: Preprocessing | None = None

    def __post_init__(self):
        object.__setattr__(self, "file", str(expand(self.file)))

    @property
    def kind(self):
        if self.file.endswith((".pt", ".pth", ".safetensors")):
            return "torch"
        if self.file.endswith(".onnx"):
            return "onnx"
        if "," in self.file and re.fullmatch("[0-9]{1,9}", self.file.rsplit(",", 1)[1]):
            return "mxnet"
        if os.path.isdir(self.file):
            raise BackboneError(f"{self.file}: is a directory; name the file in it, such as {self.file}/model.pt")
        raise BackboneError(
            f"{self.file}: unknown kind of model; use x.pt, x.pth, x.safetensors, x.onnx, or MXNet's prefix,epoch"
        )

    @property
    def paths(self):
        """The model's files; BackboneError for an unknown kind."""
        if self.kind != "mxnet":
            return [pathlib.Path(self.file)]
        prefix, epoch = self.file.rsplit(",", 1)
        return [pathlib.Path(f"{prefix}-symbol.json"), pathlib.Path(f"{prefix}-{int(epoch):04d}.params")]

    def check_files(self):
        """BackboneError if a file is missing, or has a network of its own beside `network`; a line on stderr if its
        manifest says that its run is unfinished."""
        if self.network and self.kind != "torch":
            raise BackboneError(f"{self.file}: has its own network; leave out {self.network}, state dicts need one")
        for path in self.paths:
            if not os.path.isfile(path):
                raise BackboneError(f"{path}: no such model file; check the path")
        if self.manifest.get("finished") is False:
            _warn_once(f"{self.file}: of an unfinished run, after step {self.manifest.get('step')}")

    @functools.cached_property
    def manifest(self):
        """The core.manifest.Manifest beside the model, empty without one: many models come from elsewhere."""
        path = self.paths[0]
        return read_manifest(path) if manifest_path(path).is_file() else Manifest(path)

    @property
    def identity(self):
        """Digest of the model, as the manifests of what was made from it say."""
        return digest(self.paths[0])

    def warn_of_another_old_model(self, old):
        """A line on stderr if this model was trained against another old model than `old`, a ModelFile or stored."""
        expected = self.manifest.get("old_model")
        if expected and old.identity not in (None, expected, self.identity):  # its own gallery: a self-test
            _warn_once(
                f"{self.file}: trained against another old model than {old.file}, so this cross-test says nothing "
                "about the gallery that it was trained for; give that old model with -m_old or --old"
            )

    @functools.cached_property
    def found_network(self):
        """`network`, or the backbone that fits the state dict's keys; BackboneError if none fits."""
        if self.network or self.kind != "torch":
            return self.network
        self.check_files()
        network = find_network(self.file)
        print(f"{self.file}: network {network}, found by its keys")
        return network

    @property
    def name(self):
        path = pathlib.Path(self.file.rsplit(",", 1)[0])
        stem = path.stem if self.kind != "mxnet" else path.name
        return path.resolve().parent.name if stem in _PLAIN_NAMES else stem


def load_model(model_file, device=None, default=Preprocessing()):
    """A callable with `.num_features`: uint8 RGB [B, 112, 112, 3] -> float32 embeddings [B, num_features] (numpy).

    default: the Preprocessing of a model file that has none of its own. Raises BackboneError if a file or the package
    to read it is missing, or if the file does not fit the network; so does the callable if the model fails, or gives no
    row per image.
    """
    model_file.check_files()
    return {"torch": TorchModel, "onnx": OnnxModel, "mxnet": MxnetModel}[model_file.kind](
        model_file, device, model_file.preprocessing or default
    )


class AsBackbone(torch.nn.Module):
    """A callable of `load_model` in the place of a backbone: images float32 [B, 3, 112, 112] in [-1, 1], as the loader
    gives them, -> embeddings [B, num_features] on the CPU."""

    def __init__(self, model):
        super().__init__()
        self.model, self.num_features = model, model.num_features

    def forward(self, images):
        pixels = images.mul(127.5).add(127.5).round().to(torch.uint8)  # exactly those that were decoded
        return torch.from_numpy(self.model(pixels.permute(0, 2, 3, 1)))


class TorchModel:
    def __init__(self, model_file, device, preprocessing):
        self.preprocessing = preprocessing
        self.device = device or default_device()
        self.model = load_backbone(model_file.file, model_file.found_network, self.device)
        self.num_features = self.model.num_features

    @torch.inference_mode()
    def __call__(self, images):
        images = torch.as_tensor(images).to(self.device, non_blocking=True)
        return self.model(self.preprocessing.apply(images)).float().cpu().numpy()


@contextlib.contextmanager
def _feeding(model_file, expected):
    """Turn a runtime's own exceptions, which have no common base class, into an BackboneError."""
    try:
        yield
    except Exception as error:
        raise BackboneError(
            f"{model_file.file}: expects input {expected}; export it for float32 [B,3,112,112]: {_last_line(error)}"
        ) from error


def _last_line(error):
    """The last line of an error message, without the stack that MXNet puts before it."""
    return next((line.strip() for line in reversed(str(error).splitlines()) if line.strip()), type(error).__name__)


def _rows(model_file, output, count):
    """A model's output as float32 [count, D]; BackboneError unless it has a row for each of `count` images."""
    if output.ndim != 2 or len(output) != count:
        raise BackboneError(
            f"{model_file.file}: output {list(output.shape)} for {count} image(s); export it with embeddings [B, size] "
            "as output"
        )
    return output.astype(np.float32)


_BLACK = np.zeros((2, 112, 112, 3), np.uint8)  # two images, to try a model with


class OnnxModel:
    """An ONNX graph with one image input and the embedding as first output, fed like a state dict's backbone.

    Graphs of a fixed batch size are run in it: stated in the input's shape or, where that says "any" but the graph was
    traced with one image and keeps to it, found by trying two.
    """

    def __init__(self, model_file, device, preprocessing):
        self.model_file, self.preprocessing = model_file, preprocessing
        try:
            import onnxruntime
        except ImportError:
            raise BackboneError(f"{model_file.file}: .onnx models need onnxruntime: pip install onnxruntime") from None
        options = onnxruntime.SessionOptions()
        options.log_severity_level = 4  # it prints its errors as well as raising them
        try:
            self.session = onnxruntime.InferenceSession(
                model_file.file, options, providers=onnxruntime.get_available_providers()
            )
        except Exception as error:  # onnxruntime's exceptions have no public base class
            raise BackboneError(f"{model_file.file}: onnxruntime cannot load it: {error}") from error
        self.input = self.session.get_inputs()[0]
        self.output = self.session.get_outputs()[0].name
        batch = self.input.shape[0] if self.input.shape else None
        self.batch = batch if isinstance(batch, int) and batch > 0 else None
        self.num_features = self(_BLACK[:1]).shape[1]
        if self.batch is None:
            try:
                two = self(_BLACK).shape
            except BackboneError:
                two = None
            if two != (2, self.num_features):
                print(f"note: {model_file.file}: was traced with one image, so images run one by one", file=sys.stderr)
                self.batch = 1

    def __call__(self, images):
        images = self.preprocessing.apply(torch.as_tensor(images).cpu()).numpy()
        step = self.batch or len(images)
        parts = []
        for start in range(0, len(images), step):
            part = images[start : start + step]
            filled = np.concatenate([part, np.zeros((step - len(part), *part.shape[1:]), np.float32)])
            with _feeding(self.model_file, f"{self.input.name!r} {self.input.type} {self.input.shape}"):
                output = self.session.run([self.output], {self.input.name: filled})[0]
            parts.append(_rows(self.model_file, output, step)[: len(part)])
        return np.concatenate(parts)


class MxnetModel:
    """An MXNet checkpoint `prefix,epoch`; the embedding is `fc1_output`, as in insightface's, or the last output.

    Insightface's checkpoints scale their input themselves (the graph begins by subtracting and multiplying a scalar)
    and get raw pixels, whatever mean and std; other graphs are fed like a state dict's backbone.
    """

    def __init__(self, model_file, device, preprocessing):
        self.model_file, self.preprocessing = model_file, preprocessing
        self.mx = _import_mxnet(model_file)
        prefix, epoch = model_file.file.rsplit(",", 1)
        try:
            symbol, arguments, auxiliary = self.mx.model.load_checkpoint(prefix, int(epoch))
        except Exception as error:  # MXNet raises bare Exceptions
            raise BackboneError(f"{model_file.file}: MXNet cannot load it: {error}") from error
        inner = symbol.get_internals()
        symbol = inner["fc1_output"] if "fc1_output" in inner.list_outputs() else symbol
        self.scales_itself = "_minus_scalar" in symbol.tojson()
        context = self.mx.gpu() if self.mx.context.num_gpus() else self.mx.cpu()
        inputs = [name for name in symbol.list_arguments() if name not in arguments]
        if inputs != ["data"]:
            raise BackboneError(
                f"{model_file.file}: expects input {inputs}; export it for float32 [B,3,112,112] as 'data' alone"
            )
        with self._feeding():
            self.module = self.mx.mod.Module(symbol, data_names=["data"], label_names=None, context=context)
            self.module.bind(data_shapes=[("data", (1, 3, 112, 112))], for_training=False)
            self.module.set_params(arguments, auxiliary, allow_extra=True)
        self.num_features = self(_BLACK[:1]).shape[1]

    def __call__(self, images):
        raw = dataclasses.replace(self.preprocessing, mean=0.0, std=1.0)
        data = (raw if self.scales_itself else self.preprocessing).apply(torch.as_tensor(images).cpu())
        with self._feeding():
            self.module.forward(self.mx.io.DataBatch([self.mx.nd.array(data.numpy())]), is_train=False)
            output = self.module.get_outputs()[0].asnumpy()
        return _rows(self.model_file, output, len(images))

    def _feeding(self):
        return _feeding(self.model_file, "of another size")  # the graph has none; mismatched parameters reveal it


def _import_mxnet(model_file):
    if "bool" not in vars(np):
        np.bool = bool  # MXNet 1.9.1, the last release, uses this name on import; NumPy 1.24 dropped it
    try:
        import mxnet
    except Exception as error:  # not only ImportError: NumPy and shared-library errors of any type
        raise BackboneError(
            f"{model_file.file}: install mxnet 1.9.1 (Linux x86-64, Python < 3.12, numpy < 2) to read MXNet "
            f"checkpoints; importing it failed: {error}"
        ) from None
    return mxnet


@functools.cache
def _warn_once(line):
    print(f"warning: {line}", file=sys.stderr)
