"""The crammed BERT (Geiping & Goldstein, arXiv 2212.14034), and the models it is compared with, as plain PyTorch.

The defaults are the crammed BERT: pre-norm, with one more norm behind the embedding and one before the head; no bias in
any linear layer; a gated feed-forward; positions by a fixed sinusoid times one learned scalar; no head transform, and a
decoder that is the embedding matrix. The switches of Config lead to BERT-base and to what the paper tries between them.

In pretraining the last feed-forward layer and the logits are computed only where a token is masked. Weights are fp32, and
each layer casts them to the dtype of its input, which replaces autocast: `model.dtype` is the dtype of all activations and
of the residual stream.
"""

import math
from dataclasses import dataclass

import torch
import torch.nn as nn
import torch.nn.functional as F


@dataclass
class Config:
    vocab_size: int = 32768  # [1, 65536] tokens in the vocabulary (training takes the number from meta.json)
    n_layer: int = 16  # [1, inf) transformer blocks
    n_head: int = 12  # [1, inf) attention heads
    n_embd: int = 768  # [1, inf) width of the residual stream
    n_inner: int = 3072  # [2, inf) width of the feed-forward layer, both halves of a gated one together
    max_len: int = 512  # [1, inf) longest sequence, in tokens
    norm: str = "layernorm"  # {layernorm, rmsnorm} kind of all norms
    norm_place: str = "pre"  # {pre, post} norm before each sublayer, or behind its residual sum
    norm_eps: float = 1e-12  # (0, 1) epsilon of the norms
    bias: bool = False  # biases in the linear layers of the blocks and of the head transform
    activation: str = "gelu"  # {gelu, relu, relu2} of the feed-forward layer; relu2 is the square of relu
    glu: bool = True  # gated feed-forward: activation of one half times the other half
    position: str = "scaled_sinusoidal"  # {scaled_sinusoidal, sinusoidal, learned, rotary, none} how order gets in
    rotary_base: float = 10000.0  # (1, inf) longest wavelength of the rotary positions, in tokens over 2 pi
    attention: str = "softmax"  # {softmax, fourier, flash} flash is the gated attention unit, without a feed-forward layer
    qk_norm: bool = False  # RMS-normalise queries and keys, without weights
    neighbour_keys: bool = False  # half the channels of queries and keys are those of the neighbours: see `with_neighbours`
    value_residual: bool = False  # values are a * v + b * those of the first block; a and b are learned, from 0.5
    embedding_skip: bool = False  # each block begins with a * x + b * embedding; a and b are learned, from 1 and 0
    embedding_norm: bool = True  # norm behind the embeddings
    final_norm: bool = True  # norm before the head
    head_transform: bool = False  # linear layer, GELU and norm before the decoder
    decoder_bias: bool = False  # a bias for each token of the vocabulary
    tie_weights: bool = True  # the decoder is the embedding matrix
    token_types: int = 0  # [0, inf) kinds of segment embeddings, 0 = none; BERT has 2
    dropout: float = 0.0  # [0, 1) dropout on embeddings, attention and residual branches in pretraining


ACTIVATIONS = {"gelu": F.gelu, "relu": F.relu, "relu2": lambda x: F.relu(x).square()}
FLASH_WIDTH = 128  # of the shared queries and keys of the gated attention unit


def require_possible(config):
    """Raises ValueError, one line, for a Config that no model answers to."""
    c, width, rotary = config, config.n_embd // config.n_head, config.position == "rotary"
    rules = [
        (c.n_embd % c.n_head, f"n_embd = {c.n_embd} is not divisible by n_head = {c.n_head}"),
        (rotary and c.attention == "softmax" and width % 2, f"rotary positions need an even head width, not {width}"),
        (rotary and c.attention == "fourier", "position=rotary turns queries and keys, attention=fourier has none"),
        (c.qk_norm and c.attention != "softmax", f"qk_norm is for attention=softmax, not for {c.attention}"),
        (c.value_residual and c.attention != "softmax", f"value_residual is for attention=softmax, not for {c.attention}"),
        (c.neighbour_keys and not (rotary and c.attention == "softmax"), "neighbour_keys needs rotary positions and softmax"),
        (c.neighbour_keys and width % 4, f"neighbour_keys needs a head width that is divisible by 4, not {width}"),
        (c.attention == "flash" and c.norm_place == "post", "attention=flash is defined with norm_place=pre only"),
        (c.attention == "flash" and not c.glu, "attention=flash is gated; it needs glu=True"),
        (c.glu and c.n_inner % 2, f"n_inner = {c.n_inner} must be even: it holds both halves of the gated layer"),
    ]
    for broken, message in rules:
        if broken:
            raise ValueError(message)


class Linear(nn.Linear):
    """Linear layer that casts its fp32 weights to the dtype of its input. part: a slice of the outputs, to have these only."""

    def forward(self, x, part=None):
        weight, bias = self.weight, self.bias
        if part is not None:
            weight, bias = weight[part], None if bias is None else bias[part]
        return F.linear(x, weight.to(x.dtype), None if bias is None else bias.to(x.dtype))


class LayerNorm(nn.LayerNorm):
    """Layer norm, always in fp32: in bf16 on a CPU the gradient of its bias, a sum over all tokens, was off by 54 %."""

    def forward(self, x):
        return F.layer_norm(x.float(), self.normalized_shape, self.weight.float(), self.bias.float(), self.eps).to(x.dtype)


class RMSNorm(nn.RMSNorm):
    """RMS norm (Zhang & Sennrich 2019), always in fp32."""

    def forward(self, x):
        return F.rms_norm(x.float(), self.normalized_shape, self.weight.float(), self.eps).to(x.dtype)


def make_norm(config):
    return {"layernorm": LayerNorm, "rmsnorm": RMSNorm}[config.norm](config.n_embd, eps=config.norm_eps)


def sinusoid(max_len, width):
    """The fixed table of Vaswani et al. 2017, (max_len, width): sines in the even columns, cosines in the odd ones."""
    angles = torch.arange(max_len)[:, None] * 10000 ** (-torch.arange(0, width, 2) / width)
    return torch.stack([angles.sin(), angles.cos()], dim=-1).flatten(1)[:, :width]


def rotary_tables(max_len, width, base):
    """Cosines and signed sines of rotary positions (Su et al. 2021) for `rotate`, each (max_len, width)."""
    angles = torch.arange(max_len)[:, None] * base ** (-torch.arange(0, width, 2) / width)
    return angles.cos().repeat(1, 2), torch.cat([-angles.sin(), angles.sin()], dim=1)


def rotate(x, cos, sin):
    """Rotate each pair (x_i, x_{i + width/2}) of x (..., T, width) by the angle of its position.

    For a CPU torch 2.13 compiles chunk-and-cat, flip and the like to gradients that are NaN, and roll to scalar loops.
    A product with a permutation swaps the halves as exactly, and makes a step at 4 x 256 1.1 times as fast.
    """
    half = x.size(-1) // 2
    if x.device.type == "cpu" and torch.compiler.is_compiling():
        swapped = x @ torch.eye(2 * half, dtype=x.dtype).roll(half, dims=0)
    else:
        swapped = x.roll(half, dims=-1)
    return x * cos + swapped * sin


def with_neighbours(x, mask, cos, sin):
    """Queries or keys x (B, H, T, width) that say where a token stands and what stands beside it.

    Half of the channels are rotated by `rotate`; a quarter is that of the token before, a quarter that of the token behind,
    0 at the ends and beside padding, mask (B, 1, 1, T) being True at real tokens, or None. So one layer finds where a masked
    token's neighbours stand elsewhere, and what stands between them there; otherwise it takes two layers that fit. A decoder's
    keys, of the token before, are in KellerJordan/modded-nanogpt, pull request 169.
    """
    turned, before, behind = x.split([x.size(-1) // 2, x.size(-1) // 4, x.size(-1) // 4], dim=-1)
    if mask is not None:
        before, behind = before * mask.mT, behind * mask.mT
    before, behind = F.pad(before[..., :-1, :], (0, 0, 1, 0)), F.pad(behind[..., 1:, :], (0, 0, 0, 1))
    return torch.cat([rotate(turned, cos, sin), before, behind], dim=-1)


def dropout(x, p, training):
    """F.dropout. On a CPU with 16-bit noise, four values a draw: bernoulli_ took a third of a fine-tuning step."""
    if x.device.type != "cpu" or not training or p == 0 or torch.compiler.is_compiling():
        return F.dropout(x, p, training)
    noise = torch.empty(x.numel() // 4 + 1, dtype=torch.int64).random_(-(2**63), None).view(torch.int16)[: x.numel()]
    return x * (noise.view(x.shape) >= round(p * 65536) - 32768).to(x.dtype).mul_(1 / (1 - p))


def attend(q, k, v, mask, p):
    """softmax(q k^T / sqrt(d)) v for (B, H, T, d), with dropout p. mask: bool, True at keys to see, (B, 1, 1, T) or None."""
    if q.device.type != "cpu":
        return F.scaled_dot_product_attention(q, k, v, attn_mask=mask, dropout_p=p)
    scores = (q * q.size(-1) ** -0.5) @ k.transpose(-2, -1)  # on a CPU SDPA is slow in training
    if mask is not None:
        scores = scores.masked_fill(~mask, float("-inf"))
    return dropout(scores.softmax(-1), p, p > 0) @ v


class Block(nn.Module):
    """Attention and feed-forward sublayers with residual branches; with attention=flash one unit that is both."""

    def __init__(self, config):
        super().__init__()
        self.config, D = config, config.n_embd
        inner = config.n_inner // 2 if config.glu else config.n_inner
        self.norm1 = make_norm(config)
        if config.attention == "softmax":
            self.qkv = Linear(D, 3 * D, config.bias)
            self.out = Linear(D, D, config.bias)
            if config.value_residual:
                self.value_scale = nn.Parameter(torch.full((2,), 0.5))
        if config.attention == "flash":
            self.qk = Linear(D, FLASH_WIDTH, config.bias)
            self.qk_scale = nn.Parameter(torch.empty(2 * FLASH_WIDTH).normal_(std=0.02))
            self.qk_offset = nn.Parameter(torch.zeros(2 * FLASH_WIDTH))
        else:
            self.norm2 = make_norm(config)
        self.up = Linear(D, config.n_inner, config.bias)
        self.down = Linear(inner, D, config.bias)

    def softmax(self, x, mask, rotary, first_values):
        B, T, D = x.shape
        qkv = self.qkv(x).view(B, T, 3, self.config.n_head, -1)
        q, k, v = qkv.permute(2, 0, 3, 1, 4)
        if self.config.qk_norm:
            q, k = F.rms_norm(qkv[:, :, :2], qkv.shape[-1:]).permute(2, 0, 3, 1, 4)
        if self.config.value_residual:
            if not first_values:
                first_values.append(v)
            v = self.value_scale[0] * v + self.value_scale[1] * first_values[0]
        if self.config.neighbour_keys:
            q, k = with_neighbours(q, mask, *rotary), with_neighbours(k, mask, *rotary)
        elif rotary is not None:
            q, k = rotate(q, *rotary), rotate(k, *rotary)
        y = attend(q, k, v, mask, self.config.dropout if self.training else 0.0)
        return self.out(y.transpose(1, 2).reshape(B, T, D))

    def fourier(self, x, *_):
        """Fourier mixing (Lee-Thorp et al. 2021). It has no notion of padding: what stands there is mixed in."""
        return torch.fft.fft2(x.float()).real.to(x.dtype)

    def flash(self, x, mask, rotary, *_):
        """The gated attention unit of Hua et al. 2022, quadratic form: (gate * relu^2(q k^T / n) v) W."""
        value, gate = F.silu(self.up(x)).chunk(2, dim=-1)
        shared = F.silu(self.qk(x))
        q, k = (shared.repeat(1, 1, 2) * self.qk_scale.to(x.dtype) + self.qk_offset.to(x.dtype)).chunk(2, dim=-1)
        if rotary is not None:
            q, k = rotate(q, *rotary), rotate(k, *rotary)
        n = x.size(1) if mask is None else mask.sum(-1, keepdim=True)  # tokens to see: padding changes nothing
        scores = F.relu(q @ k.transpose(-2, -1) / n).square()
        scores = scores if mask is None else scores.masked_fill(~mask, 0.0)
        return self.down(gate * (dropout(scores.to(x.dtype), self.config.dropout, self.training) @ value))

    def feed_forward(self, x):
        activation = ACTIVATIONS[self.config.activation]
        if not self.config.glu:
            return self.down(activation(self.up(x)))
        half = self.config.n_inner // 2  # as two products, whose gradients need not be put together: 3 % on an H100
        value, gate = self.up(x, slice(half)), self.up(x, slice(half, None))
        return self.down(activation(gate) * value)

    def residual(self, x, norm, sublayer, *args):
        p, pre = self.config.dropout, self.config.norm_place == "pre"
        y = x + dropout(sublayer(norm(x) if pre else x, *args), p, self.training)
        return y if pre else norm(y)

    def forward(self, x, mask, rotary, first_values, positions=None):
        """x (B, T, width); mask (B, T) bool, True at real tokens, or None; rotary the tables of `rotate`, or None.

        first_values: a list, empty for the first block, which puts its values there, (B, H, T, d), for those behind it.
        positions: N indices into the flat batch, the only ones whose output, then (N, width), is wanted; None = all.
        """
        kind = self.config.attention
        mask = None if mask is None else mask[:, None] if kind == "flash" else mask[:, None, None]
        mix = {"softmax": self.softmax, "fourier": self.fourier, "flash": self.flash}[kind]
        x = self.residual(x, self.norm1, mix, mask, rotary, first_values)
        if positions is not None:
            x = x.flatten(0, 1).index_select(0, positions)
        return x if kind == "flash" else self.residual(x, self.norm2, self.feed_forward)


class BERT(nn.Module):
    """A masked language model. Raises ValueError for a Config that no model answers to.

    Init [repo]: every matrix from N(0, 0.02), biases 0, norms 1 and 0, the position scalar 1 / sqrt(width).
    """

    def __init__(self, config):
        super().__init__()
        require_possible(config)
        self.config, D = config, config.n_embd
        self.dtype = torch.float32  # of the activations; the weights stay fp32
        self.embedding = nn.Embedding(config.vocab_size, D)
        if config.token_types:
            self.type_embedding = nn.Embedding(config.token_types, D)
        if config.position == "learned":
            self.position_embedding = nn.Embedding(config.max_len, D)
        if config.position == "scaled_sinusoidal":
            self.position_scale = nn.Parameter(torch.tensor([D**-0.5]))
        if config.position in ("scaled_sinusoidal", "sinusoidal"):
            self.register_buffer("sinusoid", sinusoid(config.max_len, D), persistent=False)
        if config.position == "rotary":
            width = FLASH_WIDTH if config.attention == "flash" else D // config.n_head
            cos, sin = rotary_tables(config.max_len, width // 2 if config.neighbour_keys else width, config.rotary_base)
            self.register_buffer("cos", cos, persistent=False)
            self.register_buffer("sin", sin, persistent=False)
        self.embedding_norm = make_norm(config) if config.embedding_norm else nn.Identity()
        self.blocks = nn.ModuleList(Block(config) for _ in range(config.n_layer))
        if config.embedding_skip:
            self.stream_scale = nn.Parameter(torch.ones(config.n_layer))
            self.skip_scale = nn.Parameter(torch.zeros(config.n_layer))
        self.final_norm = make_norm(config) if config.final_norm else nn.Identity()
        if config.head_transform:
            self.transform = Linear(D, D, config.bias)
            self.transform_norm = make_norm(config)
        if not config.tie_weights:
            self.decoder = Linear(D, config.vocab_size, bias=False)
        if config.decoder_bias:
            self.decoder_bias = nn.Parameter(torch.zeros(config.vocab_size))
        for module in self.modules():
            if isinstance(module, (nn.Linear, nn.Embedding)):
                nn.init.normal_(module.weight, std=0.02)
            if isinstance(module, nn.Linear) and module.bias is not None:
                nn.init.zeros_(module.bias)

    def encode(self, ids, mask=None, types=None, positions=None):
        """Hidden states (B, T, width) of ids (B, T) int64; with positions, indices into the flat batch, (N, width).

        mask: (B, T) bool, True at real tokens; None = all are. types: (B, T) segment ids; None = all 0.
        """
        T, c = ids.size(1), self.config
        if T > c.max_len:
            raise ValueError(f"a sequence of {T} tokens is longer than max_len = {c.max_len}")
        words = self.embedding.weight.index_select(0, ids.flatten())  # the compiled gradient of F.embedding is slow on a CPU
        x, rotary = words.view(*ids.shape, -1), None
        if c.token_types:
            segments = self.type_embedding.weight
            x = x + (segments[0] if types is None else F.embedding(types.clamp(max=c.token_types - 1), segments))
        if c.position == "learned":
            x = x + self.position_embedding.weight[:T]
        elif c.position == "scaled_sinusoidal":
            x = x + self.position_scale * self.sinusoid[:T]
        elif c.position == "sinusoidal":
            x = x + self.sinusoid[:T]
        elif c.position == "rotary":
            rotary = self.cos[:T].to(self.dtype), self.sin[:T].to(self.dtype)
        x = dropout(self.embedding_norm(x.to(self.dtype)), c.dropout, self.training)
        embedded, first_values, last = x, [], c.n_layer - 1
        for i, block in enumerate(self.blocks):
            if c.embedding_skip:
                x = self.stream_scale[i] * x + self.skip_scale[i] * embedded
            x = block(x, mask, rotary, first_values, positions if i == last else None)
        return self.final_norm(x)

    def logits(self, hidden):
        """Hidden states (..., width) to logits (..., vocab_size)."""
        c = self.config
        if c.head_transform:
            hidden = self.transform_norm(F.gelu(self.transform(hidden)))
        weight = self.embedding.weight if c.tie_weights else self.decoder.weight
        bias = self.decoder_bias.to(hidden.dtype) if c.decoder_bias else None
        return F.linear(hidden, weight.to(hidden.dtype), bias)

    def forward(self, ids, positions, targets=None):
        """Logits (N, vocab_size) at `positions`, N indices into the flat batch; with targets (N,) the mean loss in nats."""
        logits = self.logits(self.encode(ids, positions=positions))
        return logits if targets is None else F.cross_entropy(logits.float(), targets)


class Classifier(nn.Module):
    """The encoder with the head of the paper's GLUE runs: pool -> Linear(width, 1024) -> tanh -> dropout -> Linear.

    n_classes = 1 for regression. pooler_width: 1024 in the paper, the model's own width for BERT's pretrained pooler.
    """

    def __init__(self, bert, n_classes, pooling="first", dropout=0.1, pooler_width=1024):
        super().__init__()
        self.bert, self.pooling, self.dropout = bert, pooling, dropout
        self.pooler = nn.Linear(bert.config.n_embd, pooler_width)
        self.head = nn.Linear(pooler_width, n_classes)
        for layer in (self.pooler, self.head):
            nn.init.normal_(layer.weight, std=0.02)
            nn.init.zeros_(layer.bias)

    def forward(self, ids, mask, types=None):
        """ids, mask and types (B, T) as in BERT.encode. Returns (B, n_classes) in fp32."""
        if self.pooling == "first":
            pooled = self.bert.encode(ids, mask, types, torch.arange(ids.size(0), device=ids.device) * ids.size(1)).float()
        else:
            hidden = self.bert.encode(ids, mask, types)
            pooled = (hidden.float() * mask[..., None]).sum(1) / mask.sum(1, keepdim=True)
        return self.head(dropout(torch.tanh(self.pooler(pooled)), self.dropout, self.training))


def flops_per_token(config, seq_len, n_masked):
    """Model FLOPs of one training token, forward and backward (3 x forward).

    n_masked: masked positions in a row of seq_len tokens; the head and the last feed-forward layer are computed at these
    alone. A multiply-add is two FLOPs. Norms, softmax and the Fourier transform are not counted.
    """
    D, inner = config.n_embd, config.n_inner // 2 if config.glu else config.n_inner
    mixing = {"softmax": 4 * D * D, "fourier": 0, "flash": D * FLASH_WIDTH}[config.attention]
    scores = {"softmax": 2 * D, "fourier": 0, "flash": FLASH_WIDTH + inner}[config.attention] * seq_len  # q k^T, and times v
    feed_forward = D * config.n_inner + inner * D
    share = n_masked / seq_len
    unneeded = 0 if config.attention == "flash" else feed_forward * (1 - share)
    head = (config.vocab_size * D + config.head_transform * D * D) * share
    return math.floor(3 * 2 * (config.n_layer * (mixing + scores + feed_forward) - unneeded + head))
