"""Word embeddings to begin with, counted instead of learned: the key count_tokens of train.py.

A model from scratch spends its first hundreds of steps on how frequent words are and on which stand near which. Both can be
counted in seconds. A pair of tokens d apart counts WINDOW + 1 - d times; n(w, c) is the sum for the tokens w and c, n(w) that
over all c. The positive pointwise mutual information of w and its context c,

    PPMI(w, c) = max(0, log n(w, c) / n(w) - log p(c)),  p(c) ~ n(c)^SMOOTHING,

is approximated best in few dimensions by U S V^T (nearly so by torch.svd_lowrank), and U S is the embedding (Levy, Goldberg &
Dagan 2015, TACL 3). In the rules of cramming word embeddings count as training: train.py has their seconds on its clock.
"""

import math

import numpy as np
import torch

WINDOW = 4  # tokens to each side
SMOOTHING = 0.75  # of the contexts' frequencies: a rare one says less about a word than its share suggests
# Of a word's vector, where all words occur: so much do its logits vary over random hidden states, of norm sqrt(width).
LENGTH = 2.56
SPANS = 64  # of rows, from all over a corpus that may be sorted
STRIP = 4096  # rows of a matrix at a time, where a second one of its size may not fit


def count_pairs(rows, vocab_size, tokens):
    """n(w, c) of about as many tokens of the rows, (N, T) uint16, as (V, V) int32."""
    counts, share = torch.zeros(vocab_size**2, dtype=torch.int32), min(tokens / rows.size, 1.0)
    for span in np.array_split(rows, SPANS):
        ids = torch.from_numpy(span[: math.ceil(share * len(span))].astype(np.int64))
        for d in range(1, min(WINDOW + 1, ids.size(1))):
            pairs = (ids[:, :-d] * vocab_size + ids[:, d:]).flatten()
            counts.scatter_add_(0, pairs, torch.tensor(WINDOW + 1 - d, dtype=torch.int32).expand(len(pairs)))
    counts = counts.view(vocab_size, vocab_size)
    for i in range(0, vocab_size, STRIP):  # counts + counts.T
        part = slice(i, i + STRIP)
        strip = counts[part, i:] + counts[i:, part].T
        counts[part, i:] = strip
        counts[i:, part] = strip.T
    return counts


def word_vectors(rows, vocab_size, width, tokens):
    """(embedding (V, width), log-frequencies (V,)) out of about as many tokens of the rows, (N, T) uint16, from all over them.

    Works on the CPU, in 4 V^2 bytes and some strips; V must be `width` or more. A random rotation spreads the embedding evenly
    over the dimensions, which Adam treats alike. The vectors of tokens that never occur are 0 but for rounding.
    """
    counts = count_pairs(rows, vocab_size, tokens)
    n = torch.cat([strip.sum(1) for strip in counts.split(STRIP)]).float()  # whole, sum would make int64 of all first
    contexts = n**SMOOTHING
    contexts = (contexts / contexts.sum()).clamp(min=1e-30)
    pmi = counts.view(torch.float32)  # in their place
    for i in range(0, vocab_size, STRIP):
        part = slice(i, i + STRIP)
        pmi[part] = counts[part].div(n[part, None].clamp(min=1)).div_(contexts).clamp_(min=1).log_()
    u, s, _ = torch.svd_lowrank(pmi, q=min(width + 16, vocab_size), niter=2)
    vectors = (u[:, :width] * s[:width]) @ torch.linalg.qr(torch.randn(width, width)).Q
    return vectors * (LENGTH / width**0.5 / vectors.std().clamp(min=1e-12)), (n.clamp(min=1) / n.sum()).log()


@torch.no_grad()
def begin_with_counts(model, rows, tokens):
    """Puts the word vectors into the embedding of the model, and the log-frequencies into its decoder_bias if it has one."""
    weight = model.embedding.weight
    vectors, frequencies = (x.to(weight.device) for x in word_vectors(rows, *weight.shape, tokens))
    seen = vectors.norm(dim=1, keepdim=True) > 0.1  # the norm of a vector near 0 has huge gradients
    weight.copy_(vectors.where(seen, weight))
    if model.config.decoder_bias:
        model.decoder_bias.copy_(frequencies)
