import pathlib

import pytest

from core.config import PATH_KEYS, REPO, ConfigError, expand, load_config
from old_model.feature_set import FeatureSet

CONFIGS = sorted(
    path
    for path in [*REPO.glob("configs/**/*.py"), *REPO.glob("BCT_methods/*/configs/**/*.py")]
    if path.name != "base.py" and path.parent.name != "scenarios"
)


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.stem)
def test_every_config_of_the_repo_loads(path):
    cfg = load_config(path)
    assert cfg.name == path.stem
    assert cfg.output == str(REPO / "work_dirs" / path.stem)
    assert f"f{cfg.embedding_size}" in path.stem.split("_"), "the name tells the embedding size"


def write(directory, text, name="run.py"):
    directory.mkdir(parents=True, exist_ok=True)
    path = directory / name
    path.write_text("from easydict import EasyDict as edict\nconfig = edict()\n" + text)
    return path


def test_later_layers_override_earlier_ones(tmp_path):
    write(tmp_path / "configs", "config.knob = 1\nconfig.lr = 0.5\nconfig.momentum = 0.5\n", "base.py")
    write(tmp_path / "configs" / "small", "config.lr = 0.25\n", "base.py")
    run = write(tmp_path / "configs" / "small", "config.knob = 3\n")
    cfg = load_config(run, ["--momentum", "0.75"])
    assert (cfg.knob, cfg.lr, cfg.momentum, cfg.weight_decay) == (3, 0.25, 0.75, 5e-4)


def test_a_scenario_lies_between_the_bases_and_the_file(tmp_path):
    configs = tmp_path / "configs"
    write(configs, "config.old_embedding = ''\nconfig.lr = 0.5\n", "base.py")
    run = write(configs, "config.scenario = 'OPclass_softmax_f256'\n")
    cfg = load_config(run)
    assert cfg.embedding_size == 256 and cfg.rec.endswith("train_part_70_class.rec")
    assert cfg.old_embedding.endswith("OPclass/f256_r18_softmax_class70_feature.npy")
    assert "old_prototype" not in cfg, "this method has no key for it"
    assert load_config(run, ["--embedding_size", "8"]).embedding_size == 8
    assert load_config(run, ["--scenario", "EXdata_arc_f512"]).embedding_size == 512
    with pytest.raises(ConfigError, match=r"scenario = 'OPclas' is not in configs/scenarios/; .*OPclass_arc_f512"):
        load_config(run, ["--scenario", "OPclas"])


@pytest.mark.parametrize("path", sorted(REPO.glob("configs/scenarios/*.py")), ids=lambda path: path.stem)
def test_scenarios_name_the_files_that_the_tools_write(path):
    cfg = load_config(REPO / "BCT_methods/BCT/configs/base.py", ["--scenario", path.stem])
    name = pathlib.Path(cfg.old_prototype).name.removesuffix("_avg_feature.npy")
    files = FeatureSet(name)
    assert cfg.old_prototype == str(files.avg_feature)
    assert files.scenario in path.stem and f"f{cfg.embedding_size}" in name.split("_")
    rec = pathlib.Path(cfg.rec)
    assert (rec.name if rec.suffix else "train.rec") == files.record


def test_a_sub_directory_of_the_root_applies_to_methods_too(tmp_path):
    write(tmp_path / "configs", "config.knob = 1\n", "base.py")
    run = write(tmp_path / "configs" / "demo", "")
    assert load_config(run).network == load_config(REPO / "configs/demo/f128_tiny_softmax_class30.py").network


def test_unknown_key_names_the_nearest(tmp_path):
    run = write(tmp_path, "config.batchsize = 3\n")
    with pytest.raises(ConfigError, match=r"run\.py: unknown key 'batchsize'; did you mean 'batch_size'"):
        load_config(run)
    with pytest.raises(ConfigError, match="command line: unknown key 'learning_rte'; did you mean 'lr'"):
        load_config(write(tmp_path, ""), ["--learning_rte", "1"])


def test_a_key_of_another_method_is_not_called_a_typo(tmp_path):
    run = write(tmp_path, 'config.old_embedding = "f.npy"\n')
    where = "all keys are in configs/base.py and BCT_methods/BCT/configs/base.py"
    with pytest.raises(ConfigError, match=f"unknown key 'old_embedding'; {where}$"):
        load_config(run, script=REPO / "BCT_methods/BCT/train.py")


@pytest.mark.parametrize(
    "words, key, value",
    [
        (["--lr", "0.02"], "lr", 0.02),
        (["--lr=1"], "lr", 1),
        (["--network", "r18"], "network", "r18"),
        (["--margin_list", "(1, 0, 0.4)"], "margin_list", (1, 0, 0.4)),
        (["--val_targets=['lfw']"], "val_targets", ["lfw"]),
        (["--resume", "True"], "resume", True),
        (["--resume"], "resume", True),
        (["--resume", "--lr", "0.02"], "resume", True),
        (["--num_epoch", "3.0"], "num_epoch", 3),
        (["--val_targets", "lfw"], "val_targets", ["lfw"]),
        (["--val_targets", "lfw,agedb_30"], "val_targets", ["lfw", "agedb_30"]),
        (["--val_targets", "[lfw, agedb_30]"], "val_targets", ["lfw", "agedb_30"]),  # a shell has taken the quotes
        (["--val_targets", "[]"], "val_targets", []),
        (["--decay_epoch", "20,26.5"], "decay_epoch", [20, 26.5]),
        (["--decay_epoch", "20"], "decay_epoch", [20]),
        (["--network", "2024"], "network", "2024"),
    ],
)
def test_overrides(tmp_path, words, key, value):
    cfg = load_config(write(tmp_path, ""), words)
    assert cfg[key] in (value, tuple(value) if isinstance(value, list) else value)


def test_a_key_keeps_the_type_of_its_declaration(tmp_path):
    """Whatever the layers above it gave."""
    write(tmp_path / "configs", "config.knob = 1\nconfig.weight_decay = 0\n", "base.py")
    run = write(tmp_path / "configs", "config.lr = 1\nconfig.margin_scale = 30\n")
    cfg = load_config(run, ["--lr", "0.05", "--warmup_epoch", "2"])
    values = (cfg.lr, cfg.margin_scale, cfg.warmup_epoch, cfg.weight_decay, cfg.knob)
    assert values == (0.05, 30.0, 2.0, 0.0, 1) and list(map(type, values)) == [float] * 4 + [int]
    write(tmp_path / "configs", "config.lr = 'fast'\n", "base.py")
    with pytest.raises(ConfigError, match=r"base\.py: lr = 'fast' is a str; it must be a float"):
        load_config(run)


@pytest.mark.parametrize(
    "words",
    [
        ["--lr", "fast"],
        ["--lr", "[0.1]"],
        ["--resume", "1"],
        ["--num_epoch", "2.5"],
        ["--num_epoch", "True"],
        ["lr"],
        ["--lr"],
        ["--lr", "--resume"],
    ],
)
def test_values_of_the_wrong_type_are_refused(tmp_path, words):
    with pytest.raises(ConfigError, match="command line"):
        load_config(write(tmp_path, ""), words)


def test_the_command_line_overrides_the_environment(tmp_path, monkeypatch):
    monkeypatch.setenv("BCT_OVERRIDES", "--network tiny --margin_list '(1, 0.3, 0)' --lr 0.3")
    cfg = load_config(write(tmp_path, "config.network = 'r18'\n"), ["--lr", "0.2"])
    assert (cfg.network, cfg.margin_list, cfg.lr) == ("tiny", (1, 0.3, 0), 0.2)
    monkeypatch.setenv("BCT_OVERRIDES", "--netwrk tiny")
    with pytest.raises(ConfigError, match="BCT_OVERRIDES: unknown key 'netwrk'"):
        load_config(write(tmp_path, ""))
    monkeypatch.setenv("BCT_OVERRIDES", "--network 'tiny")
    with pytest.raises(ConfigError, match="BCT_OVERRIDES=--network 'tiny: No closing quotation; close the quote"):
        load_config(write(tmp_path, ""))


@pytest.mark.parametrize(
    "words",
    [
        ["--sample_rate", "2"],
        ["--margin_list", "(1.0, 0.5)"],
        ["--gradient_acc", "0"],
        ["--frequent", "0"],
        ["--batch_size", "0"],
        ["--seed", "-1"],
        ["--lr", "0"],
        ["--val_targets", "lfw,30"],
        ["--decay_epoch", "20,last"],
    ],
)
def test_values_out_of_range_are_refused(tmp_path, words):
    key = words[0].removeprefix("--")
    with pytest.raises(ConfigError, match=rf"run\.py: {key} = .*; it must be"):
        load_config(write(tmp_path, ""), words)


def test_paths_are_relative_to_the_workspace(tmp_path):
    cfg = load_config(write(tmp_path, "config.rec = 'data/set'\n"))
    assert (cfg.rec, cfg.output) == (str(REPO / "data/set"), str(REPO / "work_dirs/run"))
    cfg = load_config(write(tmp_path, "config.rec = 'data/set.rec'\n"), ["--workspace", str(tmp_path)])
    assert (cfg.rec, cfg.rec_val) == (str(tmp_path / "data/set.rec"), str(tmp_path / "data"))
    assert load_config(write(tmp_path, "config.rec = 'synthetic'\n")).rec == "synthetic"


def test_home_and_variables_in_paths(tmp_path, monkeypatch):
    """In every path: in configs no shell expands them."""
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    monkeypatch.setenv("DISK", str(tmp_path / "disk"))
    assert (expand("~/a"), expand("${DISK}2/$DISK"), expand("a~/b")) == (
        tmp_path / "home/a",
        tmp_path / f"disk2/{tmp_path}/disk",
        pathlib.Path("a~/b"),
    )
    write(tmp_path / "home/configs", "".join(f"config.{key} = ''\n" for key in PATH_KEYS), "base.py")
    run = write(tmp_path / "home/configs", "".join(f"config.{key} = '$DISK/{key}'\n" for key in PATH_KEYS))
    cfg = load_config("~/configs/run.py", ["--workspace=~/work", "--output=out"])
    assert {key: cfg[key] for key in PATH_KEYS} == {
        **{key: str(tmp_path / "disk" / key) for key in PATH_KEYS},
        "output": str(tmp_path / "home/work/out"),
    }
    assert cfg.config_file == str(run)
    with pytest.raises(ConfigError, match=r"\$SCRATCH/set: \$SCRATCH is not set in the environment"):
        load_config(run, ["--rec", "$SCRATCH/set"])


def test_a_config_anywhere_has_the_keys_of_the_method_that_is_started(tmp_path):
    script = REPO / "BCT_methods/MixBCT/train.py"
    for folder in (tmp_path, tmp_path / "configs" / "demo"):
        run = write(folder, "config.mix_ratio = 0.4\n")
        cfg = load_config(run, (), script)
        assert cfg.mix_ratio == 0.4 and "queue_size" not in cfg
        assert (cfg.num_epoch == 24) == (folder != tmp_path), "configs/demo/base.py holds there, too"
        with pytest.raises(ConfigError, match="unknown key 'mix_ratio'"):
            load_config(run, (), REPO / "train_old_arc.py")
    another = next((REPO / "BCT_methods/NCCL/configs").glob("OP*.py"))
    with pytest.raises(ConfigError, match=f"{another}: a config of NCCL; start it with .*/BCT_methods/NCCL/train.py"):
        load_config(another, (), script)
    assert load_config(another, (), REPO / "train_old_arc.py").queue_size


def test_broken_files_are_named(tmp_path):
    with pytest.raises(ConfigError, match="nothing.py: no such config file"):
        load_config(pathlib.Path("nothing.py"))
    broken = tmp_path / "broken.py"
    broken.write_text("config = 1 +\n")
    with pytest.raises(ConfigError, match="broken.py: SyntaxError"):
        load_config(broken)
    broken.write_text("x = 1\n")
    with pytest.raises(ConfigError, match="defines no `config`"):
        load_config(broken)
