"""The crammed BERT (Geiping & Goldstein, arXiv 2212.14034) as one file of plain PyTorch.

Notable choices: pre-norm, with one more norm behind the embedding and one before the head; no bias in any linear layer;
a gated feed-forward; positions by a fixed sinusoid times one learned scalar, or rotary; no head transform, and a decoder
that is the embedding matrix; logits only where a token is masked. Weights are fp32, and each layer casts them to the
dtype of its input, which replaces autocast: `model.dtype` is the dtype of all activations and of the residual stream.
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
    n_inner: int = 3072  # [2, inf) width of the feed-forward layer, both halves of the gated one together
    max_len: int = 512  # [1, inf) longest sequence, in tokens
    norm_eps: float = 1e-12  # (0, 1) epsilon of the layer norms
    position: str = "scaled_sinusoidal"  # {scaled_sinusoidal, rotary} how attention learns about order
    rotary_base: float = 10000.0  # (1, inf) longest wavelength of the rotary positions, in tokens over 2 pi
    qk_norm: bool = False  # RMS-normalise queries and keys, without weights
    dropout: float = 0.0  # [0, 1) dropout on embeddings, attention and residual branches in pretraining


class Linear(nn.Linear):
    """Bias-free linear layer that casts its fp32 weight to the dtype of its input."""

    def __init__(self, n_in, n_out):
        super().__init__(n_in, n_out, bias=False)

    def forward(self, x):
        return F.linear(x, self.weight.to(x.dtype))


class LayerNorm(nn.LayerNorm):
    """Layer norm, always in fp32: in bf16 on a CPU the gradient of its bias, a sum over all tokens, was off by 54 %."""

    def forward(self, x):
        return super().forward(x.float()).to(x.dtype)


def sinusoid(max_len, width):
    """The fixed table of Vaswani et al. 2017, (max_len, width): sines in the even columns, cosines in the odd ones."""
    angles = torch.arange(max_len)[:, None] * 10000 ** (-torch.arange(0, width, 2) / width)
    return torch.stack([angles.sin(), angles.cos()], dim=-1).flatten(1)[:, :width]


def rotary_tables(max_len, width, base):
    """Cosines and signed sines of rotary positions (Su et al. 2021) for `rotate`, each (max_len, width)."""
    angles = torch.arange(max_len)[:, None] * base ** (-torch.arange(0, width, 2) / width)
    return angles.cos().repeat(1, 2), torch.cat([-angles.sin(), angles.sin()], dim=1)


def rotate(x, cos, sin):
    """Rotate each pair (x_i, x_{i + width/2}) of x (B, H, T, width) by the angle of its position.

    Written with roll: torch 2.13 compiles the usual chunk-and-cat to wrong bf16 gradients on a CPU.
    """
    return x * cos + x.roll(x.size(-1) // 2, dims=-1) * sin


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
    scores = (q * q.size(-1) ** -0.5) @ k.transpose(-2, -1)  # on a CPU plain matmuls train about twice as fast as SDPA
    if mask is not None:
        scores = scores.masked_fill(~mask, float("-inf"))
    return dropout(scores.softmax(-1), p, p > 0) @ v


class Block(nn.Module):
    def __init__(self, config):
        super().__init__()
        self.n_head, self.dropout, self.qk_norm = config.n_head, config.dropout, config.qk_norm
        self.norm1 = LayerNorm(config.n_embd, eps=config.norm_eps)
        self.qkv = Linear(config.n_embd, 3 * config.n_embd)
        self.out = Linear(config.n_embd, config.n_embd)
        self.norm2 = LayerNorm(config.n_embd, eps=config.norm_eps)
        self.up = Linear(config.n_embd, config.n_inner)
        self.down = Linear(config.n_inner // 2, config.n_embd)

    def attention(self, x, mask, rotary):
        B, T, D = x.shape
        q, k, v = self.qkv(x).view(B, T, 3, self.n_head, D // self.n_head).permute(2, 0, 3, 1, 4)
        if self.qk_norm:
            q, k = F.rms_norm(q, q.shape[-1:]), F.rms_norm(k, k.shape[-1:])
        if rotary is not None:
            q, k = rotate(q, *rotary), rotate(k, *rotary)
        y = attend(q, k, v, mask, self.dropout if self.training else 0.0)
        return self.out(y.transpose(1, 2).reshape(B, T, D))

    def feed_forward(self, x):
        value, gate = self.up(x).chunk(2, dim=-1)
        return self.down(F.gelu(gate) * value)

    def forward(self, x, mask, rotary):
        x = x + dropout(self.attention(self.norm1(x), mask, rotary), self.dropout, self.training)
        return x + dropout(self.feed_forward(self.norm2(x)), self.dropout, self.training)


class BERT(nn.Module):
    """A masked language model. Raises ValueError for a Config that no model answers to.

    Init [repo]: every weight matrix from N(0, 0.02), norms 1 and 0, the position scalar 1 / sqrt(width).
    """

    def __init__(self, config):
        super().__init__()
        if config.n_embd % config.n_head:
            raise ValueError(f"n_embd = {config.n_embd} is not divisible by n_head = {config.n_head}")
        if config.position == "rotary" and config.n_embd // config.n_head % 2:
            raise ValueError(
                f"rotary positions need an even head width, not n_embd / n_head = {config.n_embd // config.n_head}"
            )
        if config.n_inner % 2:
            raise ValueError(f"n_inner = {config.n_inner} must be even: it holds both halves of the gated layer")
        self.config = config
        self.dtype = torch.float32  # of the activations; the weights stay fp32
        self.embedding = nn.Embedding(config.vocab_size, config.n_embd)
        if config.position == "scaled_sinusoidal":
            self.position_scale = nn.Parameter(torch.tensor([config.n_embd**-0.5]))
            self.register_buffer("sinusoid", sinusoid(config.max_len, config.n_embd), persistent=False)
        else:
            cos, sin = rotary_tables(config.max_len, config.n_embd // config.n_head, config.rotary_base)
            self.register_buffer("cos", cos, persistent=False)
            self.register_buffer("sin", sin, persistent=False)
        self.embedding_norm = LayerNorm(config.n_embd, eps=config.norm_eps)
        self.blocks = nn.ModuleList(Block(config) for _ in range(config.n_layer))
        self.final_norm = LayerNorm(config.n_embd, eps=config.norm_eps)
        for module in self.modules():
            if isinstance(module, (nn.Linear, nn.Embedding)):
                nn.init.normal_(module.weight, std=0.02)

    def encode(self, ids, mask=None):
        """ids (B, T) int64; mask (B, T) bool, True at real tokens, None = all real. Returns (B, T, width)."""
        T = ids.size(1)
        if T > self.config.max_len:
            raise ValueError(f"a sequence of {T} tokens is longer than max_len = {self.config.max_len}")
        x, rotary = self.embedding(ids), None
        if self.config.position == "scaled_sinusoidal":
            x = x + self.position_scale * self.sinusoid[:T]
        else:
            rotary = self.cos[:T].to(self.dtype), self.sin[:T].to(self.dtype)
        x = dropout(self.embedding_norm(x.to(self.dtype)), self.config.dropout, self.training)
        mask = None if mask is None else mask[:, None, None, :]
        for block in self.blocks:
            x = block(x, mask, rotary)
        return self.final_norm(x)

    def logits(self, hidden):
        """Hidden states (..., width) to logits (..., vocab_size) with the tied decoder."""
        return F.linear(hidden, self.embedding.weight.to(hidden.dtype))

    def forward(self, ids, positions, targets=None):
        """Logits (N, vocab_size) at `positions`, N indices into the flat batch; with targets (N,) the mean loss in nats."""
        logits = self.logits(self.encode(ids).flatten(0, 1).index_select(0, positions))
        return logits if targets is None else F.cross_entropy(logits.float(), targets)


class Classifier(nn.Module):
    """The encoder with the head of the paper's GLUE runs: pool -> Linear(width, 1024) -> tanh -> dropout -> Linear.

    Takes over a BERT's weights; its decoder is the embedding and costs nothing here. n_classes = 1 for regression.
    """

    def __init__(self, bert, n_classes, pooling="first", dropout=0.1):
        super().__init__()
        self.bert, self.pooling, self.dropout = bert, pooling, dropout
        self.pooler = nn.Linear(bert.config.n_embd, 1024)
        self.head = nn.Linear(1024, n_classes)
        for layer in (self.pooler, self.head):
            nn.init.normal_(layer.weight, std=0.02)
            nn.init.zeros_(layer.bias)

    def forward(self, ids, mask):
        """ids and mask (B, T) as in BERT.encode. Returns (B, n_classes) in fp32."""
        hidden = self.bert.encode(ids, mask)
        if self.pooling == "first":
            pooled = hidden[:, 0].float()
        else:
            pooled = (hidden.float() * mask[..., None]).sum(1) / mask.sum(1, keepdim=True)
        return self.head(dropout(torch.tanh(self.pooler(pooled)), self.dropout, self.training))


def flops_per_token(config, seq_len, n_masked):
    """Model FLOPs of one training token, forward and backward (3 x forward), the head counted only at masked positions.

    n_masked: masked positions in a row of seq_len tokens. A multiply-add is two FLOPs; norms and softmax are not counted.
    """
    D = config.n_embd
    weights = config.n_layer * (4 * D * D + D * config.n_inner + config.n_inner // 2 * D)
    attention = config.n_layer * 2 * D * seq_len  # q k^T and the weighted sum of v
    head = config.vocab_size * D * n_masked / seq_len
    return math.floor(3 * 2 * (weights + attention + head))
