"""config/ablations.py, and sweeps: what they run, what they compare, what stops them."""

import json
import math
import os
import shutil
import signal
import statistics
import subprocess
import sys
import time
from pathlib import Path

import pytest
from conftest import ROOT, TINY, start
from scipy.stats import ttest_rel

from model import BERT, Config, require_possible
from nanocram.configurator import resolve, run_config_file
from nanocram.faults import Fault, run_script
from tools import bench, sweep

SMALL = [word for word in TINY if not word.startswith(("--out_dir", "--dataset"))]
SMALL += ["--max_steps=6", "--eval_minutes=0.0001"]


def last_loss(folder):
    entries = [json.loads(line) for line in Path(folder, "log.jsonl").read_text().splitlines()]
    return [e["val_loss"] for e in entries if "val_loss" in e][-1]


# --------------------------------------------------------------------------------------------------
# config/ablations.py


def resolved(*words):
    return resolve("train.py", words)


def ablation(name):
    return resolved("config/crammed.py", f"--ablation={name}")


def ablations():
    return run_config_file("config/ablations.py", **resolved("config/crammed.py"))


@pytest.mark.parametrize("scale", [[], ["--scale=cpu"]])
def test_every_ablation_is_a_model_and_a_training_that_exist(scale, home, read_once):
    """Each changes something, has folders of its own, and passes what train.py demands."""
    base = resolved("config/crammed.py", *scale)
    seen = []
    for name in ablations()["ablations"]:
        config = resolved("config/crammed.py", *scale, f"--ablation={name}")
        folders = ("out_dir", "dataset")
        changed = {k: v for k, v in config.items() if v != base[k] and k not in folders}
        same = {"rotary"} if scale else {"scaled_sinusoidal_positions"}
        assert changed or name in same, name
        assert config["out_dir"] == f"{base['out_dir']}_{name}"
        assert (config["dataset"] != base["dataset"]) == (name in ablations()["data"]), name
        require_possible(Config(**{k: config[k] for k in Config.__dataclass_fields__}))
        micro = config["micro_batch_size"]
        assert config["batch_size"] % micro == 0, name
        assert not config["batch_ramp"] or config["batch_ramp_rows"] % micro == 0, name
        # the smallest batch and model of scale=cpu end the ladders there, 2^16 that of vocabularies
        assert scale or changed not in seen or name == "vocab_four_times", name
        seen.append(changed)


def test_rows_of_the_paper(home):
    """Spot checks: numbers of the paper's own rows, at full size."""
    c = ablation("original_training")
    found = (c["learning_rate"], c["batch_size"], c["mask_rate"], c["optimizer"])
    assert found == (1e-4, 512, 0.15, "Adam")
    c = ablation("minimal_training")
    found = (c["learning_rate"], c["batch_size"], c["batch_ramp"], c["schedule"])
    assert found == (5e-4, 8192, 0.0, "cosine")

    bert = resolved("config/bert_base.py")
    original = ablation("original_both_decoupled")
    same = "n_layer n_head n_embd n_inner norm_place bias activation glu position final_norm"
    same += " head_transform decoder_bias token_types dropout mask_rate optimizer learning_rate"
    same += " beta2 adam_eps grad_clip schedule warmup batch_size"
    assert [original[k] for k in same.split()] == [bert[k] for k in same.split()]
    assert ablation("dedup")["dedup_tokens"] == 18

    layers = {"eighth": 2, "quarter": 4, "half": 8, "three_quarters": 12, "one_and_a_half": 24}
    for name, size in layers.items():
        assert ablation(f"{name}_depth")["n_layer"] == size
    for name, size in {"third": 256, "two_thirds": 512, "four_thirds": 1024}.items():
        assert ablation(f"{name}_width")["n_embd"] == size
    for name, size in {"half": 4096, "quarter": 2048, "eighth": 1024, "sixteenth": 512}.items():
        c = ablation(f"{name}_batch_no_ramp")
        assert (c["batch_size"], c["batch_ramp"]) == (size, 0.0)


def test_parameters_of_the_ladder(home):
    """The part of a block's parameters that half the depth and two thirds of the width leave."""
    count = {}
    for name in ("half_depth", "two_thirds_width"):
        config = ablation(name)
        model = BERT(Config(**{k: config[k] for k in Config.__dataclass_fields__}))
        count[name] = sum(p.numel() for p in model.blocks.parameters() if p.ndim == 2)
    full = 16 * (4 * 768**2 + 768 * 3072 + 1536 * 768)
    assert count == {"half_depth": full // 2, "two_thirds_width": full * 4 // 9}


def test_shapes_of_equal_size_at_the_scale_of_the_study(home):
    """The blocks have as many parameters within 2 %, counted in the models, and equal heads."""
    shapes = {"four_times_depth": (16, 256), "wider_and_deeper": (7, 384), "double_width": (4, 512)}
    count = {}
    for name, shape in shapes.items():
        config = resolved("config/study.py", f"--ablation={name}")
        assert (config["n_layer"], config["n_embd"]) == shape
        assert config["n_embd"] / config["n_head"] == 64 and config["n_inner"] == 4 * shape[1]
        blocks = BERT(Config(**{k: config[k] for k in Config.__dataclass_fields__})).blocks
        count[name] = sum(p.numel() for p in blocks.parameters() if p.ndim == 2)
    baseline = 4 * (4 * 256**2 + 256 * 1024 + 512 * 256)
    assert count["four_times_depth"] == count["double_width"] == 4 * baseline
    assert count["wider_and_deeper"] == pytest.approx(4 * baseline, rel=0.02)


def test_the_study_is_the_crammed_recipe_at_a_small_scale(home, read_once):
    """Every row has the values that it has with the words of the scale, but for names and texts."""
    words = ["--scale=cpu", "--max_chars=100_000_000"]
    corpora = {name for name, changes in ablations()["data"].items() if "sources" in changes}
    for name in ["crammed", *ablations()["ablations"]]:
        own = "study" if name == "crammed" else f"study+{name}"
        config = resolved(*sweep.stage_words(own, []))
        expected = resolved(*sweep.stage_words(name, words))
        differ = {k for k in expected if config[k] != expected[k]}
        texts = set() if name in corpora else {"sources"}
        assert differ == {"out_dir", "dataset"} | texts, name


def test_what_each_part_of_the_recipe_is_worth(home):
    """The rows of several changes that config/ablations.py names have the parts that it says."""
    parts = {
        "architecture": ("norm_place", "post"),
        "training": ("learning_rate", 2e-4),
        "data": ("order", "shuffle"),
    }
    rows = {
        "original_both+unfiltered_unsorted": {"architecture", "training", "data"},
        "original_training+unfiltered_unsorted": {"training", "data"},
        "original_architecture+unfiltered_unsorted": {"architecture", "data"},
        "original_both": {"architecture", "training"},
        "crammed": set(),
    }
    for name, expected in rows.items():
        assert name in (ROOT / "config/ablations.py").read_text()
        config = resolved(*sweep.stage_words(name, ["--scale=cpu"]))
        assert {part for part, (key, value) in parts.items() if config[key] == value} == expected


def test_the_order_of_words_is_the_order_of_meaning(home):
    c = resolved("config/crammed.py", "--scale=cpu", "--ablation=half_depth", "--n_embd=32")
    assert (c["n_layer"], c["n_embd"], c["out_dir"]) == (2, 32, "out/crammed_cpu_half_depth")
    hint = "'half_dept' is none of the ablations.*did you mean half_depth"
    with pytest.raises(Fault, match=hint):
        ablation("half_dept")


def test_changes_of_a_recipe_of_ones_own(home):
    """A recipe, or an ablation of the crammed one; several changes, applied in that order."""
    words = ["--n_layer=12", "--scale=cpu"]
    words = sweep.stage_words("cpu+half_depth+half_depth+adam_l2+muon", words)
    c = resolved(*words)
    assert (c["n_layer"], c["optimizer"]) == (3, "muon")
    assert (c["dataset"], c["rotary_base"]) == ("cpu_cpu", 1000.0)
    assert words[0] == "config/cpu.py"
    assert sweep.stage_words("relu2", [])[0] == "config/crammed.py"
    with pytest.raises(Fault, match="'cpu_' is none of the ablations"):
        resolved(*sweep.stage_words("cpu_+relu2", []))


# --------------------------------------------------------------------------------------------------
# Sweeps


@pytest.fixture
def sweep_here(run, monkeypatch, capsys):
    """sweep_here("crammed", "--key=value", ...) runs a sweep, and its stages, in this process.

    Returns (exit message or None, output of the sweep and of all its stages).
    """
    said = []

    def stage_here(script, words):
        said.extend([*capsys.readouterr(), f"== {script}\n"])
        message, output = run(script, *words)
        said.append(output)
        return int(message is not None)

    def go(*words):
        said.clear()
        capsys.readouterr()
        monkeypatch.setattr(sys, "argv", ["sweep.py", *words])
        monkeypatch.setattr(sweep, "run_stage", stage_here)
        message = None
        try:
            run_script(sweep.main)
        except SystemExit as e:
            message = e.code
        said.extend(capsys.readouterr())
        return message, "".join(said)

    return go


def test_tokens_in_place_of_the_clock(sweep_here, home, monkeypatch):
    """The first entry sees so many tokens, a faster one more. Speeds are measured once.

    Equal work has equal speed. The batch grows from 8 to 16 rows; flash in post-norm is refused.
    """
    monkeypatch.setattr(bench, "REPEATS", 1)
    names = ["crammed", "half_depth", "cosine_schedule", "flash"]
    own_words = ["--tokens=9000", "--out=out/s"]
    words = ["--norm_place=post", *(word for word in SMALL if "max_steps" not in word)]
    words += ["--batch_size=16", "--batch_ramp=0.5", "--batch_ramp_rows=8"]
    message, output = sweep_here(*names, *own_words, *words)
    expected = "sweep.py: 1 of 4 entries failed: flash; the same command tries them again"
    assert message == expected
    assert "flash: does not run" in output and not Path("out/s/flash-1337").exists()

    saved = json.loads(Path("out/s/speeds.json").read_text())
    speeds = {name: speed for name, (speed, _) in saved.items()}
    assert speeds["crammed"] == 1.0 and speeds["half_depth"] > 0 and "half_depth: " in output
    assert speeds["cosine_schedule"] == 1.0 and "cosine_schedule: " not in output
    tokens_per_step = 32 * (0.25 * 8 + 0.75 * 16)
    for name, speed in speeds.items():
        done = json.loads(Path(f"out/s/{name}-1337/config.json").read_text())
        assert done["max_steps"] == pytest.approx(9000 * speed / tokens_per_step, abs=0.6)
    table = Path("out/s/table.md").read_text().splitlines()
    assert "| speed |" in table[0]
    assert [line.split(" | ")[-1] for line in table[2:5:2]] == ["1.00 |", "1.00 |"]
    message, output = sweep_here(*names, *own_words, *words)
    assert "flash" in message
    assert "times the tokens/s" not in output and "== train.py" not in output

    # other work is measured, once
    asked = []

    def speeds_of(recipes):
        asked.append(list(recipes))
        return dict.fromkeys(recipes, 2.0) | {"crammed": 1.0}

    monkeypatch.setattr(sweep, "relative_speeds", speeds_of)
    path = Path("out/s/speeds.json")
    configs = sweep.resolve_entries(["crammed", "half_depth"], words)
    other = {name: config | {"n_inner": 128} for name, config in configs.items()}
    before = sweep.steps_of(configs, 9000, path)
    after = sweep.steps_of(other, 9000, path)
    again = sweep.steps_of(other, 9000, path)
    assert asked == [["crammed", "half_depth"]]
    assert after == again and after["half_depth"] != before["half_depth"]


def test_a_sweep_runs_compares_survives_a_failure_and_goes_on(run, sweep_here, home):
    """Its table against the logs of its runs; flash in post-norm fails, and the others go on."""
    names = ["crammed", "flash", "fragment_order", "vocab_half"]
    words = [*names, "--seeds=2", "--out=out/s", *SMALL, "--norm_place=post"]
    message, output = sweep_here(*words)
    expected = "sweep.py: 1 of 4 entries failed: flash; the same command tries them again"
    assert message == expected

    # means, deviations and differences of the two that compare
    finals, others = (
        [last_loss(f"out/s/{name}-{seed}") for seed in (1337, 1338)]
        for name in ("crammed", "fragment_order")
    )
    table = Path("out/s/table.md").read_text()
    assert table in output
    mean = statistics.mean(finals)
    sd = statistics.stdev(finals)
    assert f"| crammed | 2 | 2 | 32 | {mean:.3f} ± {sd:.3f} |" in table and sd > 0
    pairs = ttest_rel(others, finals)
    low, high = pairs.confidence_interval()
    gap = statistics.mean(others) - mean
    interval = f"{gap:+.3f} [{low:+.3f}, {high:+.3f}], p = {pairs.pvalue:.2g}"
    assert f"| fragment_order | 2 | {interval} |" in table

    # one that failed; the same tokenizer and val.bin, other rows; another tokenizer
    assert table.count("| vocab_half |") == 1  # without scores it has nothing that compares
    assert "| flash | 0, train.py failed |" in table
    assert "| fragment_order | 2 | 2 | 32 | (" not in table
    assert "| vocab_half | 2 | 2 | 32 | (" in table and "In brackets" in table
    settings = []
    for name in ("crammed", "fragment_order"):
        settings.append(json.loads(Path(f"out/s/{name}-1337/config.json").read_text()))
    assert len({c["train_sha256"] for c in settings}) == 2
    assert len({c["val_sha256"] for c in settings}) == 1
    assert Path("out/s/sweep.png").read_bytes()[:4] == b"\x89PNG"

    # what is done is not done again, also if the code has got a key since
    done = {p: p.stat().st_mtime_ns for p in Path("out/s").glob("*/model.pt")}
    assert len(done) == 6
    words.remove("flash")
    assert sweep_here(*words)[0] is None
    assert done == {p: p.stat().st_mtime_ns for p in Path("out/s").glob("*/model.pt")}
    path = Path("out/s/crammed-1337/config.json")
    older = json.loads(path.read_text())
    del older["embedding_skip"]
    path.write_text(json.dumps(older))
    assert sweep_here(*words)[0] is None

    # a finished run is of these settings, or refused
    for change in ("learning_rate=0.5", "embedding_skip=True"):
        message, output = sweep_here(*words, f"--{change}")
        key = change.partition("=")[0]
        assert "3 of 3 entries failed" in message
        assert f"out/s/crammed-1337 is a run with another {key}" in output
    path.write_text(json.dumps(older | {"gone_from_the_code": 0.5}))
    expected = "out/s/crammed-1337 is a run with another gone_from_the_code"
    assert expected in sweep_here(*words)[1]

    # its runs are runs like any other
    path.write_text(json.dumps(older))
    runs = [f"out/s/{name}-1337" for name in ("crammed", "fragment_order")]
    assert run("plot.py", *runs, "--scaling", "--out=laws.png")[0] is None
    assert Path("laws.png").read_bytes()[:4] == b"\x89PNG"


def test_printed_lines_in_any_order_give_the_table_of_the_sweep(run, sweep_here, home, monkeypatch):
    """Each line is a shell command of its own; a second time it finds all done.

    The shell gets a `python` that writes down its arguments. What they ask for is done here.
    """
    python = home / "bin/python"
    python.parent.mkdir()
    python.write_text("#!/bin/bash\nprintf '%s\\0' \"$@\" >> calls\necho >> calls\n")
    python.chmod(0o755)
    monkeypatch.setenv("PATH", f"{python.parent}:{os.environ['PATH']}")

    def stages_of(line):
        subprocess.run(["bash", "-c", line], check=True)
        scripts = []
        for call in Path("calls").read_text().splitlines():
            script, *words = call.removesuffix("\0").split("\0")
            assert run(script, *words)[0] is None
            scripts.append(script)
        os.remove("calls")
        return scripts

    words = ["crammed", "half_depth", *SMALL]
    assert sweep_here(*words, "--out=out/own")[0] is None
    message, output = run("sweep.py", *words, "--out=out/s", "--print")
    assert message is None and not Path("out/s").exists()
    lines = output.splitlines()
    assert len(lines) == 2 and all("config/crammed.py" in line for line in lines)
    for line in reversed(lines):
        assert stages_of(line) == ["prepare.py", "train.py"]
    assert stages_of(lines[0]) == ["prepare.py"]

    assert run("sweep.py", *words, "--out=out/s", "--table")[0] is None
    tables = []
    for out in ("own", "s"):
        rows = Path(f"out/{out}/table.md").read_text().splitlines()
        # without the moment at which the other one is passed, and tokens per second: both are times
        tables.append([row.rsplit("|", 5)[0] for row in rows])
    assert tables[0] == tables[1] and "| crammed | 1 | 2 |" in tables[0][2]


def test_printed_lines_have_the_steps_that_were_measured(home, monkeypatch, capsys):
    def measured(configs, tokens, path):
        print("crammed: 1.00 times the tokens/s")
        return {"crammed": 7}

    monkeypatch.setattr(sweep, "steps_of", measured)
    words = ["crammed", "flash", "--tokens=9000", "--tasks=cola", "--seeds=2", "--print"]
    sweep.main([*words, "--sources=my texts"])
    output, errors = capsys.readouterr()
    lines = output.splitlines()
    assert len(lines) == 2 and "flash does not run" in errors and "tokens/s" in errors
    for seed, line in zip((1337, 1338), lines):
        words = "config/crammed.py --tasks=cola '--sources=my texts' --max_steps=7"
        assert line.startswith(f"python prepare.py {words} && ")
        assert f"--out_dir=out/sweep/crammed-{seed} --seed={seed}; }} && python finet" in line
        assert line.count("--max_steps=7") == 3
    with pytest.raises(Fault, match="cannot measure the models of init_from"):
        sweep.main(["crammed", "--tokens=9000", "--init_from=out/x", "--print"])


def test_what_is_left_out_is_not_said_among_the_printed_lines(home, capsys):
    sweep.main(["crammed", "no_positions", "--scale=cpu", "--print"])
    output, errors = capsys.readouterr()
    assert [line.split()[:3] for line in output.splitlines()] == [
        ["python", "prepare.py", "config/crammed.py"]
    ] * 2
    assert "rotary_base = 1000.0 has no meaning with position = 'none'" in errors


def write_run(folder, loss, score, final_loss, tokenizer, has_rte):
    """Write what --table reads of a run."""
    folder.mkdir(parents=True)
    config = {"n_layer": 2, "n_embd": 32, "val_sha256": "x", "tokenizer_sha256": tokenizer}
    (folder / "config.json").write_text(json.dumps(config))
    log = [
        {"step": 1, "hours": 0.1, "tokens_per_s": 9.0, "epoch": 0.1},
        {"step": 5, "hours": 0.5, "val_loss": loss + 0.8, "tokens": 50, "progress": 0.5},
        {"step": 9, "hours": 0.9, "val_loss": final_loss, "tokens": 100, "progress": 1.0},
    ]
    (folder / "log.jsonl").write_text("".join(json.dumps(entry) + "\n" for entry in log))
    row = {"cola": {"median": score}}
    if has_rte:
        row["rte"] = {"median": score + 2}
    (folder / "glue.json").write_text(json.dumps({"rows": {"run": row}}))


def test_scores_are_compared_in_pairs_of_seeds(home):
    """Against scipy's t-test.

    Other tokenizers are judged by their scores alone; a seed that is not scored hides its task.
    c ends 0.2 below a, d where a ends, for which two of its seeds do not reach a's mean.
    """
    out = Path("out/s")
    losses = [4.0, 4.1, 4.05]
    scores = {"a": [50.0, 61.0, 55.0], "b": [52.5, 62.0, 58.0]}
    scores["c"] = scores["d"] = scores["a"]
    for name, values in scores.items():
        for i, (score, loss) in enumerate(zip(values, losses)):
            final_loss = loss - 0.2 if name == "c" else loss
            tokenizer = "other" if name == "b" else "one"
            has_rte = (name, i) != ("b", 2)
            folder = out / f"{name}-{1337 + i}"
            write_run(folder, loss, score, final_loss, tokenizer, has_rte)

    # a run that is not finished is not in the table; another entry was the first one before
    shutil.copytree("out/s/c-1337", "out/s/c-1340")
    log = Path("out/s/c-1340/log.jsonl")
    log.write_text(log.read_text().replace("1.0}", "0.5}") + '{"step": 7, "tok')
    speeds = {"other": [1.0, "x"], "a": [2.0, "y"], "d": [3.0, "z"]}
    Path("out/s/speeds.json").write_text(json.dumps(speeds))

    text, _ = sweep.write_table(["a", "b", "c", "d"], {}, out)
    pairs = ttest_rel(scores["b"], scores["a"])
    low, high = pairs.confidence_interval()
    cola = f"+2.2 [{low:+.1f}, {high:+.1f}], p = {pairs.pvalue:.2g}"
    *_, head, _, b, c, _ = text.splitlines()
    assert head == "| | n | val_loss | cola | rte | mean of cola, rte |"
    assert b == f"| b | 3 |  | {cola} |  |  |"
    # where the lines from c's evaluations at a half to its last ones are at a's mean, 4.05
    assert "| c | 3 | 2 | 32 | 3.850 ± 0.050 | 0.90 ± 0.0" in text
    assert "| d | 3 | 2 | 32 | 4.050 ± 0.050 | - |" in text
    assert "| b | 3 | 2 | 32 | (4.050 ± 0.050) |  |" in text
    speeds = [line.rsplit(" | ", 5)[1] for line in text.splitlines()[2:6:3]]
    assert speeds == ["1.00", "1.50"]  # of a and d
    assert c.startswith("| c | 3 | -0.200 [-0.200, -0.200] | +0.0 [")
    assert "| 56.3 ± 5.5 |" in text.split("Against")[0]


def test_the_table_says_how_sure_a_single_run_is_and_how_many_are_scored(home):
    """One run has the error of its log; of several, those without scores are not counted in."""
    for i, loss in enumerate([4.0, 4.2, 4.4]):
        write_run(Path(f"out/s/a-{1337 + i}"), loss, 50.0 + i, loss, "one", False)
    Path("out/s/a-1338/glue.json").unlink()
    write_run(Path("out/s/b-1337"), 4.1, 40.0, 4.1, "one", False)
    write_run(Path("out/s/c-1337"), 4.1, 40.0, 4.1, "other", False)
    for path in Path("out/s").glob("*/log.jsonl"):
        log = path.read_text().replace('"val_loss"', '"val_loss_se": 0.0214, "val_loss"')
        path.write_text(log)
    text, _ = sweep.write_table(["a", "b", "c"], {}, Path("out/s"))
    lines = [[cell.strip() for cell in line.split("|")[1:-1]] for line in text.splitlines()]
    assert "val_loss_se" not in lines[0]
    column = {title: i for i, title in enumerate(lines[0])}
    a, b, c = lines[2:5]
    assert (a[1], a[column["val_loss"]]) == ("3", "4.200 ± 0.200")
    assert a[column["cola"]] == "51.0 ± 1.4 (n = 2)"
    assert (b[1], b[column["val_loss"]], b[column["cola"]]) == ("1", "4.100 ± 0.021 s.e.", "40.0")
    assert c[column["val_loss"]] == "(4.100 ± 0.021 s.e.)"
    assert "standard error of val_loss over validation rows" in text


def test_what_stops_a_sweep_lets_its_run_save_and_the_same_command_continues(sweep_here, home):
    words = ["crammed", "--out=out/s", *SMALL, "--max_steps=150", "--checkpoint_minutes=9"]
    process = start("sweep.py", *words, cwd=home)
    log = Path("out/s/crammed-1337/log.jsonl")
    while not log.exists() or log.read_text().count("\n") < 20:
        assert process.poll() is None
        time.sleep(0.01)
    process.send_signal(signal.SIGTERM)
    output = "".join(process.communicate())
    assert process.returncode == 1
    assert "saved at step" in output and "sweep.py: interrupted" in output
    assert (log.parent / "ckpt.pt").exists() and not (log.parent / "model.pt").exists()
    assert sweep_here(*words)[0] is None and (log.parent / "model.pt").exists()
    assert any("resumed" in json.loads(line) for line in log.read_text().splitlines())


def test_mistakes_end_a_sweep_before_it_begins(run, home):
    assert "did you mean rotary" in run("sweep.py", "crammed", "rotari")[0]
    assert "no stage knows the key" in run("sweep.py", "crammed", "--learning_rat=1")[0]
    message, output = run("sweep.py")
    assert message == 2 and "python -m tools.sweep" in output
    message, output = run("sweep.py", "crammed", "--table=True")
    assert message == 2 and "--table" in output
    assert "an override is written" in run("sweep.py", "crammed", "--compile")[0]
    assert "is what the sweep itself sets" in run("sweep.py", "crammed", "--seed=3")[0]
    assert "is what the sweep itself sets" in run("sweep.py", "crammed", "--out_dir=x")[0]
    assert "outside [1, inf)" in run("sweep.py", "crammed", "--seeds=0")[0]
    message = run("sweep.py", "crammed", "rotary", "--scale=cpu")[0]
    assert message == "sweep.py: rotary and crammed are the same experiment here; leave one out"
    assert "different budgets" in run("sweep.py", "crammed", "config/cpu.py")[0]
    assert not Path("out").exists()
    assert "Not a directory" in run("sweep.py", "crammed", "--out=text.txt/x", "--table")[0]
    message, output = run("sweep.py", "bert_base", "izsak", "--out=out/s", "--table")
    assert message is None and "| bert_base | 0 |" in output


def test_the_first_crossing_lies_on_the_line_between_two_points():
    curve = [(0.0, 5.0), (0.5, 4.0), (1.0, 4.5)]
    assert sweep.first_crossing(curve, 4.25) == 0.375
    assert sweep.first_crossing(curve, 6.0) == 0.0  # from the start
    assert math.isnan(sweep.first_crossing(curve, 3.0))
