import json
import math
import statistics
from pathlib import Path

import pytest
from conftest import TINY
from scipy.stats import linregress

import plot
from configurator import configure, run_file
from model import BERT, Config, require_possible

SMALL = [word for word in TINY if not word.startswith(("--out_dir", "--dataset"))] + ["--max_steps=6", "--eval_minutes=0.0001"]


def ablations():
    return run_file("config/ablations.py", **configure("train.py", ["config/crammed.py"]))


@pytest.mark.parametrize("scale", [[], ["--scale=cpu"]])
def test_every_ablation_is_a_model_and_a_training_that_exist(scale, home):
    """Each changes something, has folders of its own, and passes what train.py demands of a config."""
    base = configure("train.py", ["config/crammed.py", *scale])
    for name in ablations()["ablations"]:
        config = configure("train.py", ["config/crammed.py", *scale, f"--ablation={name}"])
        changed = {k for k in config if config[k] != base[k]}
        assert changed - {"out_dir", "dataset"}, name
        assert config["out_dir"] == f"{base['out_dir']}_{name}"
        assert (config["dataset"] != base["dataset"]) == (name in ablations()["data"]), name
        require_possible(Config(**{k: config[k] for k in Config.__dataclass_fields__}))
        micro = config["micro_batch_size"]
        assert config["batch_size"] % micro == 0 and (not config["batch_ramp"] or config["batch_ramp_rows"] % micro == 0), name


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
    size = {"quarter_depth": 4, "half_depth": 8, "double_depth": 32}
    assert all(configure("train.py", ["config/crammed.py", f"--ablation={k}"])["n_layer"] == v for k, v in size.items())


def test_the_order_of_words_is_the_order_of_meaning(home):
    c = configure("train.py", ["config/crammed.py", "--scale=cpu", "--ablation=half_depth", "--n_embd=32"])
    assert (c["n_layer"], c["n_embd"], c["out_dir"]) == (2, 32, "out/crammed_cpu_half_depth")
    with pytest.raises(SystemExit, match="'half_dept' is none of the ablations.*did you mean half_depth"):
        configure("train.py", ["config/crammed.py", "--ablation=half_dept"])


def test_a_sweep_runs_compares_survives_a_failure_and_goes_on(run, home):
    """Its table against the logs of its runs; fourier with rotary positions is refused, and the others go on."""
    words = ["crammed", "fourier", "unsorted", "vocab_half", "--seeds=2", "--out=out/s", *SMALL, "--position=rotary"]
    message, output = run("sweep.py", *[w for w in words if "vocab_size" not in w], "--vocab_size=90")
    assert message == "sweep.py: 1 of 4 entries failed: fourier; the same command tries them again"
    finals = []
    for seed in (1337, 1338):
        entries = [json.loads(line) for line in Path(f"out/s/crammed-{seed}/log.jsonl").read_text().splitlines()]
        finals.append([e["val_loss"] for e in entries if "val_loss" in e][-1])
    table = Path("out/s/table.md").read_text()
    assert table in output
    mean, sd = statistics.mean(finals), statistics.stdev(finals)
    assert f"| crammed | 2 | {mean:.3f} ± {sd:.3f} |" in table and sd > 0
    assert "| fourier | 0, train.py failed |" in table
    assert "(" not in table.split("unsorted")[1].split("\n")[0]  # the same tokenizer and val.bin
    assert Path("out/s/sweep.png").read_bytes()[:4] == b"\x89PNG"
    done = {p: p.stat().st_mtime_ns for p in Path("out/s").glob("*/model.pt")}
    assert len(done) == 6
    message, output = run("sweep.py", *[w for w in words if w != "fourier"])
    assert message is None and done == {p: p.stat().st_mtime_ns for p in Path("out/s").glob("*/model.pt")}
    runs = [f"out/s/{name}" for name in ("crammed-1337", "unsorted-1337")]
    assert run("plot.py", *runs, "--scaling", "--out=laws.png")[0] is None
    assert Path("laws.png").read_bytes()[:4] == b"\x89PNG"


def test_a_loss_of_another_tokenizer_stands_in_brackets(run, home):
    words = [word for word in SMALL if "vocab_size" not in word]
    message, output = run("sweep.py", "bert_base", "izsak", "--out=out/s", *words, "--vocab_size=90", "--table=True")
    assert message is None and "| bert_base | 0 |" in output  # runs nothing
    for name, vocabulary in (("crammed", 90), ("unsorted", 80)):
        assert run("sweep.py", name, "--out=out/s", *words, f"--vocab_size={vocabulary}")[0] is None
    table = run("sweep.py", "crammed", "unsorted", "--out=out/s", "--table=True")[1]
    assert "| unsorted | 1 | (" in table and "In brackets" in table


def test_mistakes_end_a_sweep_before_it_begins(run, home):
    assert "did you mean rotary" in run("sweep.py", "crammed", "rotari")[0]
    assert "no stage knows the key" in run("sweep.py", "crammed", "--learning_rat=1")[0]
    assert "python sweep.py crammed" in run("sweep.py")[0]
    assert not Path("out").exists()


def test_the_power_law_is_found_again():
    """Points on 5 (1e12 / C)^0.1 and others above it, which are not on the envelope."""
    law = [(c, 5 * (1e12 / c) ** 0.1) for c in (1e12, 1e13, 1e14, 1e15)]
    above = [(c * 2, loss + 0.5) for c, loss in law]
    c, b, error, envelope = plot.power_law(law + above)
    assert envelope == law and math.isclose(b, 0.1) and math.isclose((c / 1e14) ** b, law[2][1]) and error < 1e-9
    noisy = [(c, loss * f) for (c, loss), f in zip(law, (1, 1.01, 0.99, 1.01))]
    reference = linregress([math.log(c) for c, _ in noisy], [math.log(loss) for _, loss in noisy])
    assert math.isclose(plot.power_law(noisy)[2], reference.stderr)


def test_parameters_of_the_ladder():
    """The share of a block's parameters that half the depth and half the width leave, by hand."""
    count = {}
    for name in ("half_depth", "half_width"):
        config = configure("train.py", ["config/crammed.py", f"--ablation={name}"])
        model = BERT(Config(**{k: config[k] for k in Config.__dataclass_fields__}))
        count[name] = sum(p.numel() for p in model.blocks.parameters() if p.ndim == 2)
    full = 16 * (4 * 768**2 + 768 * 3072 + 1536 * 768)
    assert count == {"half_depth": full // 2, "half_width": full // 4}
