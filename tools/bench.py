"""How fast this machine trains, prepares and fine-tunes, side by side with what else one would use, and what a run can copy.

python bench.py train [SHAPE ...]     full training steps, against BertForMaskedLM and ModernBertForMaskedLM of transformers
python bench.py prepare FOLDER        prepare.py, against raw encode_batch and against datasets.map
python bench.py finetune              examples/s, against a plain loop of transformers that pads to 128
python bench.py score RUN GLUE TASK   what such a loop scores on a task, from the run's model, to set beside RUN/glue.json
python bench.py copying RUN [RUN ...] val_loss, and the same where the second half of each row is its first half again

SHAPE is one of demo (4 x 256, vocabulary 8,192), small (12 x 384, 32,768) and crammed (16 x 768, 32,768). The candidates
take turns, so that a noisy machine is noisy for all of them; shown are medians and, in brackets, the extremes.
"""

import json
import os
import subprocess
import sys
import tempfile
import time
from collections import Counter
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from multiprocessing import get_context
from pathlib import Path
from statistics import median

import numpy as np
import torch

import train
from export_hf import export, load_run
from finetune_glue import batches, collate
from glue import METRICS, load_task
from hardware import peak_flops, pick_device, pick_dtype, repeatable
from model import BERT, Classifier, Config, flops_per_token

SHAPES = {  # layers, width, heads, vocabulary, rows in a micro-batch (on a GPU GPU_ROWS)
    "demo": (4, 256, 4, 8192, 64),
    "small": (12, 384, 6, 32768, 64),
    "crammed": (16, 768, 12, 32768, 32),
}
SEQ_LEN, REPEATS, GPU_ROWS = 128, 5, 256


def need_transformers():
    try:
        import transformers
    except ImportError:
        sys.exit("bench.py: needs `pip install transformers`")
    return transformers


def show(title, seconds, work, unit, base=None, memory=None):
    """One line: work per second, median [slowest, fastest], its ratio to `base`, and bytes."""
    rates = sorted(work / s for s in seconds)
    more = (f"   x {median(rates) / base:.2f}" if base else "") + (f"   {memory / 1e9:.2f} GB" if memory else "")
    print(f"  {title:<46} {median(rates):>11,.0f} [{rates[0]:,.0f}, {rates[-1]:,.0f}] {unit}{more}", flush=True)


def take_turns(candidates, repeats=REPEATS):
    """{name: seconds of each call}, after one call of each to warm up."""
    times = {name: [] for name in candidates}
    for i in range(repeats + 1):
        for name, run in candidates.items():
            start = time.monotonic()
            run()
            times[name] += [time.monotonic() - start] * (i > 0)
    return times


def synchronize(where):
    if where == "cuda":
        torch.cuda.synchronize()


def our_keys(shape):
    n_layer, width, heads, vocab, _ = shape
    return {"vocab_size": vocab, "n_layer": n_layer, "n_embd": width, "n_head": heads, "n_inner": 4 * width}


def our_config(keys):
    return Config(**{k: v for k, v in keys.items() if k in Config.__dataclass_fields__})


def our_step(keys, rows, micro, compile):
    """The full step of train.py for the keys of a recipe, with `rows` in a batch. It returns {part: seconds}."""
    vars(train).update({k: v for k, v in keys.items() if k in vars(train)})
    where, config = pick_device(keys.get("device", "auto")), our_config(keys)
    model = BERT(config).to(where)
    model.dtype = pick_dtype(where, keys.get("dtype", "auto"))
    vocab, T, generator = config.vocab_size, keys.get("seq_len", SEQ_LEN), torch.Generator(where).manual_seed(0)
    opts, data = train.make_optimizers(model), np.random.default_rng(0).integers(5, vocab, (1000, T)).astype(np.uint16)
    count = train.n_masked(T, max(train.mask_rate, train.mask_rate_end))  # as many logits as train.py computes
    forward = torch.compile(model, dynamic=False) if compile else model

    def step():
        times = [time.monotonic()]
        ids = train.next_rows(data, 0, rows, where)
        batch = train.mask_tokens(ids, count, 4, vocab, generator, train.mask_80_10_10)
        parts = [(i, train.flat(p, T), t.flatten()) for i, p, t in zip(*(x.split(micro) for x in batch))]
        synchronize(where)
        times.append(time.monotonic())
        for part in parts:
            (forward(*part) * (micro / rows)).backward()
        synchronize(where)
        times.append(time.monotonic())
        torch.nn.utils.clip_grad_norm_(model.parameters(), 0.5)
        for opt in opts:
            opt.step()
        model.zero_grad(set_to_none=True)
        synchronize(where)
        times.append(time.monotonic())
        return dict(zip(("data and masks", "forward and backward", "clip and optimizer"), np.diff(times)))

    return step


def their_step(shape, kind, where, dtype, compile):
    """A step of a model of transformers, its feed-forward as large as ours in parameters.

    ModernBERT's logits are at the masked positions alone, as ours; BertForMaskedLM knows only all of them.
    """
    transformers = need_transformers()
    n_layer, width, heads, vocab, rows = shape
    common = {"vocab_size": vocab, "hidden_size": width, "num_hidden_layers": n_layer, "num_attention_heads": heads}
    if kind == "Bert":
        rates = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}  # as ours
        config = transformers.BertConfig(**common, **rates, intermediate_size=3 * width, max_position_embeddings=SEQ_LEN)
    else:
        config = transformers.ModernBertConfig(
            **common,
            intermediate_size=2 * width,
            sparse_prediction=True,
            pad_token_id=0,
            bos_token_id=2,
            eos_token_id=3,
            cls_token_id=2,
            sep_token_id=3,
        )
    model = getattr(transformers, f"{kind}ForMaskedLM")(config).to(where, dtype).train()
    opt = torch.optim.AdamW(model.parameters(), lr=1e-4, fused=True)
    ids = torch.randint(5, vocab, (rows, SEQ_LEN), device=where)
    labels = ids.masked_fill(torch.rand(ids.shape, device=where) > 0.25, -100)
    mask = torch.ones_like(ids)
    forward = torch.compile(model, dynamic=False) if compile else model

    def step():
        forward(input_ids=ids, attention_mask=mask, labels=labels).loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 0.5)
        opt.step()
        opt.zero_grad(set_to_none=True)
        synchronize(where)

    return step


def begin(make, *args):
    global step
    step = make(*args)
    step()


def turn():
    """Seconds a step, over a second of them or more; what the last one returned; the most bytes so far.

    Bytes: what was allocated on a GPU; on a CPU the resident size of the process, some 0.4 GB of torch itself included.
    """
    start, n = time.monotonic(), 0
    while time.monotonic() < start + 1:
        parts, n = step(), n + 1
    seconds = (time.monotonic() - start) / n
    if torch.cuda.is_available():
        return seconds, parts, torch.cuda.max_memory_allocated()
    import resource  # which Windows lacks

    return seconds, parts, resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


def worker(make, *args):
    """A process of its own, so that none works with the memory and the settings of another."""
    return ProcessPoolExecutor(1, get_context("spawn"), begin, (make, *args))


def bench_train(names):
    need_transformers()
    where = pick_device("auto")
    best = pick_dtype(where, "auto")
    for name in names:
        shape = (*SHAPES[name][:4], GPU_ROWS) if where == "cuda" else SHAPES[name]
        rows, keys, tokens = shape[4], our_keys(shape), shape[4] * SEQ_LEN
        print(f"{name}: {shape[0]} x {shape[1]}, vocabulary {shape[3]:,}, {shape[4]} rows of {SEQ_LEN} a step")
        others = {"nanoCram, eager": (our_step, keys, rows, rows, False)}
        for kind in ("Bert", "ModernBert"):
            for dtype, compile in dict.fromkeys(((torch.float32, False), (best, False), (best, True))):  # best may be fp32
                label = f"{kind}ForMaskedLM, {str(dtype)[6:]}, {'compiled' if compile else 'eager'}"
                others[label] = (their_step, shape, kind, where, dtype, compile)
        turns, peaks = [], []
        with worker(our_step, keys, rows, rows, True) as ours:
            for label, candidate in others.items():
                rounds = []
                try:
                    with worker(*candidate) as theirs:
                        for _ in range(REPEATS):
                            peaks.append(peak_flops(where, best)[0])
                            turns.append(ours.submit(turn).result())
                            rounds.append(theirs.submit(turn).result())
                except BrokenProcessPool:
                    print(f"  {label}: its process ended, see above; out of memory?", flush=True)
                    continue
                base = median(t[0] for t in turns[-REPEATS:])
                show(label, [t[0] for t in rounds], tokens, "tokens/s", tokens / base, rounds[-1][2])
        show("nanoCram, compiled", [t[0] for t in turns], tokens, "tokens/s", None, turns[-1][2])
        step_time = median(sum(t[1].values()) for t in turns)
        shares = ", ".join(f"{part} {median(t[1][part] for t in turns) / step_time:.1%}" for part in turns[0][1])
        flops = tokens * flops_per_token(our_config(keys), SEQ_LEN, train.n_masked(SEQ_LEN, train.mask_rate))
        mfu = median(flops / t[0] / peak for t, peak in zip(turns, peaks))
        print(f"  of the compiled step: {shares}")
        print(f"  MFU {mfu:.0%} of {median(peaks) / 1e12:.2f} TFLOP/s in {str(best)[6:]}, {peak_flops(where, best)[1]}\n")


def relative_speeds(recipes):
    """{name: tokens/s as a share of the first one's} of {name: (keys, rows of a batch, rows of a micro-batch)}.

    One that does not run is not in the result.
    """
    (first, reference), *others = recipes.items()
    speeds = {first: 1.0}
    with worker(our_step, *reference, reference[0]["compile"]) as base:
        try:
            base.submit(turn).result()
        except BrokenProcessPool:
            sys.exit(f"{first}: does not run, and the speeds of the others are shares of its own")
        for name, recipe in others:
            try:
                with worker(our_step, *recipe, recipe[0]["compile"]) as other:
                    turns = [(base.submit(turn).result()[0], other.submit(turn).result()[0]) for _ in range(3 * REPEATS)]
            except BrokenProcessPool:
                print(f"{name}: does not run", flush=True)
                continue
            tokens = [rows * keys["seq_len"] for keys, rows, _ in (recipe, reference)]
            speeds[name] = median(a / b for a, b in turns) * tokens[0] / tokens[1]
            print(f"{name}: {speeds[name]:.2f} times the tokens/s of {first}", flush=True)
    return speeds


def bench_prepare(folder):
    """Text to bins with a given vocabulary, so that its training is in none of the figures."""
    from itertools import chain

    import datasets
    from tokenizers import Tokenizer

    from sources import read_documents

    here = Path(__file__).resolve().parent
    datasets.disable_progress_bars()
    texts = [text for text, _ in read_documents({"files": str(folder)}, 0, "blank_line", Counter())]
    size = sum(map(len, texts))
    with tempfile.TemporaryDirectory() as home:
        os.chdir(home)
        os.symlink(here / "config", "config")  # whose files begin with one another
        args = [sys.executable, here / "prepare.py", "config/cpu.py", f"--sources={Path(folder)}", "--max_chars=0"]
        if subprocess.run([*args, "--dataset=first"], stdout=subprocess.DEVNULL).returncode:
            sys.exit(1)
        path = Path(home, "data", "first", "tokenizer.json")
        tokenizer, runs = Tokenizer.from_file(str(path)), iter(range(100))

        def parallel():  # datasets.map leaves this at false, for this process and those it starts
            os.environ["TOKENIZERS_PARALLELISM"] = "true"

        def raw():
            parallel()
            for i in range(0, len(texts), 1000):
                tokenizer.encode_batch(texts[i : i + 1000], add_special_tokens=False)

        def ours():
            parallel()
            command = [*args, f"--dataset=d{next(runs)}", f"--tokenizer_file={path}"]
            subprocess.run(command, check=True, stdout=subprocess.DEVNULL)

        def tokenize(batch):
            return {"ids": [e.ids + [3] for e in tokenizer.encode_batch(batch["text"], add_special_tokens=False)]}

        def group(batch):
            ids = list(chain.from_iterable(batch["ids"]))
            return {"ids": [ids[i : i + SEQ_LEN] for i in range(0, len(ids) - SEQ_LEN + 1, SEQ_LEN)]}

        def usual():
            data = datasets.Dataset.from_dict({"text": texts})
            data = data.map(tokenize, batched=True, remove_columns="text", num_proc=os.cpu_count())
            data.map(group, batched=True, num_proc=os.cpu_count()).shuffle(seed=0).save_to_disk(
                Path(home, f"usual{next(runs)}")
            )

        print(f"prepare: {size / 1e6:.0f} M characters")
        times = take_turns({"tokenizers.encode_batch alone": raw, "prepare.py": ours, "datasets.map": usual}, repeats=2)
        os.chdir(here)
    base = median(size / s for s in times["tokenizers.encode_batch alone"])
    for label, seconds in times.items():
        show(label, seconds, size, "characters/s", base)


def bench_finetune():
    """Lengths as in GLUE's single sentences and pairs: most are short. Batches of 16, width 256."""
    transformers = need_transformers()
    where, rng = pick_device("auto"), np.random.default_rng(0)
    repeatable(where)  # as finetune_glue.py is; for the others too
    ids = {"pad": 0, "cls": 2, "sep": 3}
    rows = [[2, *rng.integers(5, 8192, max(int(n), 3)).tolist(), 3] for n in np.minimum(rng.gamma(3, 12, 1600), 120)]
    lengths = np.array([len(r) for r in rows])
    bert = BERT(Config(vocab_size=8192, n_layer=4, n_embd=256, n_head=4, n_inner=1024, dropout=0.1)).to(where)
    bert.dtype = pick_dtype(where, "auto")
    ours = Classifier(bert, 2).to(where).train()
    config = transformers.BertConfig(
        vocab_size=8192, hidden_size=256, num_hidden_layers=4, num_attention_heads=4, intermediate_size=768
    )
    theirs = {d: transformers.BertForSequenceClassification(config).to(where, d).train() for d in (torch.float32, bert.dtype)}

    def loop(model, logits):
        opt = torch.optim.AdamW(model.parameters(), lr=1e-5, fused=True)

        def epoch():
            for out, n in logits():
                torch.nn.functional.cross_entropy(out, torch.zeros(n, dtype=torch.long, device=where)).backward()
                opt.step()
                opt.zero_grad()
            synchronize(where)

        return epoch

    def bucketed():
        for index in batches(lengths, 16, rng):
            yield ours(*collate(rows, index, ids, where)), 16

    def padded(theirs):
        for start in range(0, len(rows), 16):
            some = rows[start : start + 16]
            tokens = torch.tensor([r + [0] * (SEQ_LEN - len(r)) for r in some], device=where)
            yield theirs(input_ids=tokens, attention_mask=(tokens != 0).long()).logits, len(some)

    print(f"fine-tuning, 4 x 256, batch 16, mean length {lengths.mean():.0f}")
    candidates = {f"finetune_glue.py, {str(bert.dtype)[6:]}": loop(ours, bucketed)}
    for dtype, model in theirs.items():
        candidates[f"transformers, padded to 128, {str(dtype)[6:]}"] = loop(model, lambda model=model: padded(model))
    times = take_turns(candidates, 3)
    base = median(len(rows) / s for s in times["transformers, padded to 128, float32"])
    for label, seconds in times.items():
        show(label, seconds, len(rows), "examples/s", base)


def bench_score(run, glue, name):
    """The exported model in a plain loop of transformers: shuffled, padded to glue_max_len, fp32; settings as in glue.json."""
    transformers, where = need_transformers(), pick_device("auto")
    card = json.loads(Path(run, "glue.json").read_text())["rows"] if Path(run, "glue.json").exists() else {}
    ours = card.get("run", {}).get(name)
    if not ours or name == "mnli":
        sys.exit(
            f"bench.py: {run}/glue.json has no score of {name} with one dev set; run finetune_glue.py --tasks={name} first"
        )
    print(f"finetune_glue.py: {name} {', '.join(f'{x:.1f}' for x in ours['scores'])}")
    task, setting = load_task(name, glue), {k.removeprefix("glue_"): v for k, v in ours["settings"].items()}
    (dev,), train = task.dev.values(), task.train
    if setting.get("optimizer") == "muon":
        sys.exit(f"bench.py: {run}/glue.json is of Muon, but this loop is of AdamW; score again with --glue_optimizer=adamw")
    if 0 < setting["max_train"] < len(train):
        train = [train[i] for i in np.random.default_rng(0).choice(len(train), setting["max_train"], replace=False)]
    size = setting["batch_size"]
    with tempfile.TemporaryDirectory() as home:
        folder = Path(home, "model")
        export(Path(run), folder)
        tokenizer = transformers.AutoTokenizer.from_pretrained(folder, trust_remote_code=True)
        more = {"trust_remote_code": True, "num_labels": len(task.labels) or 1}
        config = json.loads((folder / "config.json").read_text())
        if config["model_type"] == "nanocram":
            more |= {"pooling": setting["pooling"], "classifier_dropout": setting["dropout"]}
            more |= {"architecture": config["architecture"] | {"dropout": setting["dropout"]}}

        def inputs(examples):
            first, second = [e[0] for e in examples], [e[1] or "" for e in examples]
            common = {"padding": "max_length", "truncation": True, "max_length": setting["max_len"], "return_tensors": "pt"}
            return tokenizer(first, second, **common).to(where)

        for seed in range(len(ours["scores"])):
            torch.manual_seed(seed)
            model = transformers.AutoModelForSequenceClassification.from_pretrained(folder, **more).to(where)
            start, steps = time.monotonic(), setting["epochs"] * (len(train) // size)
            common = {"lr": setting["learning_rate"], "weight_decay": setting["weight_decay"]}
            opt = torch.optim.AdamW(model.parameters(), betas=(0.9, 0.98), eps=1e-6, fused=True, **common)
            schedule = transformers.get_cosine_schedule_with_warmup(opt, int(setting["warmup"] * steps), steps)
            for _ in range(setting["epochs"]):
                model.train()
                for index in torch.randperm(len(train))[: len(train) // size * size].split(size):
                    some = [train[i] for i in index]
                    model(**inputs(some), labels=torch.tensor([e[2] for e in some], device=where)).loss.backward()
                    opt.step()
                    schedule.step()
                    opt.zero_grad()
            seconds = time.monotonic() - start
            model.eval()
            with torch.no_grad():
                out = torch.cat([model(**inputs(dev[i : i + 64])).logits.cpu() for i in range(0, len(dev), 64)])
            found = out.argmax(-1) if task.labels else out[:, 0]
            score = METRICS[task.metric](found.numpy(), np.array([e[2] for e in dev]))
            rate = size * steps / seconds
            print(f"transformers, seed {seed}: {name} {score:.1f}, {seconds:.0f} s, {rate:.0f} examples/s", flush=True)


def bench_copying(runs):
    """Whether a model finds a masked token in what it has read: its loss on rows that say everything twice."""
    for run in runs:
        config, weights, _ = load_run(Path(run))
        _, rows, meta = train.load_bins(Path("data") / json.loads(Path(run, "config.json").read_text())["dataset"])
        model, where = BERT(config), pick_device("auto")
        model.load_state_dict(weights)
        half, mask_id = rows.shape[1] // 2, meta["special_ids"]["mask"]
        texts = rows, np.tile(rows[:, :half], 2)
        once, twice = (train.evaluate(model.to(where), text, mask_id, where)[0] for text in texts)
        print(f"{run}: val_loss {once:.3f}, where the second half of a row repeats the first {twice:.3f}", flush=True)


if __name__ == "__main__":
    what, rest = (sys.argv[1], sys.argv[2:]) if len(sys.argv) > 1 else ("", [])
    if what == "train" and set(rest) <= SHAPES.keys():
        bench_train(rest or ["demo", "small"])
    elif what == "prepare" and len(rest) == 1 and os.path.exists(rest[0]):
        bench_prepare(Path(rest[0]).resolve())
    elif what == "finetune" and not rest:
        bench_finetune()
    elif what == "score" and len(rest) == 3:
        bench_score(*rest)
    elif what == "copying" and rest:
        bench_copying(rest)
    else:
        sys.exit(__doc__.strip())
