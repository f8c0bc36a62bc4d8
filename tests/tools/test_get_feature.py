"""get_feature, get_avg_feature and denoise_credible as commands, on small record files."""

import os
import pathlib
import socket
import sys

import numpy as np
import pytest
import torch

import backbones
from core import files as core_files
from core.distributed import rank
from core.errors import UserError
from core.files import atomic_write
from core.manifest import write_manifest
from dataset import RecordDataset
from old_model.feature_set import FeatureSet
from tests.ranks import run_ranks, run_session
from tests.tools.test_credible_and_means import class_means_slowly
from tools.get_feature import cli, denoise_credible, get_avg_feature, get_feature

REPO = pathlib.Path(__file__).resolve().parents[2]


@pytest.fixture
def place(tmp_path, make_record_set):
    """A workspace with a trained tiny model and three record files. Returns its config's path."""
    data = tmp_path / "data"
    data.mkdir()
    make_record_set(data / "train_part_30_class.rec", [0, 0, 1])
    make_record_set(data / "train_part_70_class.rec", [0, 1, 1, 2, 0, 2, 2])
    make_record_set(data / "train.rec", [0, 0, 1, 2, 3, 3, 4, 2, 4, 4])
    config = tmp_path / "old_tiny_arc_class30.py"
    config.write_text(f"""
from easydict import EasyDict
config = EasyDict()
config.workspace = {str(tmp_path)!r}
config.network = "tiny"
config.embedding_size = 8
config.batch_size = 3
config.num_workers = 0
config.rec = "data/train_part_30_class.rec"
""")
    torch.manual_seed(0)
    (tmp_path / "work_dirs" / "old_tiny_arc_class30").mkdir(parents=True)
    # The head that softmax training adds stays out of the features.
    model = backbones.get_model("tiny", num_features=8, num_classes=2)
    torch.save(model.state_dict(), tmp_path / "work_dirs" / "old_tiny_arc_class30" / "model.pt")
    return config


def model_features(place, rec):
    model = backbones.load_backbone(place.parent / "work_dirs" / place.stem / "model.pt", "tiny")
    dataset = RecordDataset(place.parent / "data" / rec)
    with torch.no_grad():
        images = [(dataset[row][0].permute(2, 0, 1)[None] / 255 - 0.5) / 0.5 for row in range(len(dataset))]
        return np.concatenate([model(image).numpy() for image in images]), dataset.labels()


@pytest.mark.parametrize(
    "part, rec",
    [("class30", "train_part_30_class.rec"), ("class70", "train_part_70_class.rec"), ("class100", "train.rec")],
)
def test_get_feature_embeds_the_set_of_the_name(place, part, rec):
    name = f"old_tiny_arc_{part}"
    get_feature.main([str(place), "--SD", name])
    files = FeatureSet(name, place.parent / "feature_save")
    features, labels = model_features(place, rec)
    np.testing.assert_allclose(np.load(files.feature), features, atol=1e-5)
    np.testing.assert_array_equal(np.load(files.label), labels)


def test_the_three_tools_in_a_row(place, capsys):
    files = FeatureSet("old_tiny_arc_class70", place.parent / "feature_save")
    get_avg_feature.main([str(place), "--SD", files.name])  # extracts first
    written = files.feature.stat().st_mtime_ns
    features, labels = np.load(files.feature), np.load(files.label)
    np.testing.assert_allclose(np.load(files.avg_feature), class_means_slowly(features, labels), atol=1e-6)

    files.avg_feature.unlink()
    get_avg_feature.main(["--SD", files.name, "--feature_save", str(files.root)])  # from the files alone
    assert np.load(files.avg_feature).shape == (3, 8)
    denoise_credible.main(["--T", "0.5", "--SD", files.name, "--feature_save", str(files.root)])
    credible = np.load(files.credible(0.5))
    assert credible.dtype == bool and files.credible(0.5).name == "old_tiny_arc_class70_credible_ratio_50_feature.npy"
    np.testing.assert_array_equal(np.bincount(labels, credible), [1, 1, 2])
    assert "warning" not in capsys.readouterr().out
    denoise_credible.main([str(place), "--SD", files.name])
    assert np.load(files.credible(0.9)).all()
    assert "no row is left out: --T 0.9 of a class's images, rounded up, is all" in capsys.readouterr().out
    assert files.feature.stat().st_mtime_ns == written


def test_features_are_made_again_when_the_model_has_changed(place, capsys):
    arguments = [str(place), "--SD", "old_tiny_arc_class70"]
    files = FeatureSet("old_tiny_arc_class70", place.parent / "feature_save")
    model = place.parent / "work_dirs" / place.stem / "model.pt"
    get_feature.main(arguments)
    before, written = np.load(files.feature), files.feature.stat().st_mtime_ns

    get_feature.main(arguments)
    assert "kept, it is of" in capsys.readouterr().out and files.feature.stat().st_mtime_ns == written
    get_feature.main([*arguments, "--force"])
    assert files.feature.stat().st_mtime_ns > written
    np.testing.assert_array_equal(np.load(files.feature), before)

    torch.manual_seed(1)
    torch.save(backbones.get_model("tiny", num_features=8).state_dict(), model)
    os.utime(model, (1, 1))  # older by its time, as `cp -p` may leave it
    get_avg_feature.main(arguments)
    assert np.abs(np.load(files.feature) - before).max() > 0.01


def test_command_line_overrides_and_an_old_launchers_argument(place, tmp_path):
    files = FeatureSet("old_tiny_arc_class70", tmp_path / "other")
    get_feature.main(
        ["--local_rank=0", str(place), "--SD", files.name, "--batch_size", "5", "--feature_save", str(files.root)]
    )
    features, _ = model_features(place, "train_part_70_class.rec")
    np.testing.assert_allclose(np.load(files.feature), features, atol=1e-5)


def refused(capsys, function, *arguments):
    with pytest.raises(SystemExit) as stop:
        function.main([str(argument) for argument in arguments])
    assert stop.value.code not in (0, None)
    return capsys.readouterr().err


def test_what_get_feature_refuses(place, capsys):
    config = place.read_text()
    assert "--SD old_tiny_arc_class70" in refused(capsys, get_feature, place, "--SD", "f512_r18_arc_class70")
    assert "--SD old_tiny_arc_class70" in refused(capsys, get_feature, place, "--SD", "old_tiny_arc_data70")
    error = refused(capsys, get_feature, place, "--SD", "old_tiny_arc")
    assert "names none of the sets class30, class70" in error and "--rec FILE or --scenario NAME" in error
    assert "batch_size" in refused(capsys, get_feature, place, "--SD", "old_tiny_arc_class70", "--batchsize", "5")
    assert "give it first" in refused(capsys, denoise_credible, "--SD", "old_tiny_arc_class70", "--batch_size=5")

    place.write_text(config.replace("embedding_size = 8", "embedding_size = 16"))
    error = refused(capsys, get_feature, place, "--SD", "old_tiny_arc_class70")
    assert "gives 8 features, but embedding_size is 16" in error
    place.write_text(config)
    (place.parent / "data" / "train_part_70_class.rec").unlink()
    assert "split_dataset_ms1mv3.py --root" in refused(capsys, get_feature, place, "--SD", "old_tiny_arc_class70")
    (place.parent / "work_dirs" / place.stem / "model.pt").unlink()
    error = refused(capsys, get_feature, place, "--SD", "old_tiny_arc_class100")
    assert f"train_old_arc.py {place} --workspace {place.parent}" in error
    (place.parent / "data" / "train.rec").unlink()
    error = refused(capsys, get_feature, place, "--SD", "old_tiny_arc_class100")
    assert "train.rec: no such file; put MS1M-V3's" in error and "split" not in error
    assert not (place.parent / "feature_save").exists()


def test_the_record_file_is_that_of_the_name_or_of_rec_never_another(place, capsys):
    data, words = place.parent / "data", [place, "--SD", "old_tiny_arc_class70"]
    error = refused(capsys, get_feature, *words, "--rec", data / "train.rec")
    assert "class70: names train_part_70_class.rec, --rec" in error and "feature_save/own/" in error
    for rec in (data, data / "train_part_70_class.rec"):
        get_feature.main([str(word) for word in (*words, "--rec", rec)])
    assert f"wrote {place.parent}/feature_save/OPclass/old_tiny_arc_class70_feature.npy, of {data}" in (
        capsys.readouterr().out
    )
    error = refused(capsys, get_feature, *words, "--rec", place.parent / "absent", "-f")
    assert "absent/train_part_70_class.rec: no such file" in error and error.strip().endswith("/absent")
    outside = ("--model", "m.pt", "--SD", "prod_class100", "--rec", place.parent / "absent")
    assert "elsewhere, give --rec FILE or its directory" in refused(capsys, get_feature, *outside)


def test_a_name_that_may_be_a_typo_is_noted(place, capsys):
    for name, noted in (("old_tinny_arc_class70", True), ("old_tiny_arc_class70", False)):
        get_feature.main([str(place), "--SD", name])
        assert ("note: --SD old_tinny_arc_class70 names old_tinny_arc, but" in capsys.readouterr().out) == noted


def test_the_model_of_an_unfinished_run_is_taken_only_on_request(place, capsys):
    model, words = place.parent / "work_dirs" / place.stem / "model.pt", [place, "--SD", "old_tiny_arc_class70"]
    state = torch.load(model, weights_only=True)
    for finished in (False, True):
        with atomic_write(model) as file:
            torch.save(state, file)
            write_manifest(model, file, "backbone", step=12, finished=finished)
        if not finished:
            error = refused(capsys, get_feature, *words)
            assert "model.pt: of an unfinished run, after step 12; finish it with --resume True" in error
            get_feature.main([*map(str, words), "--unfinished", "True"])
    get_feature.main([*map(str, words), "-f"])


def extract_on_rank(place, disks):
    """Write features, rank r to the directory disks[r]; the error's text."""
    core_files.SECONDS_TO_APPEAR = 0
    words = [str(place), "--SD", "old_tiny_arc_class70", "--feature_save", str(disks[rank()])]
    args, cfg, files = cli.parse(cli.make_parser(""), words)
    try:
        cli.extract(cfg, files, args)
    except (UserError, OSError) as error:
        return str(error)


def test_two_machines_must_share_the_disk_that_they_write_to(place, tmp_path):
    disks = [tmp_path / "mine", tmp_path / "others"]
    lines = run_ranks(extract_on_rank, 2, place, disks)
    told = "not shared, ranks 1 do not see rank 0's files; set --feature_save to a directory on a disk that all "
    assert [line.partition(": ")[2] for line in lines] == [f"{told}machines share"] * 2
    left = [path.name for disk in disks for path in disk.rglob("*") if path.is_file()]
    assert left == [".old_tiny_arc_class70.lock"]

    disks[1].symlink_to("mine")  # each machine has a path of its own to the same directory
    assert run_ranks(extract_on_rank, 2, place, disks) == [None, None]
    features, _ = model_features(place, "train_part_70_class.rec")
    np.testing.assert_allclose(np.load(FeatureSet("old_tiny_arc_class70", disks[0]).feature), features, atol=1e-5)


def test_a_directory_in_which_rank_0_cannot_write_ends_all_ranks(place, tmp_path):
    (tmp_path / "file").touch()
    lines = run_ranks(extract_on_rank, 2, place, [tmp_path / "file/x"] * 2)
    assert all("Not a directory" in line for line in lines) and "rank 0 on " in lines[1]


def test_what_the_others_refuse(place, capsys):
    for function in (get_avg_feature, denoise_credible):
        error = refused(capsys, function, "--SD", "old_tiny_arc_class70", "--feature_save", place.parent)
        assert "no such file" in error and "get_feature.py" in error and "Traceback" not in error
    get_feature.main([str(place), "--SD", "old_tiny_arc_class70"])
    error = refused(capsys, denoise_credible, place, "--T", "90", "--SD", "old_tiny_arc_class70")
    assert "--T 90" in error


def test_a_config_of_all_data_names_both_kinds(place):
    config = place.with_name("new_tiny_arc_data100.py")
    config.write_text(place.read_text() + 'config.output = "work_dirs/old_tiny_arc_class30"\n')
    for name in ("new_tiny_arc_data100", "new_tiny_arc_class100"):
        get_feature.main([str(config), "--SD", name])
        assert FeatureSet(name, place.parent / "feature_save").feature.is_file()


def test_two_ranks_by_the_launcher_from_another_directory(place):
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command = [
        sys.executable,
        "-m",
        "torch.distributed.launch",
        "--nproc_per_node=2",
        "--nnodes=1",
        f"--master_port={port}",
        str(REPO / "tools" / "get_feature" / "get_avg_feature.py"),
        place.name,
        "--SD",
        "old_tiny_arc_class70",
    ]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    done = run_session(command, cwd=place.parent, env=environment)
    assert done.returncode == 0, done.stderr
    files = FeatureSet("old_tiny_arc_class70", place.parent / "feature_save")
    features, labels = model_features(place, "train_part_70_class.rec")
    np.testing.assert_allclose(np.load(files.feature), features, atol=1e-5)
    np.testing.assert_array_equal(np.load(files.label), labels)
    np.testing.assert_allclose(np.load(files.avg_feature), class_means_slowly(features, labels), atol=1e-5)
    assert done.stdout.count("wrote") == 2  # one rank speaks
