"""Model files of all kinds; packages that are not installed are simulated or skipped."""

import pathlib
import subprocess
import sys
import types

import numpy as np
import pytest
import torch

from backbones import BackboneError
from backbones import model_files as models
from backbones.model_files import ModelFile, Preprocessing
from core.files import atomic_write
from core.manifest import digest, write_manifest
from tools.ijbc_eval import compat_report

ROOT = pathlib.Path(__file__).resolve().parents[3]


def load_model(model_file, device=None, scale=128.0):
    return models.load_model(model_file, device, Preprocessing(std=scale))


@pytest.mark.parametrize(
    ("file", "name", "kind"),
    [
        ("work_dirs/f512_r18/model.pt", "f512_r18", "torch"),
        ("nets/r50.pth", "r50", "torch"),
        ("nets/r50.safetensors", "r50", "torch"),
        ("nets/w600k_r50.onnx", "w600k_r50", "onnx"),
        ("models/r100-arcface/model,12", "r100-arcface", "mxnet"),
        ("nets/resnet.v2,0", "resnet.v2", "mxnet"),
    ],
)
def test_names_and_kinds(file, name, kind):
    assert (ModelFile(file).name, ModelFile(file).kind) == (name, kind)


def test_mxnet_file_names():
    assert [path.name for path in ModelFile("a/model,12").paths] == ["model-symbol.json", "model-0012.params"]


@pytest.mark.parametrize("file", ["model.txt", "model", "model,x", "model,²"])
def test_unknown_kinds(file):
    with pytest.raises(BackboneError, match="unknown kind"):
        load_model(ModelFile(file))


def test_a_directory_and_a_network_beside_a_graph_are_refused(tmp_path):
    with pytest.raises(BackboneError, match=f"{tmp_path}: is a directory; name the file in it, such as .*/model.pt"):
        load_model(ModelFile(str(tmp_path)))
    (tmp_path / "x.onnx").touch()
    with pytest.raises(BackboneError, match="x.onnx: has its own network; leave out r50"):
        load_model(ModelFile(str(tmp_path / "x.onnx"), "r50"))
    _, model = compat_report.parse_model(f"a={tmp_path}/x.onnx", "r50")  # --new_net is for the others
    assert model.network is None


def test_state_dict_input_and_output(shared_models, shared_plain):
    model = load_model(ModelFile(str(shared_models["new_model"]), "tiny"), "cpu")
    images = np.random.default_rng(0).integers(0, 256, (3, 112, 112, 3)).astype(np.uint8)
    found = model(torch.from_numpy(images))
    assert found.dtype == np.float32 and found.shape == (3, model.num_features) == (3, 16)
    np.testing.assert_allclose(found, [shared_plain["new_model"].embed(image) for image in images], atol=1e-5)


def test_the_network_of_a_state_dict_is_found_by_its_keys(shared_models, tmp_path, capsys):
    file = str(shared_models["new_model"])
    told, named = ModelFile(file), ModelFile(file, "tiny")
    assert told.found_network == told.found_network == "tiny"
    assert capsys.readouterr().out.count("network tiny") == 1
    images = torch.randint(0, 256, (2, 112, 112, 3), dtype=torch.uint8)
    np.testing.assert_array_equal(load_model(told)(images), load_model(named)(images))
    assert ModelFile("a.onnx").found_network is None
    with pytest.raises(BackboneError, match=r"absent\.pt: no such model file; check the path"):
        _ = ModelFile(str(tmp_path / "absent.pt")).found_network


@pytest.mark.parametrize("scale", [127.5, 255.0])
def test_input_scale(shared_models, shared_plain, fake_onnx, scale):
    images = np.random.default_rng(0).integers(0, 256, (3, 112, 112, 3)).astype(np.uint8)
    scaled = ((images.astype(np.float64) - 127.5) / scale).transpose(0, 3, 1, 2)
    found = load_model(ModelFile(str(shared_models["new_model"]), "tiny"), "cpu", scale)(torch.from_numpy(images))
    with torch.no_grad():
        expected = shared_plain["new_model"].model(torch.from_numpy(scaled).float())
    np.testing.assert_allclose(found, expected, atol=1e-5)
    found = load_model(ModelFile(fake_onnx), "cpu", scale)(torch.from_numpy(images))
    np.testing.assert_allclose(found, scaled.mean(axis=(2, 3)), atol=1e-5)


def test_absent_onnxruntime_is_one_line(tmp_path, monkeypatch):
    (tmp_path / "a.onnx").write_bytes(b"x")
    monkeypatch.setitem(sys.modules, "onnxruntime", None)
    with pytest.raises(BackboneError, match="pip install onnxruntime"):
        load_model(ModelFile(str(tmp_path / "a.onnx")))


def test_absent_mxnet_is_one_line(tmp_path, monkeypatch):
    for name in ("a-symbol.json", "a-0003.params"):
        (tmp_path / name).write_bytes(b"x")
    monkeypatch.setitem(vars(np), "bool", bool)  # what the import puts there is gone after the test
    monkeypatch.setitem(sys.modules, "mxnet", None)
    with pytest.raises(BackboneError, match="mxnet 1.9.1"):
        load_model(ModelFile(str(tmp_path / "a,3")))


class FakeSession:
    """Stands for onnxruntime.InferenceSession: the mean over height and width, and a batch size that must be kept."""

    batch, size, output = "N", (112, 112), (2, 3)  # of the output: the axes that the mean goes over
    traced = None  # with one image: what becomes of more

    def __init__(self, file, options, providers):
        assert providers == ["CPUExecutionProvider"] and options.log_severity_level == 4

    def get_inputs(self):
        return [types.SimpleNamespace(name="input.1", type="tensor(float)", shape=[self.batch, 3, *self.size])]

    def get_outputs(self):
        return [type("Output", (), {"name": "683"})]

    def run(self, names, feed):
        [(name, images)] = feed.items()
        assert (names, name, images.dtype) == (["683"], "input.1", np.float32)
        if images.shape[2:] != self.size:
            raise RuntimeError("Got invalid dimensions for input: input.1")
        if isinstance(self.batch, int):
            assert len(images) == self.batch
        if self.traced and len(images) > 1:
            return [self.traced(images.mean(axis=self.output))]
        return [images.mean(axis=self.output)]


@pytest.fixture
def fake_onnx(tmp_path, monkeypatch):
    """The path of a model that the simulated onnxruntime loads."""
    module = types.SimpleNamespace(
        InferenceSession=FakeSession,
        SessionOptions=types.SimpleNamespace,
        get_available_providers=lambda: ["CPUExecutionProvider"],
    )
    monkeypatch.setitem(sys.modules, "onnxruntime", module)
    (tmp_path / "a.onnx").write_bytes(b"x")
    return str(tmp_path / "a.onnx")


def test_onnx_of_another_input_or_output(fake_onnx, monkeypatch):
    monkeypatch.setattr(FakeSession, "size", (224, 224))
    with pytest.raises(BackboneError) as caught:
        load_model(ModelFile(fake_onnx))
    message = str(caught.value)
    assert message.startswith(f"{fake_onnx}: expects input 'input.1' tensor(float) ['N', 3, 224, 224]; export")
    assert "float32 [B,3,112,112]" in message and "invalid dimensions" in message
    monkeypatch.setattr(FakeSession, "size", (112, 112))
    monkeypatch.setattr(FakeSession, "output", 3)
    with pytest.raises(BackboneError, match=r"a\.onnx: output \[1, 3, 112\]"):
        load_model(ModelFile(fake_onnx))


@pytest.mark.parametrize("batch", ["N", None, 1, 4])
def test_onnx_input_and_batches(fake_onnx, monkeypatch, batch):
    monkeypatch.setattr(FakeSession, "batch", batch)
    model = load_model(ModelFile(fake_onnx))
    assert model.num_features == 3
    images = np.random.default_rng(0).integers(0, 256, (6, 112, 112, 3)).astype(np.uint8)
    expected = ((images.astype(np.float64) - 127.5) / 128).mean(axis=(1, 2))
    np.testing.assert_allclose(model(torch.from_numpy(images)), expected, atol=1e-5)


def _fail(rows):
    raise RuntimeError("Non-zero status code returned while running Reshape node")


@pytest.mark.parametrize(
    "traced", [_fail, lambda rows: rows[:1], lambda rows: rows.reshape(1, -1), lambda rows: rows[0]]
)
def test_onnx_traced_with_one_image_runs_one_by_one(fake_onnx, monkeypatch, capsys, traced):
    monkeypatch.setattr(FakeSession, "traced", staticmethod(traced))
    images = np.random.default_rng(0).integers(0, 256, (3, 112, 112, 3)).astype(np.uint8)
    expected = ((images.astype(np.float64) - 127.5) / 128).mean(axis=(1, 2))
    np.testing.assert_allclose(load_model(ModelFile(fake_onnx))(torch.from_numpy(images)), expected, atol=1e-5)
    assert capsys.readouterr().err == f"note: {fake_onnx}: was traced with one image, so images run one by one\n"


def test_onnx_that_fails_later_is_one_line(fake_onnx, monkeypatch):
    model = load_model(ModelFile(fake_onnx))
    for traced, message in (
        (_fail, "expects input .* Non-zero status"),
        (lambda rows: rows[:1], r"output \[1, 3\] for 5"),
    ):
        monkeypatch.setattr(FakeSession, "traced", staticmethod(traced))
        with pytest.raises(BackboneError, match=rf"a\.onnx: {message}"):
            model(torch.zeros((5, 112, 112, 3), dtype=torch.uint8))


def save_mean(path, batch, *nodes):
    """An ONNX graph: the mean over height and width, through further nodes from "m" to "y"."""
    onnx = pytest.importorskip("onnx")
    helper, kind = onnx.helper, onnx.TensorProto.FLOAT
    graph = helper.make_graph(
        [helper.make_node("ReduceMean", ["x"], ["m"], axes=[2, 3], keepdims=0), *nodes],
        "mean",
        [helper.make_tensor_value_info("x", kind, [batch, 3, 112, 112])],
        [helper.make_tensor_value_info("y", kind, ["N", "D"])],
        [helper.make_tensor("one_row", onnx.TensorProto.INT64, [2], [1, 3])],
    )
    onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 13)], ir_version=8), path)


@pytest.mark.parametrize(("batch", "node"), [("N", "Identity"), ("N", "Reshape"), (1, "Reshape"), (4, "Identity")])
def test_onnx_for_real(tmp_path, batch, node):
    onnx, _ = pytest.importorskip("onnx"), pytest.importorskip("onnxruntime")
    inputs = ["m", "one_row"] if node == "Reshape" else ["m"]  # as a graph traced with one image has it
    save_mean(tmp_path / "a.onnx", batch, onnx.helper.make_node(node, inputs, ["y"]))
    images = np.random.default_rng(0).integers(0, 256, (5, 112, 112, 3)).astype(np.uint8)
    expected = ((images.astype(np.float64) - 127.5) / 128).mean(axis=(1, 2))
    np.testing.assert_allclose(load_model(ModelFile(str(tmp_path / "a.onnx")))(images), expected, atol=1e-5)
    (tmp_path / "b.onnx").write_bytes(b"torn")
    with pytest.raises(BackboneError, match=r"b\.onnx: onnxruntime cannot load it"):
        load_model(ModelFile(str(tmp_path / "b.onnx")))


# In a process of its own: MXNet needs a name put back into NumPy, and brings its own OpenMP.
MXNET_CHECK = """
import sys
import numpy as np, torch
from backbones import BackboneError
from backbones import model_files as models

prefix, scales_itself = sys.argv[1], sys.argv[2] == "True"
try:
    mx = models._import_mxnet(models.ModelFile("a,0"))
except BackboneError as error:
    print("skip:", error)
    raise SystemExit
data = mx.sym.Variable("data")
scaled = (data - 127.5) * 0.0078125 if scales_itself else data
pooled = mx.sym.Flatten(mx.sym.Pooling(scaled, global_pool=True, pool_type="avg", kernel=(1, 1)))
weight = np.random.default_rng(0).normal(size=(7, 3)).astype(np.float32)
embedding = mx.sym.FullyConnected(pooled, num_hidden=7, no_bias=True, name="fc1")
head = mx.sym.FullyConnected(embedding, num_hidden=2, no_bias=True, name="head")  # as checkpoints of training have
arrays = {"fc1_weight": mx.nd.array(weight), "head_weight": mx.nd.zeros((2, 7))}
mx.model.save_checkpoint(prefix, 3, head, arrays, {})
model = models.load_model(models.ModelFile(prefix + ",3"), None, models.Preprocessing(std=128.0))
assert model.num_features == 7
images = np.random.default_rng(1).integers(0, 256, (4, 112, 112, 3)).astype(np.uint8)
expected = ((images.astype(np.float64) - 127.5) / 128).mean(axis=(1, 2)) @ weight.T
np.testing.assert_allclose(model(torch.from_numpy(images)), expected, atol=1e-4)
flat = mx.sym.FullyConnected(mx.sym.Flatten(data), num_hidden=7, no_bias=True, name="fc1")
other = mx.sym.FullyConnected(mx.sym.Variable("image"), num_hidden=7, name="fc1")
for expected, net in (("of another size", flat), ("['image']", other)):
    arrays = {"fc1_weight": mx.nd.zeros((7, 3 * 9 * 9)), "fc1_bias": mx.nd.zeros(7)}
    mx.model.save_checkpoint(prefix, 4, net, arrays, {})
    try:
        models.load_model(models.ModelFile(prefix + ",4"))
    except BackboneError as error:
        assert f"expects input {expected}; export it for float32 [B,3,112,112]" in str(error), error
        assert len(str(error).splitlines()) == 1
    else:
        raise AssertionError("fed with images of the wrong size")
open(prefix + "-0003.params", "wb").write(b"torn")
try:
    models.load_model(models.ModelFile(prefix + ",3"))
except BackboneError as error:
    assert "MXNet cannot load it" in str(error)
    print("done")
"""


@pytest.mark.parametrize("scales_itself", [True, False])
def test_mxnet_for_real(tmp_path, scales_itself):
    command = [sys.executable, "-c", MXNET_CHECK, str(tmp_path / "net"), str(scales_itself)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    if done.stdout.startswith("skip:"):
        pytest.skip(done.stdout)
    assert done.stdout.endswith("done\n")


def test_manifests_tell_of_an_unfinished_run_and_of_another_old_model(tmp_path, capsys):
    models = {}
    for name in ("old", "other", "new"):
        path = tmp_path / name / "model.pt"
        path.parent.mkdir()
        with atomic_write(path) as file:
            file.write(name.encode())
            if name == "new":
                trained_against = digest(tmp_path / "old" / "model.pt")
                write_manifest(path, file, "backbone", old_model=trained_against, finished=False, step=7)
        models[name] = ModelFile(str(path), "tiny")
        models[name].check_files()
    assert f"warning: {models['new'].file}: of an unfinished run, after step 7" in capsys.readouterr().err
    models["new"].warn_of_another_old_model(models["old"])
    models["new"].warn_of_another_old_model(models["new"])  # a self-test
    models["old"].warn_of_another_old_model(models["new"])  # without a manifest nothing is known
    assert capsys.readouterr().err == ""
    models["new"].warn_of_another_old_model(models["other"])
    said = capsys.readouterr().err
    assert f"warning: {models['new'].file}: trained against another old model than {models['other'].file}, " in said
    assert said.count("\n") == 1 and "give that old model with -m_old or --old" in said
