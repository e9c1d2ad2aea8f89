import math

import pytest
import torch
import torch.nn.functional as F
from conftest import TINY_MODEL
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.utils.flop_counter import FlopCounterMode

import model as M
from configurator import configure
from model import BERT, Classifier, Config, flops_per_token

tiny = {k: v for k, v in configure("train.py", TINY_MODEL).items() if k in Config.__dataclass_fields__} | {"vocab_size": 50}


def bert(**changes):
    torch.manual_seed(0)
    return BERT(Config(**tiny | changes))


def test_the_crammed_bert_has_the_papers_size():
    with torch.device("meta"):
        model = BERT(Config())
    sizes = {name: p.numel() for name, p in model.named_parameters()}
    assert sum(sizes.values()) == 119_589_889
    D, layers, inner, vocab = 768, 16, 3072, 32768
    assert sum(sizes.values()) == vocab * D + layers * (4 * D * D + D * inner + inner // 2 * D + 4 * D) + 4 * D + 1
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

    theirs = LlamaRotaryEmbedding(LlamaConfig(hidden_size=64, num_attention_heads=4, rope_theta=1000.0))
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
        assert torch.allclose(M.attend(q, k, v, m, 0.0), F.scaled_dot_product_attention(q, k, v, attn_mask=m), atol=1e-6)


@pytest.mark.parametrize("changes", [{}, {"position": "rotary"}, {"position": "rotary", "qk_norm": True}])
def test_the_whole_model_against_a_second_one(changes):
    """The recipe written a second time, with torch's own modules and the model's weights."""
    model = bert(**changes)
    ids = torch.randint(50, (3, 11))
    w = dict(model.named_parameters())
    D, H = 32, 2
    x = F.embedding(ids, w["embedding.weight"])
    if "position_scale" in w:
        x = x + w["position_scale"] * M.sinusoid(64, D)[:11]

    def norm(x, name):
        return F.layer_norm(x, (D,), w[name + ".weight"], w[name + ".bias"], 1e-12)

    x = norm(x, "embedding_norm")
    for i in range(2):
        b = f"blocks.{i}."
        q, k, v = (
            t.view(3, 11, H, D // H).transpose(1, 2) for t in (norm(x, b + "norm1") @ w[b + "qkv.weight"].T).split(D, -1)
        )
        if "qk_norm" in changes:
            q, k = (t / (t.square().mean(-1, keepdim=True) + torch.finfo(t.dtype).eps).sqrt() for t in (q, k))
        if "position" in changes:
            q, k = (M.rotate(t, *M.rotary_tables(11, D // H, 10000.0)) for t in (q, k))
        y = torch.softmax(q @ k.transpose(2, 3) / math.sqrt(D // H), -1) @ v
        x = x + y.transpose(1, 2).reshape(3, 11, D) @ w[b + "out.weight"].T
        h = norm(x, b + "norm2") @ w[b + "up.weight"].T
        x = x + (h[..., :32] * F.gelu(h[..., 32:])) @ w[b + "down.weight"].T
    expected = norm(x, "final_norm") @ w["embedding.weight"].T
    positions = torch.tensor([0, 5, 12, 32])
    assert torch.allclose(model(ids, positions), expected.view(33, 50)[positions], atol=1e-5)
    loss = model(ids, positions, torch.tensor([1, 2, 3, 4]))
    assert loss.item() == pytest.approx(
        -expected.view(33, 50)[positions].log_softmax(-1)[range(4), [1, 2, 3, 4]].mean().item(), abs=1e-5
    )


@settings(max_examples=20, deadline=None)
@given(st.sampled_from(["scaled_sinusoidal", "rotary"]), st.booleans(), st.lists(st.integers(1, 12), min_size=1, max_size=4))
def test_padding_changes_nothing(position, qk_norm, lengths):
    model = bert(position=position, qk_norm=qk_norm).eval()
    ids = torch.randint(50, (len(lengths), max(lengths) + 3))
    mask = torch.arange(ids.size(1)) < torch.tensor(lengths)[:, None]
    together = model.encode(ids, mask)
    for i, n in enumerate(lengths):
        assert torch.allclose(together[i, :n], model.encode(ids[i : i + 1, :n])[0], atol=1e-5)


def test_order_matters_with_either_kind_of_positions():
    for position in ("scaled_sinusoidal", "rotary"):
        model = bert(position=position)
        for block in model.blocks:
            block.qkv.weight.data *= 20  # as after training: at the init attention is nearly uniform
        ids = torch.randint(50, (1, 12))
        there = model.encode(ids)[0]
        back = model.encode(ids.flip(1))[0].flip(0)
        assert not torch.allclose(there, back, atol=1e-3)


@pytest.mark.parametrize("position", ["scaled_sinusoidal", "rotary"])
def test_compiled_bf16_gradients(position):
    """Guards against miscompilation: a compiled bf16 step against eager fp32, parameter by parameter."""
    model = bert(position=position, n_embd=128, n_head=2, n_inner=256, n_layer=1, max_len=128, vocab_size=200)
    batch = torch.randint(200, (16, 128)), torch.arange(0, 16 * 128, 4), torch.randint(200, (16 * 32,))
    gradients = []
    for forward, dtype in ((model, torch.float32), (torch.compile(model, dynamic=False), torch.bfloat16)):
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
    noise = M.dropout(torch.ones(40_000, 4), 0.5, True) > 0  # the four values of one draw are independent
    assert abs(torch.corrcoef(noise.T.float()) - torch.eye(4)).max() < 0.03


@pytest.mark.parametrize("changes", [{}, {"n_layer": 3, "n_inner": 96, "n_head": 4}])
def test_flops_against_torchs_counter(changes):
    model, T, B, k = bert(**changes, n_embd=64), 32, 4, 8
    ids, positions = torch.randint(50, (B, T)), torch.arange(B * k)
    with FlopCounterMode(display=False) as counter:
        model(ids, positions, torch.randint(50, (B * k,))).backward()
    assert flops_per_token(model.config, T, k) * B * T == pytest.approx(counter.get_total_flops(), rel=0.02)


@pytest.mark.parametrize("pooling", ["first", "mean"])
@pytest.mark.parametrize("n_classes", [1, 3])
def test_classifier(pooling, n_classes):
    model = Classifier(bert(), n_classes, pooling).eval()
    ids, mask = torch.randint(50, (2, 8)), torch.ones(2, 8, dtype=torch.bool)
    mask[1, 5:] = False
    hidden = model.bert.encode(ids, mask)
    pooled = hidden[:, 0] if pooling == "first" else torch.stack([hidden[0].mean(0), hidden[1, :5].mean(0)])
    expected = torch.tanh(pooled @ model.pooler.weight.T + model.pooler.bias) @ model.head.weight.T + model.head.bias
    assert model(ids, mask).shape == (2, n_classes) and torch.allclose(model(ids, mask), expected, atol=1e-6)
    assert model.pooler.weight.shape == (1024, 32)


def test_impossible_models_are_refused():
    for changes, what in [
        ({"n_head": 5}, "divisible"),
        ({"n_inner": 65}, "even"),
        ({"position": "rotary", "n_head": 32}, "even"),
    ]:
        with pytest.raises(ValueError, match=what):
            bert(**changes)
    with pytest.raises(ValueError, match="65 tokens is longer than max_len = 64"):
        bert().encode(torch.zeros(1, 65, dtype=torch.long))
