import json
import math
import shutil
import signal
import statistics
import time
from pathlib import Path

import pytest
from conftest import TINY, start
from scipy.stats import linregress, ttest_rel

import bench
import checkpoint
import plot
import sweep
from configurator import configure, run_file
from model import BERT, Config, require_possible

SMALL = [word for word in TINY if not word.startswith(("--out_dir", "--dataset"))] + ["--max_steps=6", "--eval_minutes=0.0001"]


def last_loss(folder):
    entries = [json.loads(line) for line in Path(folder, "log.jsonl").read_text().splitlines()]
    return [e["val_loss"] for e in entries if "val_loss" in e][-1]


def ablations():
    return run_file("config/ablations.py", **configure("train.py", ["config/crammed.py"]))


@pytest.mark.parametrize("scale", [[], ["--scale=cpu"]])
def test_every_ablation_is_a_model_and_a_training_that_exist(scale, home):
    """Each changes something, has folders of its own, and passes what train.py demands of a config."""
    base, seen = configure("train.py", ["config/crammed.py", *scale]), []
    for name in ablations()["ablations"]:
        config = configure("train.py", ["config/crammed.py", *scale, f"--ablation={name}"])
        changed = {k: v for k, v in config.items() if v != base[k] and k not in ("out_dir", "dataset")}
        same = {"rotary"} if scale else {"scaled_sinusoidal_positions"}
        assert changed or name in same, name
        assert config["out_dir"] == f"{base['out_dir']}_{name}"
        assert (config["dataset"] != base["dataset"]) == (name in ablations()["data"]), name
        require_possible(Config(**{k: config[k] for k in Config.__dataclass_fields__}))
        micro = config["micro_batch_size"]
        assert config["batch_size"] % micro == 0 and (not config["batch_ramp"] or config["batch_ramp_rows"] % micro == 0), name
        assert scale or changed not in seen, name  # the smallest batch and model of scale=cpu end the ladders there
        seen.append(changed)


def test_rows_of_the_paper():
    """Spot checks: numbers of the paper's own rows, at full size."""
    c = configure("train.py", ["config/crammed.py", "--ablation=original_training"])
    assert (c["learning_rate"], c["batch_size"], c["mask_rate"], c["optimizer"]) == (1e-4, 512, 0.15, "adam")
    c = configure("train.py", ["config/crammed.py", "--ablation=minimal_training"])
    assert (c["learning_rate"], c["batch_size"], c["batch_ramp"], c["schedule"]) == (5e-4, 8192, 0.0, "cosine")
    bert = configure("train.py", ["config/bert_base.py"])
    original = configure("train.py", ["config/crammed.py", "--ablation=original_both"])
    same = "n_layer n_head n_embd n_inner norm_place bias activation glu position final_norm head_transform decoder_bias"
    same += " token_types dropout mask_rate optimizer learning_rate beta2 adam_eps grad_clip schedule warmup batch_size"
    assert [original[k] for k in same.split()] == [bert[k] for k in same.split()]
    assert configure("train.py", ["config/crammed.py", "--ablation=dedup"])["dedup_tokens"] == 18
    ladders = {"eighth_depth": 2, "quarter_depth": 4, "half_depth": 8, "three_quarters_depth": 12, "one_and_a_half_depth": 24}
    for key, sizes in (
        ("n_layer", ladders),
        ("n_embd", {"third_width": 256, "two_thirds_width": 512, "four_thirds_width": 1024}),
    ):
        for name, size in sizes.items():
            assert configure("train.py", ["config/crammed.py", f"--ablation={name}"])[key] == size
    batches = {"half": 4096, "quarter": 2048, "eighth": 1024, "sixteenth": 512}
    for name, size in batches.items():
        c = configure("train.py", ["config/crammed.py", f"--ablation={name}_batch_no_ramp"])
        assert (c["batch_size"], c["batch_ramp"]) == (size, 0.0)


def test_the_order_of_words_is_the_order_of_meaning(home):
    c = configure("train.py", ["config/crammed.py", "--scale=cpu", "--ablation=half_depth", "--n_embd=32"])
    assert (c["n_layer"], c["n_embd"], c["out_dir"]) == (2, 32, "out/crammed_cpu_half_depth")
    with pytest.raises(SystemExit, match="'half_dept' is none of the ablations.*did you mean half_depth"):
        configure("train.py", ["config/crammed.py", "--ablation=half_dept"])


def test_tokens_in_place_of_the_clock(run, home, monkeypatch):
    """The first entry sees so many tokens, a faster one more; equal work has equal speed. Speeds are measured once.

    The batch grows from 8 to 16 rows; flash in post-norm is refused.
    """
    monkeypatch.setattr(bench, "REPEATS", 1)
    words = ["crammed", "half_depth", "cosine_schedule", "flash", "--tokens=9000", "--out=out/s", "--norm_place=post"]
    words += [w for w in SMALL if "max_steps" not in w]
    words += ["--batch_size=16", "--batch_ramp=0.5", "--batch_ramp_rows=8"]
    message, output = run("sweep.py", *words)
    assert message == "sweep.py: 1 of 4 entries failed: flash; the same command tries them again"
    assert "flash: does not run" in output and not Path("out/s/flash-1337").exists()
    speeds = {name: speed for name, (speed, _) in json.loads(Path("out/s/speeds.json").read_text()).items()}
    assert speeds["crammed"] == 1.0 and speeds["half_depth"] > 0 and "half_depth: " in output
    assert speeds["cosine_schedule"] == 1.0 and "cosine_schedule: " not in output
    for name, speed in speeds.items():
        done = json.loads(Path(f"out/s/{name}-1337/config.json").read_text())
        assert done["max_steps"] == pytest.approx(9000 * speed / (32 * (0.25 * 8 + 0.75 * 16)), abs=0.6)
    table = Path("out/s/table.md").read_text().splitlines()
    assert "| speed |" in table[0] and [line.split(" | ")[-1] for line in table[2:5:2]] == ["1.00 |", "1.00 |"]
    message, output = run("sweep.py", *words)
    assert "flash" in message and "times the tokens/s" not in output and "== train.py" not in output

    asked = []

    def speeds_of(recipes):
        asked.append(list(recipes))
        return dict.fromkeys(recipes, 2.0) | {"crammed": 1.0}

    monkeypatch.setattr(sweep, "relative_speeds", speeds_of)
    monkeypatch.setattr(sweep, "out", "out/s")
    monkeypatch.setattr(sweep, "tokens", 9000)
    configs = {name: sweep.configure("sweep.py", sweep.words_of(name, words[6:])) for name in ("crammed", "half_depth")}
    other = {name: config | {"n_inner": 128} for name, config in configs.items()}
    before, after, again = sweep.steps_of(configs), sweep.steps_of(other), sweep.steps_of(other)
    assert asked == [["crammed", "half_depth"]] and after == again and after["half_depth"] != before["half_depth"]


def test_changes_of_a_recipe_of_ones_own(home):
    """NAME+CHANGE+CHANGE: what train.py makes of it, changes applied in that order."""
    words = sweep.words_of("cpu+half_depth+half_depth+adam+muon", ["--n_layer=12", "--scale=cpu"])
    c = configure("train.py", words)
    assert (c["n_layer"], c["optimizer"], c["dataset"], c["rotary_base"]) == (3, "muon", "cpu_cpu", 1000.0)
    assert words[0] == "config/cpu.py" and sweep.words_of("relu2", [])[0] == "config/crammed.py"
    with pytest.raises(SystemExit, match="'cpu_' is none of the ablations"):
        configure("train.py", sweep.words_of("cpu_+relu2", []))


def test_a_sweep_runs_compares_survives_a_failure_and_goes_on(run, home):
    """Its table against the logs of its runs; flash in post-norm is refused, and the others go on."""
    words = ["crammed", "flash", "fragment_order", "vocab_half", "--seeds=2", "--out=out/s", *SMALL, "--norm_place=post"]
    message, output = run("sweep.py", *words)
    assert message == "sweep.py: 1 of 4 entries failed: flash; the same command tries them again"
    finals, others = [[last_loss(f"out/s/{name}-{seed}") for seed in (1337, 1338)] for name in ("crammed", "fragment_order")]
    table = Path("out/s/table.md").read_text()
    assert table in output
    mean, sd = statistics.mean(finals), statistics.stdev(finals)
    assert f"| crammed | 2 | 2 | 32 | {mean:.3f} ± {sd:.3f} |" in table and sd > 0
    pairs = ttest_rel(others, finals)
    low, high = pairs.confidence_interval()
    gap = statistics.mean(others) - mean
    assert f"| fragment_order | 2 | {gap:+.3f} [{low:+.3f}, {high:+.3f}], p = {pairs.pvalue:.2g} |" in table
    assert table.count("| vocab_half |") == 1  # without scores it has nothing that compares
    assert "| flash | 0, train.py failed |" in table
    assert "| fragment_order | 2 | 2 | 32 | (" not in table  # the same tokenizer and val.bin, other rows
    assert "| vocab_half | 2 | 2 | 32 | (" in table and "In brackets" in table
    settings = {name: json.loads(Path(f"out/s/{name}-1337/config.json").read_text()) for name in ("crammed", "fragment_order")}
    assert len({c["train_sha256"] for c in settings.values()}) == 2 and len({c["val_sha256"] for c in settings.values()}) == 1
    assert Path("out/s/sweep.png").read_bytes()[:4] == b"\x89PNG"

    done = {p: p.stat().st_mtime_ns for p in Path("out/s").glob("*/model.pt")}
    assert len(done) == 6
    words.remove("flash")
    assert run("sweep.py", *words)[0] is None
    assert done == {p: p.stat().st_mtime_ns for p in Path("out/s").glob("*/model.pt")}
    path = Path("out/s/crammed-1337/config.json")
    older = {k: v for k, v in json.loads(path.read_text()).items() if k != "embedding_skip"}
    path.write_text(json.dumps(older))
    assert run("sweep.py", *words)[0] is None
    for change in ("learning_rate=0.5", "embedding_skip=True"):
        message, output = run("sweep.py", *words, f"--{change}")
        key = change.partition("=")[0]
        assert "3 of 3 entries failed" in message and f"out/s/crammed-1337 is a run with another {key}" in output
    path.write_text(json.dumps(older | {"gone_from_the_code": 0.5}))
    assert "out/s/crammed-1337 is a run with another gone_from_the_code" in run("sweep.py", *words)[1]
    path.write_text(json.dumps(older))
    runs = [f"out/s/{name}-1337" for name in ("crammed", "fragment_order")]
    assert run("plot.py", *runs, "--scaling", "--out=laws.png")[0] is None
    assert Path("laws.png").read_bytes()[:4] == b"\x89PNG"


def test_scores_are_compared_in_pairs_of_seeds(home, monkeypatch):
    """Against scipy's t-test; other tokenizers are judged by their scores alone; a seed that is not scored hides its task.

    c ends 0.2 below a, d where a ends, for which two of its seeds do not come to a's mean.
    """
    monkeypatch.setattr(sweep, "out", "out/s")
    scores, losses = {"a": [50.0, 61.0, 55.0], "b": [52.5, 62.0, 58.0], "c": [50.0, 61.0, 55.0]}, [4.0, 4.1, 4.05]
    scores["d"] = scores["a"]
    for name, values in scores.items():
        for i, (score, loss) in enumerate(zip(values, losses)):
            folder = Path(f"out/s/{name}-{1337 + i}")
            folder.mkdir(parents=True)
            config = {"n_layer": 2, "n_embd": 32, "val_sha256": "x", "tokenizer_sha256": "other" if name == "b" else "one"}
            (folder / "config.json").write_text(json.dumps(config))
            log = [{"tokens_per_s": 9.0, "epoch": 0.1}, {"val_loss": loss + 0.8, "tokens": 50, "progress": 0.5}]
            log.append({"val_loss": loss - 0.2 * (name == "c"), "tokens": 100, "progress": 1.0})
            (folder / "log.jsonl").write_text("".join(json.dumps(entry) + "\n" for entry in log))
            row = {"cola": {"median": score}} | ({} if name == "b" and i == 2 else {"rte": {"median": score + 2}})
            (folder / "glue.json").write_text(json.dumps({"rows": {"run": row}}))
    shutil.copytree("out/s/c-1337", "out/s/c-1340")  # still on its way: not in the table
    speeds = {"other": [1.0, "x"], "a": [2.0, "y"], "d": [3.0, "z"]}  # another entry was the first one then
    Path("out/s/speeds.json").write_text(json.dumps(speeds))
    log = Path("out/s/c-1340/log.jsonl")
    log.write_text(log.read_text().replace("1.0}", "0.5}") + '{"step": 7, "tok')
    text, _ = sweep.report(["a", "b", "c", "d"], {})
    pairs = ttest_rel(scores["b"], scores["a"])
    low, high = pairs.confidence_interval()
    cola = f"+2.2 [{low:+.1f}, {high:+.1f}], p = {pairs.pvalue:.2g}"
    *_, head, _, b, c, _ = text.splitlines()
    assert head == "| | n | val_loss | cola | rte | mean of cola, rte |" and b == f"| b | 3 |  | {cola} |  |  |"
    # where the lines from c's evaluations at a half to its last ones are at a's mean, 4.05
    assert "| c | 3 | 2 | 32 | 3.850 ± 0.050 | 0.90 ± 0.0" in text and "| d | 3 | 2 | 32 | 4.050 ± 0.050 | - |" in text
    assert "| b | 3 | 2 | 32 | (4.050 ± 0.050) |  |" in text
    assert [line.rsplit(" | ", 5)[1] for line in text.splitlines()[2:6:3]] == ["1.00", "1.50"]  # a and d
    assert c.startswith("| c | 3 | -0.200 [-0.200, -0.200] | +0.0 [") and "| 56.3 ± 5.5 |" in text.split("Against")[0]


def test_the_share_of_the_time_is_that_of_the_tokens_where_steps_are_counted():
    """A batch that grows: half of the steps are a quarter of the tokens."""
    entries = [{"hours": 1.0, "resumed": True}, {"progress": 0.5, "tokens": 25}, {"progress": 1.0, "tokens": 100}]
    for changes, expected in (({"max_steps": 10}, [None, 0.25, 1.0]), ({"max_steps": 0}, [None, 0.5, 1.0])):
        checkpoint.add_shares(entries, changes)
        assert [e["share"] for e in entries] == expected
    checkpoint.add_shares(entries[:2], {"max_steps": 10})  # still on its way
    assert entries[1]["share"] == 0.5


def test_speeds_are_of_tokens(monkeypatch):
    """Rows twice as long that take twice as long are as fast; if the first entry does not run, it is the one named."""

    class Worker:
        def __init__(self, make, keys, rows, micro, compile):
            self.seconds, self.result = keys["seq_len"] / 128, lambda: [self.seconds]

        def __enter__(self):
            return self

        def __exit__(self, *error):
            pass

        def submit(self, turn):
            if self.seconds > 4:
                raise bench.BrokenProcessPool
            return self

    monkeypatch.setattr(bench, "worker", Worker)
    recipes = {name: ({"seq_len": n, "compile": False}, 8, 8) for name, n in (("a", 128), ("b", 256), ("c", 1024))}
    assert bench.relative_speeds(recipes) == {"a": 1.0, "b": 1.0}
    with pytest.raises(SystemExit, match="c: does not run"):
        bench.relative_speeds(dict(reversed(recipes.items())))


def test_what_stops_a_sweep_lets_its_run_save_and_the_same_command_continues(run, home):
    words = ["crammed", "--out=out/s", *SMALL, "--max_steps=400", "--checkpoint_minutes=9"]
    process, log = start("sweep.py", *words, cwd=home), Path("out/s/crammed-1337/log.jsonl")
    while not log.exists() or log.read_text().count("\n") < 20:
        assert process.poll() is None
        time.sleep(0.01)
    process.send_signal(signal.SIGTERM)
    output = "".join(process.communicate())
    assert process.returncode == 1 and "saved at step" in output and "sweep.py: interrupted" in output
    assert (log.parent / "ckpt.pt").exists() and not (log.parent / "model.pt").exists()
    assert run("sweep.py", *words)[0] is None and (log.parent / "model.pt").exists()
    assert any("resumed" in json.loads(line) for line in log.read_text().splitlines())


def test_mistakes_end_a_sweep_before_it_begins(run, home):
    assert "did you mean rotary" in run("sweep.py", "crammed", "rotari")[0]
    assert "no stage knows the key" in run("sweep.py", "crammed", "--learning_rat=1")[0]
    assert "python sweep.py crammed" in run("sweep.py")[0]
    assert "an override is written" in run("sweep.py", "crammed", "--table")[0]
    assert "is what the sweep itself sets" in run("sweep.py", "crammed", "--seed=3")[0]
    assert "outside [1, inf)" in run("sweep.py", "crammed", "--seeds=0")[0]
    message = run("sweep.py", "crammed", "rotary", "--scale=cpu")[0]
    assert message == "sweep.py: rotary and crammed are the same experiment here; leave one out"
    assert "different budgets" in run("sweep.py", "crammed", "config/cpu.py")[0]
    assert not Path("out").exists()
    assert "Not a directory" in run("sweep.py", "crammed", "--out=text.txt/x", "--table=True")[0]
    message, output = run("sweep.py", "bert_base", "izsak", "--out=out/s", "--table=True")
    assert message is None and "| bert_base | 0 |" in output


def test_the_power_law_is_found_again():
    """Points on 5 (1e12 / C)^0.1 and others above it, which are not on the envelope."""
    law = [(c, 5 * (1e12 / c) ** 0.1) for c in (1e12, 1e13, 1e14, 1e15)]
    above = [(c * 2, loss + 0.5) for c, loss in law]
    c, b, envelope = plot.power_law(law + above)
    assert envelope == law and math.isclose(b, 0.1) and math.isclose((c / 1e14) ** b, law[2][1])
    assert math.isnan(plot.jackknife([law[:1], law[1:2], law[2:3]]))  # of any two no law is to be had
    assert plot.jackknife([law, above, law]) < 1e-9 and math.isnan(plot.jackknife([law, above]))
    with pytest.raises(ValueError, match="three points on the envelope"):
        plot.power_law(law[:2] + [(c, 9.0) for c, _ in law])


def test_the_error_of_the_power_law_is_the_jackknifes():
    """Three runs, of which all points are on the envelope, by the formula: (n - 1) / n times the sum of squares."""
    runs = [[(1e12, 5.0), (2e12, 4.8)], [(4e12, 4.5), (8e12, 4.1)], [(1.6e13, 3.9), (3.2e13, 3.5)]]
    slopes = []
    for i in range(3):
        points = [p for j, run in enumerate(runs) if j != i for p in run]
        slopes.append(-linregress([math.log(c) for c, _ in points], [math.log(loss) for _, loss in points]).slope)
    assert math.isclose(plot.jackknife(runs), math.sqrt(2 / 3 * sum((b - sum(slopes) / 3) ** 2 for b in slopes)))


def test_parameters_of_the_ladder():
    """The share of a block's parameters that half the depth and half the width leave, by hand."""
    count = {}
    for name in ("half_depth", "two_thirds_width"):
        config = configure("train.py", ["config/crammed.py", f"--ablation={name}"])
        model = BERT(Config(**{k: config[k] for k in Config.__dataclass_fields__}))
        count[name] = sum(p.numel() for p in model.blocks.parameters() if p.ndim == 2)
    full = 16 * (4 * 768**2 + 768 * 3072 + 1536 * 768)
    assert count == {"half_depth": full // 2, "two_thirds_width": full * 4 // 9}
