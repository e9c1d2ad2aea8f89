import math
import re
from collections import Counter

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from conftest import ROOT, TINY_MODEL
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.utils.flop_counter import FlopCounterMode

import model as M
from model import BERT, Classifier, Config, flops_per_token
from nanocram.configurator import resolve
from nanocram.optim import make_optimizers

keys = resolve("train.py", TINY_MODEL)
tiny = {name: keys[name] for name in Config.__dataclass_fields__} | {"vocab_size": 50}


def bert(**changes):
    torch.manual_seed(0)
    return BERT(Config(**tiny | changes))


def test_the_crammed_bert_has_the_papers_size():
    with torch.device("meta"):
        model = BERT(Config())
    sizes = {name: p.numel() for name, p in model.named_parameters()}
    assert sum(sizes.values()) == 119_589_889
    D, layers, inner, vocab = 768, 16, 3072, 32768
    block = 4 * D * D + D * inner + inner // 2 * D + 4 * D
    assert sum(sizes.values()) == vocab * D + layers * block + 4 * D + 1
    assert not [n for n in sizes if n.endswith("bias") and "norm" not in n]


def test_init():
    model = bert(n_embd=128, n_inner=256, vocab_size=500)
    for name, p in model.named_parameters():
        if p.ndim == 2:
            assert abs(p.std() - 0.02) < 0.002 and abs(p.mean()) < 0.002, name
        else:
            expected = 128**-0.5 if name == "position_scale" else float(name.endswith("weight"))
            assert torch.allclose(p, torch.full_like(p, expected)), name


def test_sinusoid_is_the_formula():
    table = M.sinusoid(50, 12)
    for pos, i in [(0, 0), (7, 3), (49, 5)]:
        angle = pos / 10000 ** (2 * i / 12)
        assert table[pos, 2 * i].item() == pytest.approx(math.sin(angle), abs=1e-5)
        assert table[pos, 2 * i + 1].item() == pytest.approx(math.cos(angle), abs=1e-5)


def test_rotary_against_transformers():
    from transformers import LlamaConfig
    from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding, apply_rotary_pos_emb

    theirs = LlamaRotaryEmbedding(
        LlamaConfig(hidden_size=64, num_attention_heads=4, rope_theta=1000.0)
    )
    q, k = torch.randn(2, 4, 10, 16), torch.randn(2, 4, 10, 16)
    expected = apply_rotary_pos_emb(q, k, *theirs(q, torch.arange(10)[None]))
    tables = M.rotary_tables(10, 16, theirs.config.rope_parameters["rope_theta"])
    for x, y in zip((q, k), expected):
        assert torch.allclose(M.rotate(x, *tables), y, atol=1e-5)


def test_attention_on_a_cpu_is_sdpa():
    q, k, v = torch.randn(3, 2, 4, 9, 8).unbind()
    mask = torch.rand(2, 1, 1, 9) < 0.7
    mask[..., 0] = True
    for m in (None, mask):
        expected = F.scaled_dot_product_attention(q, k, v, attn_mask=m)
        assert torch.allclose(M.attend(q, k, v, m, 0.0), expected, atol=1e-6)


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"position": "rotary", "rotary_base": 50.0},
        {"position": "rotary", "qk_norm": True},
        {"position": "rotary", "qk_norm": True, "neighbour_keys": True, "rotary_base": 50.0},
        {"embedding_skip": True},
        {"value_residual": True},
    ],
)
def test_the_whole_model_against_a_second_one(changes):
    """The recipe written a second time, with torch's own modules and the model's weights."""
    model = bert(**changes)
    base = changes.get("rotary_base", 10000.0)
    if "embedding_skip" in changes:
        assert model.stream_scale.tolist() == [1.0, 1.0] and model.skip_scale.tolist() == [0.0, 0.0]
        model.stream_scale.data = torch.tensor([0.5, 2.0])
        model.skip_scale.data = torch.tensor([0.25, -1.0])
    if "value_residual" in changes:
        assert [block.value_scale.tolist() for block in model.blocks] == [[0.5, 0.5]] * 2
        model.blocks[0].value_scale.data = torch.tensor([2.0, 1.5])
        model.blocks[1].value_scale.data = torch.tensor([-0.5, 3.0])
    ids = torch.randint(50, (3, 11))
    w = dict(model.named_parameters())
    D, H = 32, 2
    x = F.embedding(ids, w["embedding.weight"])
    if "position_scale" in w:
        x = x + w["position_scale"] * M.sinusoid(64, D)[:11]

    def norm(x, name):
        return F.layer_norm(x, (D,), w[name + ".weight"], w[name + ".bias"], 1e-12)

    def beside(t):
        found = torch.zeros_like(t)
        found[..., :8] = M.rotate(t[..., :8], *M.rotary_tables(11, 8, base))
        for i in range(10):
            found[:, :, i + 1, 8:12] = t[:, :, i, 8:12]
            found[:, :, i, 12:] = t[:, :, i + 1, 12:]
        return found

    embedded = x = norm(x, "embedding_norm")
    first = None
    for i in range(2):
        b = f"blocks.{i}."
        if "embedding_skip" in changes:
            x = w["stream_scale"][i] * x + w["skip_scale"][i] * embedded
        q, k, v = (
            t.view(3, 11, H, D // H).transpose(1, 2)
            for t in (norm(x, b + "norm1") @ w[b + "attention.qkv.weight"].T).split(D, -1)
        )
        if "value_residual" in changes:
            first = v if first is None else first
            v = 3.5 * v if i == 0 else 3.0 * first - 0.5 * v
        if "qk_norm" in changes:
            q, k = (
                t / (t.square().mean(-1, keepdim=True) + torch.finfo(t.dtype).eps).sqrt()
                for t in (q, k)
            )
        if "neighbour_keys" in changes:
            q, k = beside(q), beside(k)
        elif "position" in changes:
            q, k = (M.rotate(t, *M.rotary_tables(11, D // H, base)) for t in (q, k))
        y = torch.softmax(q @ k.transpose(2, 3) / math.sqrt(D // H), -1) @ v
        x = x + y.transpose(1, 2).reshape(3, 11, D) @ w[b + "attention.out.weight"].T
        h = norm(x, b + "norm2") @ w[b + "feed_forward.up.weight"].T
        x = x + (h[..., :32] * F.gelu(h[..., 32:])) @ w[b + "feed_forward.down.weight"].T
    expected = norm(x, "final_norm") @ w["embedding.weight"].T
    positions = torch.tensor([0, 5, 12, 32])
    assert torch.allclose(model(ids, positions), expected.view(33, 50)[positions], atol=1e-5)
    loss = model(ids, positions, torch.tensor([1, 2, 3, 4]))
    assert loss.item() == pytest.approx(
        -expected.view(33, 50)[positions].log_softmax(-1)[range(4), [1, 2, 3, 4]].mean().item(),
        abs=1e-5,
    )


POSITIONS = [
    {"position": "scaled_sinusoidal"},
    {"position": "rotary"},
    {"position": "rotary", "neighbour_keys": True},
]


@settings(max_examples=20, deadline=None)
@given(
    st.sampled_from(POSITIONS), st.booleans(), st.lists(st.integers(1, 12), min_size=1, max_size=4)
)
def test_padding_changes_nothing(position, qk_norm, lengths):
    model = bert(**position, qk_norm=qk_norm).eval()
    ids = torch.randint(50, (len(lengths), max(lengths) + 3))
    mask = torch.arange(ids.size(1)) < torch.tensor(lengths)[:, None]
    together = model.encode(ids, mask)
    for i, n in enumerate(lengths):
        assert torch.allclose(together[i, :n], model.encode(ids[i : i + 1, :n])[0], atol=1e-5)


def test_order_matters_with_either_kind_of_positions():
    for position in ("scaled_sinusoidal", "rotary"):
        model = bert(position=position)
        for block in model.blocks:
            # as after training: at the init attention is nearly uniform
            block.attention.qkv.weight.data *= 20
        ids = torch.randint(50, (1, 12))
        there = model.encode(ids)[0]
        back = model.encode(ids.flip(1))[0].flip(0)
        assert not torch.allclose(there, back, atol=1e-3)


NANOCRAM = {
    "position": "rotary",
    "qk_norm": True,
    "neighbour_keys": True,
    "value_residual": True,
    "embedding_skip": True,
}


@pytest.mark.parametrize(
    "changes", [{}, {"position": "rotary"}, {**NANOCRAM, "embedding_skip": False, "n_layer": 2}]
)
def test_compiled_bf16_gradients(changes):
    """Compare a compiled bf16 step with eager fp32, parameter by parameter.

    Without embedding_skip: the norms after it leave its factors a gradient near 0, which in bf16 is
    noise, compiled or not.
    """
    size = {"n_embd": 128, "n_inner": 256, "n_layer": 1, "max_len": 128, "vocab_size": 200}
    model = bert(**size | changes)
    ids, targets = torch.randint(200, (16, 128)), torch.randint(200, (16 * 32,))
    batch = ids, torch.arange(0, 16 * 128, 4), targets
    gradients = []
    compiled = torch.compile(model, dynamic=False)
    for forward, dtype in ((model, torch.float32), (compiled, torch.bfloat16)):
        model.dtype = dtype
        forward(*batch).backward()
        gradients.append({n: p.grad for n, p in model.named_parameters()})
        model.zero_grad(set_to_none=True)
    for name, expected in gradients[0].items():
        assert (gradients[1][name] - expected).norm() < 0.05 * expected.norm() + 1e-6, name


def test_dropout_keeps_the_mean_and_drops_the_share():
    x = torch.ones(1003, 331)
    y = M.dropout(x, 0.1, True)
    assert abs((y == 0).float().mean() - 0.1) < 0.005 and abs(y.mean() - 1) < 0.005
    assert y.unique().tolist() == pytest.approx([0, 1 / 0.9])
    assert M.dropout(x, 0.1, False) is x
    # the four values of one draw are independent
    noise = M.dropout(torch.ones(40_000, 4), 0.5, True) > 0
    assert abs(torch.corrcoef(noise.T.float()) - torch.eye(4)).max() < 0.03


@pytest.mark.parametrize("changes", [{}, {"n_layer": 3, "n_inner": 96, "n_head": 4}])
def test_flops_against_torchs_counter(changes):
    model, T, B, k = bert(**changes, n_embd=64), 32, 4, 8
    ids, positions = torch.randint(50, (B, T)), torch.arange(B * k)
    with FlopCounterMode(display=False) as counter:
        model(ids, positions, torch.randint(50, (B * k,))).backward()
    assert flops_per_token(model.config, T, k) * B * T == pytest.approx(
        counter.get_total_flops(), rel=0.02
    )


@pytest.mark.parametrize("pooling", ["first", "mean"])
@pytest.mark.parametrize("n_classes", [1, 3])
def test_classifier(pooling, n_classes):
    model = Classifier(bert(), n_classes, pooling).eval()
    ids, mask = torch.randint(50, (2, 8)), torch.ones(2, 8, dtype=torch.bool)
    mask[1, 5:] = False
    hidden = model.bert.encode(ids, mask)
    pooled = (
        hidden[:, 0]
        if pooling == "first"
        else torch.stack([hidden[0].mean(0), hidden[1, :5].mean(0)])
    )
    expected = (
        torch.tanh(pooled @ model.pooler.weight.T + model.pooler.bias) @ model.head.weight.T
        + model.head.bias
    )
    assert model(ids, mask).shape == (2, n_classes)
    assert torch.allclose(model(ids, mask), expected, atol=1e-6)
    assert model.pooler.weight.shape == (1024, 32)
    for layer in (model.pooler, model.head):
        assert layer.weight.std().item() == pytest.approx(0.02, rel=0.1) and not layer.bias.any()


def test_impossible_models_are_refused():
    for changes, what in [
        ({"n_head": 5}, "divisible"),
        ({"n_inner": 65}, "even"),
        ({"position": "rotary", "n_head": 32}, "even"),
        ({"position": "rotary", "attention": "fourier"}, "has none"),
        ({"qk_norm": True, "attention": "flash"}, "qk_norm is for attention=softmax"),
        ({"qk_norm": True, "attention": "fourier"}, "qk_norm is for attention=softmax"),
        ({"value_residual": True, "attention": "flash"}, "value_residual is for attention=softmax"),
        ({"neighbour_keys": True}, "neighbour_keys needs rotary positions and softmax"),
        (
            {"neighbour_keys": True, "position": "rotary", "attention": "flash"},
            "neighbour_keys needs rotary positions",
        ),
        ({"neighbour_keys": True, "position": "rotary", "n_head": 16}, "divisible by 4, not 2"),
        ({"attention": "flash", "norm_place": "post"}, "norm_place=pre only"),
        ({"attention": "flash", "glu": False}, "gated"),
    ]:
        with pytest.raises(ValueError, match=what):
            bert(**changes)
    with pytest.raises(ValueError, match="65 tokens is longer than max_len = 64"):
        bert().encode(torch.zeros(1, 65, dtype=torch.long))


# --------------------------------------------------------------------------------------------------
# The switches


SWITCHES = [
    {"norm": "rmsnorm"},
    {"norm_place": "post", "final_norm": False},
    {"bias": True, "decoder_bias": True, "head_transform": True},
    {"activation": "relu", "glu": False},
    {"activation": "relu2"},
    {"position": "learned", "token_types": 2},
    {"position": "sinusoidal"},
    {"position": "none", "embedding_norm": False},
    {"attention": "fourier"},
    {"attention": "flash"},
    {"attention": "flash", "position": "rotary"},
    {"tie_weights": False},
    NANOCRAM,
]


def label(changes):
    return ",".join(f"{k}={v}" for k, v in changes.items())


@pytest.mark.parametrize("changes", [{}, *SWITCHES], ids=label)
def test_weights_decay_by_name(changes):
    """Every matrix and embedding decays, and nothing else: by the names, as others choose them."""
    model = bert(**changes)
    names = {id(p): name for name, p in model.named_parameters()}
    settings = {"learning_rate": 1e-3, "weight_decay": 0.01, "betas": (0.9, 0.98), "eps": 1e-12}
    (adamw,) = make_optimizers(model, "adamw", **settings)
    decay, exempt = ({names[id(p)] for p in group["params"]} for group in adamw.param_groups)
    assert [group["weight_decay"] for group in adamw.param_groups] == [0.01, 0.0]
    matrix = re.compile(r"(embedding|qkv|out|qk|up|down|transform|decoder)\.weight")
    assert decay == {name for name in names.values() if matrix.search(name)}
    assert decay | exempt == set(names.values())
    assert all(re.search(r"norm|bias|scale|offset", name) for name in exempt)
    adam, muon = make_optimizers(model, "muon", **settings)
    parts = {names[id(p)]: group["parts"] for group in muon.param_groups for p in group["params"]}
    assert parts.keys() == {name for name in decay if name.startswith("blocks.")}
    assert all(
        n == (3 if "qkv" in name else 2 if "up" in name and model.config.glu else 1)
        for name, n in parts.items()
    )
    rest = {names[id(p)] for group in adam.param_groups for p in group["params"]}
    assert parts.keys() | rest == set(names.values())


@pytest.mark.parametrize("changes", SWITCHES, ids=label)
def test_every_switch_learns_and_has_gradients_everywhere(changes):
    """Every parameter of a switch gets a gradient, and a few steps on one batch lower the loss."""
    model = bert(**changes)
    ids = torch.randint(50, (4, 16))
    batch = ids, torch.arange(0, 64, 2), ids.flatten()[::2]
    opt = torch.optim.Adam(model.parameters(), lr=3e-3)
    losses = []
    for _ in range(60):
        loss = model(*batch)
        loss.backward()
        missing = [
            n for n, p in model.named_parameters() if p.grad is None or not p.grad.abs().sum() > 0
        ]
        # relu^2 may be dead for one step
        assert not [n for n in missing if "qk_" not in n], missing
        opt.step()
        opt.zero_grad()
        losses.append(loss.item())
    assert losses[-1] < 0.5 * losses[0]


@pytest.mark.parametrize(
    "changes", [c for c in SWITCHES if c.get("attention") != "fourier"], ids=label
)
def test_padding_changes_nothing_with_any_switch(changes):
    model = bert(**changes).eval()
    ids, mask = torch.randint(50, (2, 14)), torch.ones(2, 14, dtype=torch.bool)
    mask[1, 9:] = False
    together = model.encode(ids, mask)
    assert torch.allclose(together[1, :9], model.encode(ids[1:, :9])[0], atol=1e-5)


def test_fourier_against_scipy():
    """The authors' form: an orthonormal transform over tokens and channels, then a projection."""
    import scipy.fft

    x = torch.randn(3, 10, 32)
    mixing = bert(attention="fourier").blocks[0].attention
    found, _ = mixing(x, None, None, None, None)
    mixed = scipy.fft.fft2(x.numpy(), axes=(1, 2), norm="ortho").real
    assert np.linalg.norm(mixed) == pytest.approx(x.norm().item(), rel=0.5)  # as large as its input
    expected = mixed @ mixing.out.weight.detach().numpy().T
    assert np.allclose(found.detach().numpy(), expected, rtol=1e-4, atol=1e-7)


def plain_gated_attention_unit(unit, x, n_real, max_len):
    """Return the output for one row (T, D) by loops: Hua et al. 2022, equations 1 to 7, in float64.

    Only the first n_real tokens are text.
    """
    weights = {name: p.detach().double() for name, p in unit.named_parameters()}
    x = x.double()
    silu = torch.nn.SiLU()
    value, gate = silu(x @ weights["up.weight"].T).chunk(2, -1)
    shared = silu(x @ weights["qk.weight"].T)
    scale, offset = weights["qk_scale"].view(2, -1), weights["qk_offset"].view(2, -1)
    q, k = shared * scale[0] + offset[0], shared * scale[1] + offset[1]
    rows = []
    for i in range(len(x)):
        total = torch.zeros_like(value[0])
        for j in range(n_real):
            b = weights["distance_bias"][max_len - 1 + j - i]
            total += max(float(q[i] @ k[j]) / n_real + float(b), 0.0) ** 2 * value[j]
        rows.append(gate[i] * total)
    return torch.stack(rows) @ weights["down.weight"].T


def test_gated_attention_unit_against_loops():
    """By rtol: the output of a new unit is tiny. Scaled up, queries and keys count as b does."""
    unit = bert(attention="flash").blocks[0].attention
    assert len(unit.distance_bias) == 2 * 64 - 1
    with torch.no_grad():
        unit.qk_offset.normal_(std=0.05)
    x = torch.randn(2, 7, 32)
    mask = torch.ones(2, 7, dtype=torch.bool)
    mask[1, 5:] = False
    found, _ = unit(x, mask, None, None, None)
    for row, n_real in ((0, 7), (1, 5)):
        expected = plain_gated_attention_unit(unit, x[row], n_real, 64)[:n_real]
        assert torch.allclose(found[row, :n_real].double(), expected, rtol=1e-3, atol=1e-12)
        assert expected.abs().max() > 1e-7
    with torch.no_grad():
        unit.distance_bias.zero_()
    without, _ = unit(x, mask, None, None, None)
    assert (without - found).norm() > 0.01 * found.norm()


@pytest.mark.parametrize("zeroed", [False, True])
def test_the_gated_attention_unit_learns_from_neighbours(zeroed):
    """In each row a masked word is the one after its left neighbour; without mixing, no one knows.

    zeroed: the same model, the same steps, but the output of the mixing branch is zero.
    """
    model = bert(attention="flash", n_layer=1, position="none")
    if zeroed:
        for block in model.blocks:
            block.attention.register_forward_hook(lambda module, x, y: (y[0] * 0, y[1]))
    opt = torch.optim.AdamW(model.parameters(), lr=3e-3)
    generator = torch.Generator().manual_seed(0)
    losses = []
    for _ in range(300):
        ids = torch.randint(5, 15, (32, 12), generator=generator)
        ids[:, 1::2] = ids[:, ::2] + 20  # every second word is told by the one before
        masked = ids.clone()
        masked[:, 5] = 4
        loss = model(masked, torch.arange(32) * 12 + 5, ids[:, 5])
        loss.backward()
        opt.step()
        opt.zero_grad()
        losses.append(loss.item())
    final = np.mean(losses[-10:])
    assert final > 2.2 if zeroed else final < 0.5, final  # log 10 = 2.303 is a guess


def test_norms_and_activations_against_torch():
    x = torch.randn(4, 32)
    norm = M.make_norm(Config(**tiny | {"norm": "rmsnorm"}))
    expected = x / (x.square().mean(-1, keepdim=True) + 1e-12).sqrt()
    assert torch.allclose(norm(x), expected, atol=1e-6)
    gated = bert().blocks[0].feed_forward
    value, gate = (x @ gated.up.weight.T).chunk(2, -1)
    geglu = value * torch.nn.GELU()(gate)
    assert torch.allclose(gated(x), geglu @ gated.down.weight.T, atol=1e-6)
    plain = bert(glu=False, activation="relu2").blocks[0].feed_forward
    expected = (x @ plain.up.weight.T).clamp(min=0) ** 2 @ plain.down.weight.T
    assert torch.allclose(plain(x), expected, atol=1e-6)


@pytest.mark.parametrize("name, expected", [("bert_base", 109_514_298), ("izsak", None)])
def test_sizes_of_the_published_models(name, expected, monkeypatch):
    """BERT-base has 109,514,298 parameters, without its pooler and next-sentence head.

    That is with a vocabulary of 30,522.
    """
    monkeypatch.chdir(ROOT)
    config = resolve("train.py", [f"config/{name}.py"])
    c = Config(**{k: config[k] for k in Config.__dataclass_fields__} | {"vocab_size": 30522})
    with torch.device("meta"):
        n = sum(p.numel() for p in BERT(c).parameters())
    D = c.n_embd
    block = 4 * D * D + 4 * D + 2 * D * c.n_inner + c.n_inner + D + 4 * D
    embeddings = (30522 + c.max_len + c.token_types) * D + 2 * D
    assert n == embeddings + c.n_layer * block + D * D + 3 * D + 30522
    assert expected in (None, n)


@pytest.mark.parametrize("changes", SWITCHES, ids=label)
def test_flops_of_every_switch(changes):
    model, T, B, k = bert(**changes), 32, 4, 8
    with FlopCounterMode(display=False) as counter:
        ids, targets = torch.randint(50, (B, T)), torch.randint(50, (B * k,))
        model(ids, torch.arange(0, B * T, T // k), targets).backward()
    assert flops_per_token(model.config, T, k) * B * T == pytest.approx(
        counter.get_total_flops(), rel=0.02
    )


@pytest.mark.parametrize("changes", SWITCHES, ids=label)
def test_what_is_not_computed_is_not_needed(changes):
    """Logits at some positions, and their gradients, are those of a model that computes all."""
    model = bert(**changes).eval()
    ids, positions = torch.randint(50, (2, 8)), torch.tensor([3, 1, 8, 15])
    everywhere = model.logits(model.encode(ids)).flatten(0, 1)
    weights = list(model.parameters())
    found = [model(ids, positions), everywhere[positions]]
    gradients = [torch.autograd.grad(x.square().sum(), weights, allow_unused=True) for x in found]
    assert torch.allclose(*found, atol=1e-6)
    for x, y in zip(*gradients):
        assert x is y is None or torch.allclose(x, y, rtol=1e-4, atol=1e-5)


def test_one_graph_and_no_recompilation_with_a_batch_ramp():
    """A step is compiled once: evaluations and other micro-batch counts change nothing."""
    from torch._dynamo.testing import CompileCounter

    counter = CompileCounter()
    model = bert()
    step = torch.compile(model, backend=counter, dynamic=False)
    for n_micro in (1, 3, 2):
        for _ in range(n_micro):
            ids, targets = torch.randint(50, (4, 16)), torch.randint(50, (16,))
            step(ids, torch.arange(0, 64, 4), targets).backward()
        model.eval()
        with torch.no_grad():
            model(torch.randint(50, (7, 16)), torch.arange(0, 112, 16))
        model.train()
    assert counter.frame_count == 1


def test_switches_leave_nothing_in_the_compiled_default():
    """The operations of the crammed BERT, counted by hand.

    Views, casts and dropouts of p = 0, which go later, do not count.
    """
    names = Counter()

    def backend(graph, inputs):
        for node in graph.graph.nodes:
            if node.op.startswith("call"):
                names[getattr(node.target, "__name__", node.target)] += 1
        return graph.forward

    model = bert(n_layer=3)
    torch.compile(model, backend=backend, dynamic=False)(
        torch.randint(50, (4, 16)), torch.arange(16), torch.randint(50, (16,))
    )
    for free in "getitem view reshape flatten permute transpose to float dropout".split():
        names.pop(free, None)
    work = {
        "index_select": 2,
        "layer_norm": 3 * 2 + 2,
        "linear": 3 * 5 + 1,
        "matmul": 3 * 2,
        "softmax": 3,
        "gelu": 3,
    }
    # positions and residuals; position_scale, 1 / sqrt(width) and the gate
    sums = {"add": 1 + 3 * 2, "mul": 1 + 3 * 2}
    assert names == work | sums | {"cross_entropy": 1}


def test_dropout_is_on_embeddings_attention_and_residuals(monkeypatch):
    seen, model = [], bert(dropout=0.1)
    monkeypatch.setattr(M, "dropout", lambda x, p, training: seen.append((p, training)) or x)
    ids = torch.randint(50, (2, 8))
    model.train().encode(ids)
    assert seen == [(0.1, True)] * 7  # 1 + 2 layers x (attention + 2 residuals)
    seen.clear()
    model.eval().encode(ids)
    assert not any(p and training for p, training in seen)
    Classifier(model, 2, dropout=0.3).train()(ids, torch.ones_like(ids, dtype=torch.bool))
    assert seen[-1] == (0.3, True)


def test_a_segment_beyond_the_last_is_the_last():
    model = bert(token_types=2)
    ids = torch.randint(50, (2, 8))
    last = model.encode(ids, types=torch.ones_like(ids))
    assert torch.equal(model.encode(ids, types=torch.full_like(ids, 5)), last)
    assert not torch.equal(model.encode(ids), last)


# --------------------------------------------------------------------------------------------------
# The model of a finished run


def save(folder, model, rename=lambda name: name):
    weights = {rename(name): tensor for name, tensor in model.state_dict().items()}
    torch.save({"config": vars(model.config), "model": weights}, folder / "model.pt")


@pytest.mark.parametrize("changes", [{}, NANOCRAM], ids=label)
def test_a_model_with_the_old_names_loads(changes, tmp_path):
    """Until the sublayers were modules, the block held their parameters: `blocks.0.qkv.weight`."""
    model = bert(**changes)
    save(tmp_path, model, lambda name: re.sub(r"attention\.|feed_forward\.", "", name))
    names = torch.load(tmp_path / "model.pt", weights_only=True)["model"].keys()
    assert "blocks.0.up.weight" in names and not any("attention" in name for name in names)
    ids, positions = torch.randint(50, (2, 9)), torch.tensor([1, 8, 17])
    assert torch.equal(BERT.from_run(tmp_path)(ids, positions), model(ids, positions))


@pytest.mark.parametrize(
    "attention, new", [("fourier", "attention.out.weight"), ("flash", "attention.distance_bias")]
)
def test_a_model_from_before_a_parameter_is_refused_by_its_name(attention, new, tmp_path):
    model = bert(attention=attention)
    weights = {k: v for k, v in model.state_dict().items() if not k.endswith(new)}
    torch.save({"config": vars(model.config), "model": weights}, tmp_path / "model.pt")
    with pytest.raises(ValueError, match=f"other parameters .blocks.0.{new}.") as error:
        BERT.from_run(tmp_path)
    assert "\n" not in str(error.value)


def test_a_model_of_a_run(tmp_path):
    """Segments that pretraining has not seen begin as the first, and fields can be replaced."""
    model = bert(token_types=3)
    save(tmp_path, model)
    found = BERT.from_run(tmp_path, dropout=0.1)
    assert vars(found.config) == vars(model.config) | {"dropout": 0.1} and model.config.dropout == 0
    segments = found.state_dict().pop("type_embedding.weight")
    assert torch.equal(segments, model.type_embedding.weight[:1].expand(3, -1))
    for name, weight in model.state_dict().items():
        assert name == "type_embedding.weight" or torch.equal(found.state_dict()[name], weight)


def test_a_run_without_a_model_is_refused_in_one_line(tmp_path):
    missing = "model.pt does not exist; run train.py first"
    with pytest.raises(FileNotFoundError, match=missing) as error:
        BERT.from_run(tmp_path)
    assert "\n" not in str(error.value)
    (tmp_path / "model.pt").write_bytes(b"PK broken")
    other = {"config": {"layers": 2}, "model": {}}
    empty = {"config": tiny, "model": {}}
    damaged = r"model.pt cannot be read \(damaged, of another version\?\): \w+Error: "
    for content in (None, other, empty):
        if content:
            torch.save(content, tmp_path / "model.pt")
        with pytest.raises(ValueError, match=damaged) as error:
            BERT.from_run(tmp_path)
        assert "\n" not in str(error.value)
