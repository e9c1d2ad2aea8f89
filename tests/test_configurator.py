import json
import sys
from pathlib import Path

import pytest
from conftest import PEAK, ROOT, TINY, command

from nanocram.configurator import Key, Stage, resolve
from nanocram.faults import Fault

CONFIGS = sorted(p.name for p in (ROOT / "config").glob("*.py") if p.name != "ablations.py")
STAGES = ["prepare.py", "train.py", "finetune_glue.py"]


def resolved(*args, script="train.py"):
    return resolve(ROOT / script, list(args))


def refused(*args):
    with pytest.raises(Fault) as e:
        resolved(*args)
    assert "\n" not in str(e.value)
    return str(e.value)


def test_order_is_default_then_file_then_override(tmp_path):
    file = tmp_path / "c.py"
    lines = ["import math", "_private = 1", "learning_rate = 0.5", "seed = 7", "def helper(): pass"]
    file.write_text("\n".join(lines) + "\n")
    config = resolved(str(file), "--seed=8")
    assert (config["learning_rate"], config["seed"], config["beta1"]) == (0.5, 8, 0.9)
    assert not {"math", "_private", "helper"} & config.keys()


def test_a_variant_execs_its_base(tmp_path):
    (tmp_path / "base.py").write_text("seed = 1\nmask_rate = 0.5\n")
    base = str(tmp_path / "base.py")
    (tmp_path / "variant.py").write_text(f"exec(open({base!r}).read())\nseed = 2\n")
    config = resolved(str(tmp_path / "variant.py"))
    assert (config["seed"], config["mask_rate"]) == (2, 0.5)


def test_one_file_serves_all_stages():
    args = ["--vocab_size=64", "--n_layer=3", "--mask_rate=0.2", "--glue_epochs=2"]
    for script in STAGES:
        config = resolved(*args, script=script)
        keys = ("vocab_size", "n_layer", "mask_rate", "glue_epochs")
        assert [config[k] for k in keys] == [64, 3, 0.2, 2]


def test_override_is_split_at_the_first_equals_sign():
    assert resolved("--out_dir=a=b")["out_dir"] == "a=b"


def test_a_home_folder_is_found_whoever_expands_it(monkeypatch):
    monkeypatch.setenv("HOME", "/home/me")  # bash leaves the ~ of --out_dir=~/run as it is
    assert resolved("--out_dir=~/run")["out_dir"] == "/home/me/run"


def test_types():
    assert resolved("--learning_rate=1")["learning_rate"] == 1.0
    assert isinstance(resolved("--grad_clip=1")["grad_clip"], float)
    assert resolved("--tasks=cola, rte")["tasks"] == ["cola", "rte"]
    assert resolved("--dataset=2024")["dataset"] == "2024"
    assert resolved("--sources={'path': 'x'}")["sources"] == [{"path": "x"}]
    wrongs = ["--n_layer=2.0", "--n_layer=True", "--compile=1", "--seed=abc"]
    for wrong in [*wrongs, "--mask_rate=None"]:
        assert wrong.split("=")[0][2:] in refused(wrong)


def test_typos_name_the_nearest_key():
    assert "'learnig_rate'" in refused("--learnig_rate=1")
    assert "did you mean learning_rate?" in refused("--learnig_rate=1")
    assert "did you mean glue_epochs?" in refused("--glue_epoch=1")
    assert "did you mean cosine?" in refused("--schedule=cosin")
    assert "--key=value" in refused("--compile")


RANGES = ["mask_rate=0.0", "mask_rate=1.0", "beta1=1.0", "budget_hours=0", "n_layer=0", "seed=-1"]


@pytest.mark.parametrize("wrong", [*RANGES, "learning_rate=1e999"])
def test_ranges(wrong):
    assert "outside" in refused(f"--{wrong}")


def test_nan_is_in_no_range():
    with pytest.raises(Fault, match="outside"):
        Key(1.0, "[0, 2] anything").check("x", float("nan"))


def test_bounds_that_are_included_pass():
    args = ["--dropout=0.0", "--batch_ramp=1.0", "--triangle_base=1.0"]
    assert resolved(*args)["batch_ramp"] == 1.0


def test_errors_in_a_file_name_file_and_line(tmp_path):
    file = tmp_path / "c.py"
    file.write_text("seed = 1\nseed = undefined\n")
    assert f"{file}, line 2: NameError" in refused(str(file))
    file.write_text("seed = 1\nseed = = 2\n")
    assert f"{file}, line 2: SyntaxError" in refused(str(file))
    assert "does not exist" in refused("config/nothing.py")
    assert "config cannot be read: IsADirectoryError" in refused(str(ROOT / "config"))


def test_every_key_has_a_comment_and_one_default():
    seen = {}
    for script in STAGES:
        stage = Stage(ROOT / script)
        assert stage.is_stage and not stage.bare
        for name, key in (stage.own | stage.model).items():
            assert key.comment, f"{script}: {name} has no comment"
            assert name not in seen or seen[name] == key.default, f"{name} has two defaults"
            seen[name] = key.default


@pytest.mark.parametrize("name", CONFIGS)
def test_config_files_resolve(name, monkeypatch):
    monkeypatch.chdir(ROOT)
    assert resolved(f"config/{name}")["out_dir"] == "out/" + name.removesuffix(".py")


def test_help_prints_keys_defaults_and_comments(run):
    message, text = run("train.py", "--help")
    assert not message
    assert "--mask_rate=0.25" in text and "fraction of a row's positions to predict" in text
    assert "--n_layer=16" in text and "--glue_epochs" not in text


MEANINGLESS = [
    ["--schedule=triangle", "--warmup=0.1"],
    ["--schedule=ramp", "--warmup=0.1"],
    ["--warmup=0.1"],  # the default is a triangle
    ["--schedule=constant", "--cooldown=0.5"],
    ["--schedule=linear", "--cooldown=0.5"],
    ["--schedule=cosine", "--cooldown=0.5"],
    ["--schedule=trapezoid", "--triangle_base=0.5"],
    ["--rotary_base=50", "--position=learned", "--rotary_base=60"],
    ["--optimizer=Adafactor", "--beta1=0.5"],
]


@pytest.mark.parametrize("args", MEANINGLESS, ids=" ".join)
def test_a_setting_without_a_meaning_is_refused_if_it_comes_later(args):
    message = refused(*args)
    assert "has no meaning with" in message and "leave it out" in message


def test_a_setting_without_a_meaning_is_dropped_if_it_is_inherited(tmp_path, capsys):
    """By an override, and by a file that changes the schedule of its base, in any stage."""
    words = ["--schedule=cosine", "--warmup=0.1", "--schedule=triangle"]
    assert resolved(*words)["warmup"] == 0.0
    assert "warmup = 0.1 has no meaning with schedule = 'triangle'" in capsys.readouterr().out
    base, file = tmp_path / "base.py", tmp_path / "c.py"
    base.write_text('schedule = "cosine"\nwarmup = 0.1\n')
    run_base = f"exec(open({str(base)!r}).read())\n"
    file.write_text(run_base + 'schedule = "triangle"\n')
    for script in STAGES:
        assert resolved(str(file), script=script)["warmup"] == 0.0
    assert capsys.readouterr().out.count("is left out") == 1  # by the stage whose key it is
    file.write_text(run_base + 'schedule = "triangle"\nwarmup = 0.2\n')
    assert "warmup = 0.2 has no meaning" in refused(str(file))
    file.write_text(run_base + 'schedule = "linear"\n')
    assert resolved(str(file))["warmup"] == 0.1


# --------------------------------------------------------------------------------------------------
# What a person may do to a fork


TRAIN = [*TINY, "--max_steps=2"]


@pytest.fixture
def fork(home):
    """A copy of the checkout in the working folder, without what the stages do not need."""
    for path in [*ROOT.glob("*.py"), *ROOT.glob("nanocram/*.py"), ROOT / "requirements.txt"]:
        to = Path("fork") / path.relative_to(ROOT)
        to.parent.mkdir(parents=True, exist_ok=True)
        to.write_bytes(path.read_bytes())
    return Path("fork")


def edit(path, old, new):
    text = path.read_text()
    assert text.count(old) == 1, old
    path.write_text(text.replace(old, new))


@pytest.fixture
def execute(run, monkeypatch):
    """execute(script, *args) runs a script with the modules next to it, not with ours.

    Returns (exit status, output).
    """

    def go(script, *args):
        with monkeypatch.context() as patch:
            # forget our modules; at the end pytest brings them back
            for name, module in list(sys.modules.items()):
                folder = Path(getattr(module, "__file__", None) or "/").parent
                if folder in (ROOT, ROOT / "nanocram"):
                    patch.delitem(sys.modules, name)
            patch.syspath_prepend(script.parent.resolve())
            patch.setattr("nanocram.device.peak_flops", PEAK)
            message, output = run(str(script.resolve()), *args)
            sys.modules.pop("model_mine", None)
        return int(bool(message)), output + (message or "")

    return go


def saved(name="tiny"):
    return json.loads(Path(f"out/{name}/config.json").read_text())


def test_a_copied_stage_has_its_own_keys_and_defaults(fork, tiny_data, execute):
    """From a config file that sets the new key, for all three stages; a new choice is no typo."""
    mine = fork / "train_mine.py"
    mine.write_text((fork / "train.py").read_text())
    edit(mine, "\nbeta2 = 0.98\n", "\nbeta2 = 0.5\n")
    edit(mine, "seed = 1337  #", "shuffle_words = 0.0  # [0, 1) a new key\nseed = 1337  #")
    edit(mine, "trapezoid, ramp} of", "trapezoid, ramp, sawtooth} of")
    edit(
        mine,
        '    if schedule == "ramp":',
        '    if schedule == "sawtooth":\n        return 1 - p * shuffle_words\n'
        '    if schedule == "ramp":',
    )
    edit(mine, "(p, schedule, warmup,", "(p, schedule, shuffle_words, warmup,")
    edit(mine, 'c["schedule"], c["warmup"]', 'c["schedule"], c["shuffle_words"], c["warmup"]')
    Path("mine.py").write_text('schedule = "sawtooth"\nshuffle_words = 0.25\nglue_seeds = 1\n')
    data = ["--dataset=mine", "--sources=text.txt", "--vocab_size=90", "--seq_len=32"]
    code, text = execute(fork / "prepare.py", "mine.py", *data, "--val_rows=16")
    assert code == 0, text
    train = [word for word in TRAIN if "dataset" not in word]
    code, text = execute(mine, *train, "mine.py", *data)
    assert code == 0, text
    assert (saved()["beta2"], saved()["shuffle_words"], saved()["schedule"]) == (
        0.5,
        0.25,
        "sawtooth",
    )
    rates = [json.loads(line) for line in Path("out/tiny/log.jsonl").read_text().splitlines()]
    assert [e["lr"] for e in rates if "lr" in e] == pytest.approx([0.003, 0.003 * (1 - 0.125)])
    Path("a.tsv").write_text("text\tlabel\n" + "bal dem\tx\nfal dem\ty\n" * 20)
    task = "--tasks={'name': 'm', 'train': 'a.tsv', 'dev': 'a.tsv', 'columns': ['text']}"
    glue = [task, "--glue_epochs=1", "--glue_max_len=32", "--out_dir=out/tiny"]
    code, text = execute(fork / "finetune_glue.py", "mine.py", *glue)
    assert code == 0, text
    code, text = execute(mine, "--help")
    assert code == 0 and "--beta2=0.5" in text and "a new key" in text


def test_a_copied_model_has_its_own_defaults_and_keys(fork, tiny_data, execute):
    (fork / "model_mine.py").write_text((fork / "model.py").read_text())
    edit(
        fork / "model_mine.py",
        "    n_layer: int = 16  #",
        "    depth: int = 5  # mine\n    n_layer: int = 1  #",
    )
    mine = fork / "train_mine.py"
    mine.write_text(
        (fork / "train.py").read_text().replace("from model import", "from model_mine import")
    )
    code, text = execute(mine, *[word for word in TRAIN if "n_layer" not in word])
    assert code == 0, text
    assert (saved()["n_layer"], saved()["depth"]) == (1, 5)
    code, text = execute(mine, *TRAIN, "--depth=6", "--out_dir=out/six")
    assert code == 0 and (saved("six")["depth"], saved("six")["n_layer"]) == (6, 2), text
    code, text = execute(fork / "prepare.py", *TINY, "--depth=6")
    assert code == 0, text


def test_a_default_may_be_any_expression(fork, tiny_data, execute):
    """In one stage; the others read it from the source, or do without it if they cannot."""
    edit(fork / "train.py", "batch_size = 8192", "batch_size = 64 * 128")
    edit(fork / "train.py", "log_seconds = 10.0", "log_seconds = math.sqrt(batch_size)")
    edit(fork / "train.py", "seed = 1337", 'seed = int("1337") + len(Path("a").parts) - 1')
    for script in STAGES:
        config = resolve(fork / script, [])
        assert config["batch_size"] == 8192 and config["log_seconds"] == 8192**0.5
    assert execute(fork / "prepare.py", *TINY)[0] == 0
    code, text = execute(fork / "train.py", *TRAIN)
    assert code == 0 and saved()["seed"] == 1337, text
    edit(fork / "train.py", "wandb_log = False", 'wandb_log = Path("x")')
    code, text = execute(fork / "train.py", *TRAIN, "--out_dir=out/other")
    assert code == 1 and "wandb_log is a PosixPath, but a key is" in text


def test_a_module_variable_is_no_key_and_may_have_any_name(fork, tiny_data, execute):
    """Below the keys, or among them without a comment; a name that lacks only that is explained."""
    lines = 'best = float("inf")\nsequence = [1, 2]\ntables = {}\n'
    edit(fork / "train.py", "# What may differ between", lines + "# What may differ between")
    odd = "forgotten = 3\nnotes = open(__file__)\ngone = 1\ndel gone\nwandb_log = False"
    edit(fork / "train.py", "wandb_log = False", odd)
    for script in STAGES:
        assert not {"best", "sequence", "tables", "forgotten"} & resolve(fork / script, []).keys()
    code, text = execute(fork / "train.py", *TRAIN)
    assert code == 0, text
    for script in ("train.py", "prepare.py"):
        code, text = execute(fork / script, *TRAIN, "--forgotten=4")
        assert code == 1 and "forgotten in train.py needs a comment" in text


def test_a_helper_may_have_the_name_of_another_stages_key(fork, tiny_data, execute):
    edit(
        fork / "train.py",
        "def set_learning_rate(",
        "def norm(x):\n    return x\n\n\ndef order(x):\n    return norm(x)\n\n\n"
        "ORDERED = order(3)\n\n\ndef set_learning_rate(",
    )
    edit(fork / "train.py", "    # the end\n", "    # the end\n    assert order(norm(1)) == 1\n")
    code, text = execute(fork / "train.py", *TRAIN)
    assert code == 0, text
    edit(fork / "train.py", "def norm(x):", "def grad_clip(x):\n    return x\n\n\ndef norm(x):")
    code, text = execute(fork / "train.py", *TRAIN, "--out_dir=out/b")
    assert code == 1 and "grad_clip is also a key of this script" in text
    assert text.startswith("train.py: train.py, line ") and not Path("out/b").exists()


def test_a_file_next_to_the_stages_that_is_no_stage_does_no_harm(fork, tiny_data, execute):
    (fork / "broken.py").write_text("def (\n")
    (fork / "latin.py").write_bytes(b"# \xe9\n")
    (fork / "notes.py").write_text("learning_rate = 'fast'  # not a key\n")
    (fork / "binary.py").mkdir()
    code, text = execute(fork / "train.py", *TRAIN)
    assert code == 0 and isinstance(saved()["learning_rate"], float), text


def test_tools_and_resolve_leave_a_stage_as_it_is(home):
    """Nobody writes the globals of a stage: its defaults are there after a sweep's resolve."""
    import train

    before = dict(vars(train))
    assert resolve("train.py", ["--learning_rate=0.5"])["learning_rate"] == 0.5
    assert train.learning_rate == 1e-3 and before == vars(train)
    assert command("sweep.py")[1:3] == ["-m", "tools.sweep"]
