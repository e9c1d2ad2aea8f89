import os

import pytest
from conftest import ROOT

from configurator import STAGES, check, configure, declared, replace_file

CONFIGS = sorted(p.name for p in (ROOT / "config").glob("*.py") if p.name != "ablations.py")


def resolve(*args, script="train.py"):
    return configure(script, list(args))


def refused(*args):
    with pytest.raises(SystemExit) as e:
        resolve(*args)
    assert "\n" not in str(e.value)
    return str(e.value)


def test_order_is_default_then_file_then_override(tmp_path):
    file = tmp_path / "c.py"
    file.write_text("import math\n_private = 1\nlearning_rate = 0.5\nseed = 7\ndef helper(): pass\n")
    config = resolve(str(file), "--seed=8")
    assert (config["learning_rate"], config["seed"], config["beta1"]) == (0.5, 8, 0.9)
    assert not {"math", "_private", "helper"} & config.keys()


def test_a_variant_execs_its_base(tmp_path):
    (tmp_path / "base.py").write_text("seed = 1\nmask_rate = 0.5\n")
    (tmp_path / "variant.py").write_text(f"exec(open({str(tmp_path / 'base.py')!r}).read())\nseed = 2\n")
    config = resolve(str(tmp_path / "variant.py"))
    assert (config["seed"], config["mask_rate"]) == (2, 0.5)


def test_one_file_serves_all_stages():
    for script in STAGES:
        config = resolve("--vocab_size=64", "--n_layer=3", "--mask_rate=0.2", "--glue_epochs=2", script=script)
        assert [config[k] for k in ("vocab_size", "n_layer", "mask_rate", "glue_epochs")] == [64, 3, 0.2, 2]


def test_override_is_split_at_the_first_equals_sign():
    assert resolve("--out_dir=a=b")["out_dir"] == "a=b"


def test_a_home_folder_is_found_whoever_expands_it(monkeypatch):
    monkeypatch.setenv("HOME", "/home/me")  # bash leaves the ~ of --out_dir=~/run as it is
    assert resolve("--out_dir=~/run")["out_dir"] == "/home/me/run"


def test_types():
    assert resolve("--learning_rate=1")["learning_rate"] == 1.0 and isinstance(resolve("--grad_clip=1")["grad_clip"], float)
    assert resolve("--tasks=cola, rte")["tasks"] == ["cola", "rte"]
    assert resolve("--sources={'path': 'x'}")["sources"] == [{"path": "x"}]
    for wrong in ("--n_layer=2.0", "--n_layer=True", "--compile=1", "--seed=abc", "--out_dir=3", "--mask_rate=None"):
        assert wrong.split("=")[0][2:] in refused(wrong)


def test_typos_name_the_nearest_key():
    assert "'learnig_rate'" in refused("--learnig_rate=1") and "did you mean learning_rate?" in refused("--learnig_rate=1")
    assert "did you mean glue_epochs?" in refused("--glue_epoch=1")
    assert "did you mean cosine?" in refused("--schedule=cosin")
    assert "--key=value" in refused("--compile")


@pytest.mark.parametrize(
    "wrong", "mask_rate=0.0 mask_rate=1.0 beta1=1.0 budget_hours=0 n_layer=0 seed=-1 learning_rate=1e999".split()
)
def test_ranges(wrong):
    assert "outside" in refused(f"--{wrong}")


def test_nan_is_in_no_range():
    with pytest.raises(SystemExit, match="outside"):
        check("x", float("nan"), 1.0, "[0, 2] anything")


def test_bounds_that_are_included_pass():
    assert resolve("--dropout=0.0", "--batch_ramp=1.0", "--triangle_base=1.0")["batch_ramp"] == 1.0


def test_errors_in_a_file_name_file_and_line(tmp_path):
    file = tmp_path / "c.py"
    file.write_text("seed = 1\nseed = undefined\n")
    assert f"{file}, line 2: NameError" in refused(str(file))
    file.write_text("seed = 1\nseed = = 2\n")
    assert f"{file}, line 2: SyntaxError" in refused(str(file))
    assert "does not exist" in refused("config/nothing.py")
    assert "config cannot be read: IsADirectoryError" in refused("config")


def test_every_key_has_a_comment_and_one_default():
    seen = {}
    for stage in STAGES:
        for key, (default, comment) in declared(stage).items():
            assert comment, f"{stage}: {key} has no comment"
            assert key not in seen or seen[key] == default, f"{key} has two defaults"
            seen[key] = default


@pytest.mark.parametrize("name", CONFIGS)
def test_config_files_resolve(name, monkeypatch):
    monkeypatch.chdir(ROOT)
    assert resolve(f"config/{name}")["out_dir"] == "out/" + name.removesuffix(".py")


def test_help_prints_keys_defaults_and_comments(capsys):
    with pytest.raises(SystemExit):
        configure("train.py", ["--help"], also=["model.py"])
    text = capsys.readouterr().out
    assert "--mask_rate=0.25" in text and "share of a row's positions to predict" in text and "--n_layer=16" in text
    assert "--glue_epochs" not in text


def test_a_file_appears_only_when_complete(tmp_path):
    path = tmp_path / "f"
    path.write_text("old")
    with pytest.raises(KeyboardInterrupt), replace_file(path) as f:
        f.write(b"half")
        raise KeyboardInterrupt
    assert path.read_text() == "old" and os.listdir(tmp_path) == ["f"]
    with replace_file(path) as f:
        f.write(b"new")
    assert path.read_text() == "new"
