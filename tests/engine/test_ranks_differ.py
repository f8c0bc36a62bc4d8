"""Runs whose ranks were given different values or files: all end in one line before the first step, none waits."""

import pathlib
import shutil

import pytest

from BCT_methods.AdvBCT.train import AdvBCT
from core import files
from core.config import load_config
from core.distributed import rank
from core.errors import UserError
from tests.BCT_methods.whole_runs import write_config, write_old_features
from tests.conftest import draw_record_set
from tests.engine.test_trainer import Plain, config
from tests.ranks import run_ranks

LABELS = [0, 1, 2, 3, 4] * 5


def line_of(kind, paths, overrides):
    """What the Trainer `kind` says on this rank, with its own config and overrides."""
    files.SECONDS_TO_APPEAR = 0
    try:
        kind(load_config(paths[rank()], overrides if rank() == 1 else ())).train()
    except (UserError, OSError) as error:
        return str(error)


@pytest.fixture
def places(tmp_path):
    """The configs of two machines with a copy of the training set each; the output is shared."""
    paths = []
    for name in ("one", "other"):
        folder = tmp_path / name
        folder.mkdir()
        draw_record_set(folder / "set.rec", LABELS)
        paths.append(config(folder, folder / "set.rec", output=str(tmp_path / "run")))
    return paths


@pytest.mark.parametrize(
    "key, value",
    [("batch_size", 1000), ("checkpoint_steps", 7), ("resume", True), ("gradient_acc", 99), ("num_classes", 6)],
)
def test_a_value_on_one_machine_alone_is_named(places, key, value):
    """Also where it is one that this rank alone would refuse, or that changes which collectives it takes part in."""
    first, second = run_ranks(line_of, 2, Plain, places, [f"--{key}", str(value)])
    assert first == second and f" has {key} = {value}, rank 0 on " in first


def cut(rec):
    rec.write_bytes(rec.read_bytes()[: rec.stat().st_size // 2])


def lose_index(rec):
    rec.with_suffix(".idx").unlink()


def redraw(rec):
    draw_record_set(rec, LABELS, seed=1)


def shorten(rec):
    draw_record_set(rec, LABELS[:-5])


@pytest.mark.parametrize(
    "change, told",
    [(cut, "set.rec"), (lose_index, "set.idx: no such file"), (redraw, "has records = "), (shorten, "has records = ")],
)
@pytest.mark.parametrize("changed", [0, 1])
def test_a_record_file_of_one_machine_alone_is_named(places, change, told, changed):
    change(places[changed].parent / "set.rec")
    lines = run_ranks(line_of, 2, Plain, places, ())
    assert all(told in line for line in lines)
    assert lines[0] == lines[1] or lines[1 - changed].endswith(lines[changed])


def test_boundaries_are_not_computed_for_a_disk_that_is_not_shared(tmp_path):
    configs = []
    for name in ("one", "other"):
        (tmp_path / name).mkdir()
        draw_record_set(tmp_path / name / "set.rec", LABELS)
        write_old_features(tmp_path / name, LABELS)
        configs.append(write_config(tmp_path / name, "AdvBCT", "run", output=str(tmp_path / "run"), batch_size=5))
    lines = run_ranks(line_of, 2, AdvBCT, configs, ())
    told = (
        "not shared, ranks 1 do not see rank 0's files; set center_radius to a file on a disk that all machines share"
    )
    assert [line.partition(": ")[2] for line in lines] == [told, told]
    assert not list(tmp_path.rglob("*radius*")) and not (tmp_path / "run").exists()

    shared = str(tmp_path / "boundaries.npz")
    assert run_ranks(line_of, 2, AdvBCT, configs_with(configs, center_radius=shared), ()) == [None, None]
    for path in configs:
        shutil.copy(shared, path.parents[2] / "old_center_radius.npz")
        shutil.copy(f"{shared}.json", path.parents[2] / "old_center_radius.npz.json")
    assert run_ranks(line_of, 2, AdvBCT, configs_with(configs, center_radius="", overwrite=True), ()) == [None, None], (
        "complete on each machine: copies will do"
    )
    (configs[1].parents[2] / "old_center_radius.npz").unlink()
    lines = run_ranks(line_of, 2, AdvBCT, configs, ())
    assert lines[0] == lines[1] and " has center_radius = None, rank 0 on " in lines[0]


def configs_with(paths, **keys):
    for path in paths:
        added = "".join(f"config.{key} = {value!r}\n" for key, value in keys.items())
        path.write_text(pathlib.Path(path).read_text() + added)
    return paths
