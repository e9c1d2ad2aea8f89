"""The crammed BERT (Geiping & Goldstein, arXiv 2212.14034), and the models it is compared with.

The defaults of Config are the crammed BERT:
* a norm before each sublayer (pre-norm), one more after the embeddings and one before the head
* no bias in any linear layer, and a gated feed-forward layer
* positions as a fixed sinusoid times one learned scalar
* no transform in the head, and the embedding matrix as the decoder
The switches of Config lead to BERT-base, and to what the paper tries between the two.

Pretraining computes the last feed-forward layer and the logits at the masked tokens only.

The weights are fp32. Each layer casts them to the dtype of its input, which replaces autocast:
`model.dtype` is the dtype of all activations and of the residual stream.

Letters in shapes: B rows of T tokens, D = n_embd channels, H heads of d = D / H channels each, and
N wanted (masked) tokens of the whole batch. "[repo]" stands for the authors' code.
"""

import math
from dataclasses import dataclass, replace
from pathlib import Path

import torch
import torch.nn as nn
import torch.nn.functional as F


@dataclass
class Config:
    """The architecture. The comment of a field says what is allowed, and what it means."""

    # Size
    vocab_size: int = 32768  # [1, 65536] tokens in the vocabulary; training reads it in meta.json
    n_layer: int = 16  # [1, inf) transformer blocks
    n_head: int = 12  # [1, inf) attention heads
    n_embd: int = 768  # [1, inf) width of the residual stream
    # [2, inf) width of the feed-forward layer; of a gated one, both halves together
    n_inner: int = 3072
    max_len: int = 512  # [1, inf) longest sequence, in tokens

    # Choices of the crammed BERT (the defaults) and of BERT
    norm_place: str = "pre"  # {pre, post} norm before each sublayer, or after its residual sum
    norm_eps: float = 1e-12  # (0, 1) epsilon of the norms
    bias: bool = False  # biases in the linear layers of the blocks and of the head transform
    glu: bool = True  # gated feed-forward layer: activation of one half times the other half
    # {scaled_sinusoidal, sinusoidal, learned, rotary, none} position encoding
    position: str = "scaled_sinusoidal"
    token_types: int = 0  # [0, inf) kinds of segment embeddings, 0 = none; BERT has 2
    embedding_norm: bool = True  # norm after the embeddings
    first_norm: bool = True  # the norm before the attention of the first block
    final_norm: bool = True  # norm before the head
    head_transform: bool = False  # linear layer, GELU and norm before the decoder
    decoder_bias: bool = False  # a bias for each token of the vocabulary
    # [0, 1) dropout on embeddings, attention and residual branches in pretraining
    dropout: float = 0.0

    # Other attempts of the paper
    norm: str = "layernorm"  # {layernorm, rmsnorm} kind of all norms
    # {gelu, relu, relu2} activation of the feed-forward layer; relu2 is the square of relu
    activation: str = "gelu"
    # {softmax, fourier, flash} flash is the gated attention unit, without a feed-forward layer
    attention: str = "softmax"
    # (1, inf) longest wavelength of the positions, in tokens over 2 pi, for position: rotary
    rotary_base: float = 10000.0
    tie_weights: bool = True  # the decoder is the embedding matrix

    # nanoCram's own
    qk_norm: bool = False  # RMS-normalise queries and keys, without weights
    # half the channels of queries and keys are those of the neighbours: see `with_neighbours`
    neighbour_keys: bool = False
    # values are a * v + b * those of the first block; a and b are learned, from 0.5
    value_residual: bool = False
    # each block begins with a * x + b * embedding; a and b are learned, from 1 and 0
    embedding_skip: bool = False


def require_possible(config):
    """Raise ValueError, with a message of one line, for a Config that no model can follow."""
    c = config
    width = c.n_embd // c.n_head
    softmax = c.attention == "softmax"
    fourier = c.attention == "fourier"
    flash = c.attention == "flash"
    post = c.norm_place == "post"
    rotary = c.position == "rotary"
    only_softmax = f"is for attention=softmax, not for {c.attention}"
    even_width = f"an even head width, not {width}"
    width_of_4 = f"a head width that is divisible by 4, not {width}"
    halves = "it holds both halves of the gated layer"

    # each rule: what must not be, and what to say if it is
    rules = [
        (c.n_embd % c.n_head, f"n_embd = {c.n_embd} is not divisible by n_head = {c.n_head}"),
        (rotary and softmax and width % 2, f"rotary positions need {even_width}"),
        (rotary and fourier, "position=rotary turns queries and keys, attention=fourier has none"),
        (c.qk_norm and not softmax, f"qk_norm {only_softmax}"),
        (c.value_residual and not softmax, f"value_residual {only_softmax}"),
        (c.neighbour_keys and not softmax, "neighbour_keys needs rotary positions and softmax"),
        (c.neighbour_keys and not rotary, "neighbour_keys needs rotary positions and softmax"),
        (c.neighbour_keys and width % 4, f"neighbour_keys needs {width_of_4}"),
        (post and not c.first_norm, "first_norm=False is for norm_place=pre, not for post"),
        (flash and c.norm_place == "post", "attention=flash is defined with norm_place=pre only"),
        (flash and not c.glu, "attention=flash is gated; it needs glu=True"),
        (c.glu and c.n_inner % 2, f"n_inner = {c.n_inner} must be even: {halves}"),
    ]
    for is_broken, message in rules:
        if is_broken:
            raise ValueError(message)


# --------------------------------------------------------------------------------------------------
# Layers


def linear(x, weight, bias):
    """Return x W^T + b in the dtype of x, to which fp32 weights are cast."""
    if bias is not None:
        bias = bias.to(x.dtype)
    return F.linear(x, weight.to(x.dtype), bias)


class Linear(nn.Linear):
    """Linear layer that casts its weights. part: a slice of outputs, if only these are wanted."""

    def forward(self, x, part=None):
        weight, bias = self.weight, self.bias
        if part is not None:
            weight = weight[part]
        if part is not None and bias is not None:
            bias = bias[part]
        return linear(x, weight, bias)


def make_norm(config):
    kinds = {"layernorm": LayerNorm, "rmsnorm": RMSNorm}
    return kinds[config.norm](config.n_embd, eps=config.norm_eps)


# --------------------------------------------------------------------------------------------------
# Positions. Attention treats its input as a set: without these, the order of the tokens is lost.


def sinusoid(max_len, width):
    """Return the fixed table of Vaswani et al. 2017, which is added to the embeddings.

    Shape (max_len, width), with sines in the even columns and cosines in the odd ones.
    """
    frequencies = 10000 ** (-torch.arange(0, width, 2) / width)
    angles = torch.arange(max_len)[:, None] * frequencies
    pairs = torch.stack([angles.sin(), angles.cos()], dim=-1)
    return pairs.flatten(1)[:, :width]


def rotary_tables(max_len, width, base):
    """Return cosines and signed sines for `rotate`, each (max_len, width)."""
    frequencies = base ** (-torch.arange(0, width, 2) / width)
    angles = torch.arange(max_len)[:, None] * frequencies
    cos = angles.cos().repeat(1, 2)
    sin = angles.sin()
    return cos, torch.cat([-sin, sin], dim=1)


def rotate(x, cos, sin):
    """Rotate each pair (x_i, x_{i + width/2}) of x (..., T, width) by the angle of its position.

    The product of a rotated query and a rotated key depends on their distance (Su et al. 2021).
    """
    return x * cos + swap_halves(x) * sin


def with_neighbours(x, mask, cos, sin):
    """Return queries or keys x (B, H, T, d) that contain channels of the neighbouring tokens.

    Half of the channels are rotated, a quarter comes from the token before, a quarter from the one
    after; a neighbour that is missing, or padding, is 0. mask: (B, 1, 1, T), True at real tokens.

    So one layer finds another occurrence of the tokens around a <mask>, and the token between them
    there. Otherwise two layers must cooperate. A decoder whose keys contain the token before is in
    KellerJordan/modded-nanogpt, pull request 169.
    """
    quarter = x.size(-1) // 4
    own, before, after = x.split([2 * quarter, quarter, quarter], dim=-1)
    if mask is not None:
        before = before * mask.mT
        after = after * mask.mT

    # shift along T: token t gets channels of t - 1, and channels of t + 1
    before = F.pad(before[..., :-1, :], (0, 0, 1, 0))
    after = F.pad(after[..., 1:, :], (0, 0, 0, 1))
    rotated = rotate(own, cos, sin)
    return torch.cat([rotated, before, after], dim=-1)


# --------------------------------------------------------------------------------------------------
# Attention: how tokens exchange information. A variant is one class and its entry in ATTENTION.
#
# forward is called in the same way for all variants, and returns the same two things:
#   x: (B, T, D), the input
#   mask: (B, T) bool, True at real tokens, False at padding; None if there is no padding
#   rotary: the two tables of `rotate`, (T, rotary_width) each, or None
#   first_values: what the first block returned; None in the first block
#   value_scale: the two factors of value_residual, or None
#   -> (output (B, T, D), first_values for the next block)
#
# multiply_adds returns their number per token, in a row of seq_len tokens.


class SelfAttention(nn.Module):
    """Multi-head attention (Vaswani et al. 2017). Unlike in GPT, a token sees later ones too."""

    replaces_feed_forward = False

    def __init__(self, config):
        super().__init__()
        self.config = config
        D = config.n_embd
        self.qkv = Linear(D, 3 * D, config.bias)  # one product is faster than three
        self.out = Linear(D, D, config.bias)

    def forward(self, x, mask, rotary, first_values, value_scale):
        B, T, D = x.shape
        H = self.config.n_head
        if mask is not None:
            mask = mask[:, None, None]  # (B, 1, 1, T): the same for all heads and all queries

        # each token has a query (what it looks for), a key (what it is found by) and a value (what
        # it hands over), one for each head: q, k and v are (B, H, T, d)
        qkv = self.qkv(x).view(B, T, 3, H, D // H)
        q, k, v = qkv.permute(2, 0, 3, 1, 4)
        if self.config.qk_norm:
            qk = F.rms_norm(qkv[:, :, :2], qkv.shape[-1:])
            q, k = qk.permute(2, 0, 3, 1, 4)

        # mix in the values of the first block, which say best which tokens these are
        if self.config.value_residual:
            if first_values is None:
                first_values = v
            v = value_scale[0] * v + value_scale[1] * first_values

        # let queries and keys depend on where their tokens stand
        if self.config.neighbour_keys:
            q = with_neighbours(q, mask, *rotary)
            k = with_neighbours(k, mask, *rotary)
        elif rotary is not None:
            q = rotate(q, *rotary)
            k = rotate(k, *rotary)

        # each token gets a weighted mean of all tokens' values, (B, H, T, d); a weight is large if
        # the query of the one and the key of the other point in the same direction
        p = self.config.dropout if self.training else 0.0
        y = attend(q, k, v, mask, p)

        # join the heads to (B, T, D), and mix what they found
        y = y.transpose(1, 2).reshape(B, T, D)
        return self.out(y), first_values

    @staticmethod
    def rotary_width(config):
        width = config.n_embd // config.n_head
        return width // 2 if config.neighbour_keys else width

    @staticmethod
    def multiply_adds(config, seq_len):
        D = config.n_embd
        matrices = 4 * D * D
        scores = D * seq_len  # q k^T, and as much for the product with v
        return matrices + 2 * scores


class FourierMixing(nn.Module):
    """A Fourier transform over tokens and channels (Lee-Thorp et al. 2021), and a linear layer.

    As in [repo] the transform is orthonormal, so that its output is as large as its input. The
    paper's own is not, and has no linear layer. It ignores the mask: padding is mixed in.
    """

    replaces_feed_forward = False

    def __init__(self, config):
        super().__init__()
        self.out = Linear(config.n_embd, config.n_embd, config.bias)

    def forward(self, x, mask, rotary, first_values, value_scale):
        mixed = torch.fft.fft2(x.float(), norm="ortho").real
        return self.out(mixed.to(x.dtype)), first_values

    @staticmethod
    def multiply_adds(config, seq_len):
        return config.n_embd**2  # of the linear layer; the transform is not counted


class GatedAttentionUnit(nn.Module):
    """The quadratic form of Hua et al. 2022: (gate * relu^2(q k^T / n + b) v) W, with one head.

    The gate makes it attention and feed-forward layer in one. n is the number of real tokens in the
    row, so that padding changes nothing. b is learned, one number for each distance between two
    tokens: 2 * max_len - 1 numbers. At first q k^T / n is close to zero, and its square vanishes.
    Without b the unit would never begin to learn. [repo] has no b.
    """

    replaces_feed_forward = True
    WIDTH = 128  # of the queries and keys

    def __init__(self, config):
        super().__init__()
        self.config = config
        D = config.n_embd
        width = self.WIDTH
        self.qk = Linear(D, width, config.bias)
        scale = torch.empty(2 * width).normal_(std=0.02)
        self.qk_scale = nn.Parameter(scale)
        self.qk_offset = nn.Parameter(torch.zeros(2 * width))
        self.distance_bias = nn.Parameter(torch.empty(2 * config.max_len - 1).normal_(std=0.02))
        self.up = Linear(D, config.n_inner, config.bias)
        self.down = Linear(config.n_inner // 2, D, config.bias)

    def forward(self, x, mask, rotary, first_values, value_scale):
        # values and their gate, each (B, T, n_inner / 2)
        both = F.silu(self.up(x))
        value, gate = both.chunk(2, dim=-1)

        # queries and keys, each (B, T, WIDTH): one projection, scaled and shifted in two ways
        shared = F.silu(self.qk(x)).repeat(1, 1, 2)
        scaled = shared * self.qk_scale.to(x.dtype)
        shifted = scaled + self.qk_offset.to(x.dtype)
        q, k = shifted.chunk(2, dim=-1)
        if rotary is not None:
            q = rotate(q, *rotary)
            k = rotate(k, *rotary)

        # what each token takes from each other one: weights (B, T, T)
        n_tokens = x.size(1)
        places = torch.arange(n_tokens, device=x.device)
        distances = places - places[:, None]
        bias = self.distance_bias[distances + self.config.max_len - 1]
        if mask is not None:
            mask = mask[:, None]
            n_tokens = mask.sum(-1, keepdim=True)
        scores = (q @ k.transpose(-2, -1)).float() / n_tokens  # their square is small: in fp32
        weights = F.relu(scores + bias).square()
        if mask is not None:
            weights = weights.masked_fill(~mask, 0.0)
        weights = dropout(weights.to(x.dtype), self.config.dropout, self.training)

        return self.down(gate * (weights @ value)), first_values

    @staticmethod
    def rotary_width(config):
        return GatedAttentionUnit.WIDTH

    @staticmethod
    def multiply_adds(config, seq_len):
        D = config.n_embd
        inner = config.n_inner // 2
        width = GatedAttentionUnit.WIDTH
        matrices = D * config.n_inner + inner * D + D * width
        scores = (width + inner) * seq_len  # q k^T, and the product with v
        return matrices + scores


ATTENTION = {
    "softmax": SelfAttention,
    "fourier": FourierMixing,
    "flash": GatedAttentionUnit,
}


# --------------------------------------------------------------------------------------------------
# The transformer


def relu_squared(x):
    return F.relu(x).square()


ACTIVATIONS = {
    "gelu": F.gelu,
    "relu": F.relu,
    "relu2": relu_squared,
}


class FeedForward(nn.Module):
    """Two linear layers with an activation in between, for each token on its own.

    Gated (Shazeer 2020): one half of the first layer's outputs, activated, multiplies the other.
    """

    def __init__(self, config):
        super().__init__()
        self.glu = config.glu
        self.activation = ACTIVATIONS[config.activation]
        self.half = config.n_inner // 2
        inner = self.half if config.glu else config.n_inner
        self.up = Linear(config.n_embd, config.n_inner, config.bias)
        self.down = Linear(inner, config.n_embd, config.bias)

    def forward(self, x):
        if not self.glu:
            return self.down(self.activation(self.up(x)))

        # as two products, whose gradients need not be put together: 3 % of a step on an H100
        value = self.up(x, slice(self.half))
        gate = self.up(x, slice(self.half, None))
        return self.down(self.activation(gate) * value)


class Block(nn.Module):
    """Attention and feed-forward layer, each of which adds its output to the residual stream x."""

    def __init__(self, config):
        super().__init__()
        self.config = config
        attention = ATTENTION[config.attention]

        # of value_residual; in the block, since checkpoints rely on the order of the parameters
        self.value_scale = None
        if config.value_residual:
            self.value_scale = nn.Parameter(torch.full((2,), 0.5))

        self.norm1 = make_norm(config)
        self.attention = attention(config)
        self.feed_forward = None
        if not attention.replaces_feed_forward:
            self.norm2 = make_norm(config)
            self.feed_forward = FeedForward(config)

    def forward(self, x, mask, rotary, first_values, positions=None):
        """Return (x, first_values). All arguments but the last are those of attention, see above.

        positions: N indices into the flat batch, if only these are wanted; x is (N, D) then.
        """
        pre_norm = self.config.norm_place == "pre"
        p = self.config.dropout

        # attention: tokens exchange information
        y = self.norm1(x) if pre_norm else x
        scale = self.value_scale
        y, first_values = self.attention(y, mask, rotary, first_values, scale)
        x = x + dropout(y, p, self.training)
        if not pre_norm:
            x = self.norm1(x)

        # from here on tokens need no others: those that are not wanted can go
        if positions is not None:
            x = x.flatten(0, 1).index_select(0, positions)

        # feed-forward: each token processes what it got
        if self.feed_forward is not None:
            y = self.norm2(x) if pre_norm else x
            y = self.feed_forward(y)
            x = x + dropout(y, p, self.training)
            if not pre_norm:
                x = self.norm2(x)
        return x, first_values


class BERT(nn.Module):
    """A masked language model. Raises ValueError for a Config that no model can follow.

    Init [repo]: all matrices from N(0, 0.02), biases 0, norms 1 and 0, position scalar 1 / sqrt(D).
    """

    def __init__(self, config):
        super().__init__()
        require_possible(config)
        self.config = config
        self.dtype = torch.float32  # of the activations; the weights stay fp32
        D = config.n_embd

        # embeddings: of tokens, of segments, of positions
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
            width = ATTENTION[config.attention].rotary_width(config)
            cos, sin = rotary_tables(config.max_len, width, config.rotary_base)
            self.register_buffer("cos", cos, persistent=False)
            self.register_buffer("sin", sin, persistent=False)
        self.embedding_norm = nn.Identity()
        if config.embedding_norm:
            self.embedding_norm = make_norm(config)

        # blocks
        self.blocks = nn.ModuleList(Block(config) for _ in range(config.n_layer))
        if not config.first_norm:
            self.blocks[0].norm1 = nn.Identity()
        if config.embedding_skip:
            self.stream_scale = nn.Parameter(torch.ones(config.n_layer))
            self.skip_scale = nn.Parameter(torch.zeros(config.n_layer))

        # head
        self.final_norm = nn.Identity()
        if config.final_norm:
            self.final_norm = make_norm(config)
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

    @classmethod
    def from_run(cls, folder, **changes):
        """Return the model of a finished run, in fp32 on the CPU.

        changes: fields of its Config to replace, such as dropout=0.1.
        Raises FileNotFoundError or ValueError, with a message of one line.
        """
        path = Path(folder) / "model.pt"
        if not path.exists():
            hint = "run train.py first, or name the folder of a finished run"
            raise FileNotFoundError(f"{path} does not exist; {hint}")
        try:
            saved = torch.load(path, map_location="cpu", weights_only=True)  # can run no code
            config = Config(**saved["config"])
            model = cls(replace(config, **changes))
            weights = rename_old_parameters(saved["model"])
            if differing := weights.keys() ^ model.state_dict().keys():
                raise ValueError(f"today's model has other parameters ({min(differing)})")
            model.load_state_dict(weights)
        except Exception as e:
            why = (str(e).strip() or "no reason given").splitlines()[0]
            why = f"{type(e).__name__}: {why}"
            raise ValueError(f"{path} cannot be read (damaged, of another version?): {why}") from e

        # pretraining has seen one segment only: the others begin as the first
        if model.config.token_types:
            segments = model.type_embedding.weight.data
            segments[1:] = segments[0]
        return model

    def encode(self, ids, mask=None, types=None, positions=None):
        """Return the hidden states (B, T, D) of ids (B, T) int64.

        mask: (B, T) bool, True at real tokens; None means that there is no padding.
        types: (B, T) segment ids; None means that all are 0.
        positions: N indices into the flat batch, if only these are wanted; the result is (N, D).
        """
        c = self.config
        T = ids.size(1)
        if T > c.max_len:
            raise ValueError(f"a sequence of {T} tokens is longer than max_len = {c.max_len}")

        # which token, and in which segment
        x = embed(self.embedding.weight, ids)
        if c.token_types:
            segments = self.type_embedding.weight
            if types is None:
                x = x + segments[0]
            else:
                types = types.clamp(max=c.token_types - 1)
                x = x + F.embedding(types, segments)

        # at which position
        rotary = None
        if c.position == "learned":
            x = x + self.position_embedding.weight[:T]
        elif c.position == "scaled_sinusoidal":
            x = x + self.position_scale * self.sinusoid[:T]
        elif c.position == "sinusoidal":
            x = x + self.sinusoid[:T]
        elif c.position == "rotary":
            cos = self.cos[:T].to(self.dtype)
            sin = self.sin[:T].to(self.dtype)
            rotary = (cos, sin)
        x = self.embedding_norm(x.to(self.dtype))
        x = dropout(x, c.dropout, self.training)

        # the blocks, of which the last one need not compute everything
        embedded = x
        first_values = None
        for i, block in enumerate(self.blocks):
            if c.embedding_skip:
                x = self.stream_scale[i] * x + self.skip_scale[i] * embedded
            wanted = positions if i == c.n_layer - 1 else None
            x, first_values = block(x, mask, rotary, first_values, wanted)
        return self.final_norm(x)

    def logits(self, hidden):
        """Return the logits (..., vocab_size) of hidden states (..., D)."""
        c = self.config
        if c.head_transform:
            hidden = F.gelu(self.transform(hidden))
            hidden = self.transform_norm(hidden)
        weight = self.embedding.weight if c.tie_weights else self.decoder.weight
        bias = self.decoder_bias if c.decoder_bias else None
        return linear(hidden, weight, bias)

    def forward(self, ids, positions, targets=None):
        """Return the logits (N, vocab_size) at N positions, or with targets the mean loss in nats.

        ids: (B, T), the tokens, of which some are masked.
        positions: (N,), indices of the masked ones in the flat batch of B * T tokens.
        targets: (N,), the tokens that stood there.
        """
        # the loss is that of the masked tokens, so no other token needs logits: with 25 % masked
        # this saves three quarters of the product with the embedding, the largest of the model
        hidden = self.encode(ids, positions=positions)
        logits = self.logits(hidden)
        if targets is None:
            return logits
        return F.cross_entropy(logits.float(), targets)


class ClassificationHead(nn.Module):
    """The paper's head for GLUE: linear -> tanh -> dropout -> linear.

    width: channels of a pooled text. n_classes: 1 for regression. pooler_width: outputs of the
    first linear layer, 1024 in the paper, the model's own width for BERT's pretrained pooler.
    """

    def __init__(self, width, n_classes, dropout=0.1, pooler_width=1024):
        super().__init__()
        self.dropout = dropout
        self.pooler = nn.Linear(width, pooler_width)
        self.head = nn.Linear(pooler_width, n_classes)
        for layer in (self.pooler, self.head):
            nn.init.normal_(layer.weight, std=0.02)
            nn.init.zeros_(layer.bias)

    def forward(self, pooled):
        """Return (B, n_classes) of pooled texts (B, width)."""
        features = torch.tanh(self.pooler(pooled))
        features = dropout(features, self.dropout, self.training)
        return self.head(features)


def mean_of_tokens(hidden, mask):
    """Return (B, D), the mean of hidden (B, T, D) over the real tokens of mask (B, T)."""
    total = (hidden * mask[..., None]).sum(1)
    return total / mask.sum(1, keepdim=True)


class Classifier(ClassificationHead):
    """The encoder, and the head on the first position or on the mean of all."""

    def __init__(self, bert, n_classes, pooling="first", dropout=0.1, pooler_width=1024):
        super().__init__(bert.config.n_embd, n_classes, dropout, pooler_width)
        self.bert = bert
        self.pooling = pooling

    def forward(self, ids, mask, types=None):
        """Return (B, n_classes) in fp32. ids, mask, types: (B, T), as in BERT.encode."""
        if self.pooling == "first":
            B, T = ids.shape
            first = torch.arange(B, device=ids.device) * T
            pooled = self.bert.encode(ids, mask, types, first).float()
        else:
            hidden = self.bert.encode(ids, mask, types)
            pooled = mean_of_tokens(hidden.float(), mask)
        return super().forward(pooled)


def flops_per_token(config, seq_len, n_masked):
    """Return the model FLOPs of one training token, forward and backward (3 x forward).

    n_masked: masked positions in a row of seq_len tokens; the head and the last feed-forward layer
    are computed at these only. A multiply-add is two FLOPs. Norms, softmax and the Fourier
    transform are not counted.
    """
    D = config.n_embd
    attention = ATTENTION[config.attention]
    fraction = n_masked / seq_len
    block = attention.multiply_adds(config, seq_len)
    unneeded = 0

    # feed-forward, of which the last block computes a fraction
    if not attention.replaces_feed_forward:
        inner = config.n_inner // 2 if config.glu else config.n_inner
        feed_forward = D * config.n_inner + inner * D
        block += feed_forward
        unneeded = feed_forward * (1 - fraction)

    head = config.vocab_size * D
    if config.head_transform:
        head += D * D
    forward = config.n_layer * block - unneeded + head * fraction
    return math.floor(3 * 2 * forward)


def rename_old_parameters(weights):
    """Return a state dict with today's names: `blocks.0.qkv.weight` became a part of attention.

    Before the sublayers were modules, their parameters stood in the block itself.
    """
    sublayers = {"qkv": "attention", "out": "attention"}
    sublayers |= {"up": "feed_forward", "down": "feed_forward"}

    renamed = {}
    for name, tensor in weights.items():
        parts = name.split(".")
        if "blocks" in parts:
            at = parts.index("blocks") + 2
            if parts[at] in sublayers:
                parts.insert(at, sublayers[parts[at]])
        renamed[".".join(parts)] = tensor
    return renamed


# --------------------------------------------------------------------------------------------------
# What torch (2.13) is slow at, or does wrong, on a CPU. Each does what its name says.


def embed(table, ids):
    """Return F.embedding(ids, table), whose compiled gradient is slow."""
    rows = table.index_select(0, ids.flatten())
    return rows.view(*ids.shape, -1)


def attend(q, k, v, mask, p):
    """Return softmax(q k^T / sqrt(d)) v for q, k, v (B, H, T, d), with dropout p on the softmax.

    mask: (B, 1, 1, T) bool, True at keys that may be seen, or None.
    The backward pass of torch's own function took a third of a step.
    """
    if q.device.type != "cpu":
        return F.scaled_dot_product_attention(q, k, v, attn_mask=mask, dropout_p=p)
    q = q * q.size(-1) ** -0.5
    scores = q @ k.transpose(-2, -1)
    if mask is not None:
        scores = scores.masked_fill(~mask, float("-inf"))
    weights = dropout(scores.softmax(-1), p, p > 0)
    return weights @ v


def dropout(x, p, training):
    """Return F.dropout, with 16 bits of noise per value and so four values per draw.

    The noise of torch, with one draw per value, took a third of a fine-tuning step.
    """
    is_off = not training or p == 0
    if is_off or x.device.type != "cpu" or torch.compiler.is_compiling():
        return F.dropout(x, p, training)
    n = x.numel()
    draws = torch.empty(n // 4 + 1, dtype=torch.int64)
    draws.random_(-(2**63), None)  # all 64 bits
    noise = draws.view(torch.int16)[:n].view(x.shape)
    kept = noise >= round(p * 65536) - 32768
    factors = kept.to(x.dtype).mul_(1 / (1 - p))
    return x * factors


def swap_halves(x):
    """Return (b, a) for the halves (a, b) of the last dimension.

    Compiled, chunk-and-cat, flip and the like have gradients that are NaN, and roll is a scalar
    loop. A product with a permutation is exact, and made a step at 4 x 256 1.1 times as fast.
    """
    width = x.size(-1)
    if x.device.type == "cpu" and torch.compiler.is_compiling():
        identity = torch.eye(width, dtype=x.dtype)
        return x @ identity.roll(width // 2, dims=0)
    return x.roll(width // 2, dims=-1)


class LayerNorm(nn.LayerNorm):
    """Layer norm, always in fp32.

    In bf16 on a CPU the gradient of its bias, a sum over all tokens, was off by 54 %.
    """

    def forward(self, x):
        weight = self.weight.float()
        bias = self.bias.float()
        y = F.layer_norm(x.float(), self.normalized_shape, weight, bias, self.eps)
        return y.to(x.dtype)


class RMSNorm(nn.RMSNorm):
    """RMS norm (Zhang & Sennrich 2019), always in fp32."""

    def forward(self, x):
        weight = self.weight.float()
        y = F.rms_norm(x.float(), self.normalized_shape, weight, self.eps)
        return y.to(x.dtype)
