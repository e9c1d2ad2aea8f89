"""Word embeddings that are counted instead of learned: the key count_tokens of pretraining.

A model from scratch spends its first hundreds of steps on how frequent words are and on which words
occur near which. Both can be counted in seconds.

Two tokens d apart count WINDOW + 1 - d times. n(w, c) is the sum for the tokens w and c, and n(w)
is its sum over all c. The positive pointwise mutual information of a token w and its context c is

    PPMI(w, c) = max(0, log n(w, c) / n(w) - log p(c)),  with p(c) proportional to n(c)^SMOOTHING.

It says how much more often c occurs near w than anywhere. Its best approximation in few dimensions
is U S V^T, which torch.svd_lowrank nearly finds. U S is the embedding (Levy, Goldberg & Dagan 2015,
TACL 3). In the rules of cramming word embeddings count as training, so counting is on the clock.
"""

import math

import numpy as np
import torch

WINDOW = 4  # tokens to each side
# of the contexts' frequencies, since a rare context says less about a word than its frequency
SMOOTHING = 0.75
# of a word's vector, if all words occur: the standard deviation of its logits over random hidden
# states of norm sqrt(width)
LENGTH = 2.56
SPANS = 64  # of rows, from everywhere in a corpus that may be sorted
STRIP = 4096  # rows of a matrix at a time, since a second matrix of its size may not fit in memory


@torch.no_grad()
def initialize_from_counts(model, rows, tokens):
    """Set the embedding of a model, and its decoder_bias if it has one, from counts.

    rows: (N, T) uint16, of which about as many tokens are counted as `tokens` says.
    """
    weight = model.embedding.weight
    vocab_size, width = weight.shape
    vectors, frequencies = word_vectors(rows, vocab_size, width, tokens)
    vectors = vectors.to(weight.device)
    frequencies = frequencies.to(weight.device)

    # a token that never occurs keeps its random vector: the norm of one near 0 has huge gradients
    is_seen = vectors.norm(dim=1, keepdim=True) > 0.1
    weight.copy_(vectors.where(is_seen, weight))
    if model.config.decoder_bias:
        model.decoder_bias.copy_(frequencies)


def word_vectors(rows, vocab_size, width, tokens):
    """Return (embedding (V, width), log-frequencies (V,)) from about as many tokens of the rows.

    rows: (N, T) uint16. The vocabulary must have `width` tokens or more. The vectors of tokens that
    never occur are 0, but for rounding. Works on the CPU, in 4 V^2 bytes and some strips.
    """
    counts = count_pairs(rows, vocab_size, tokens)

    # n(w), by strips: a sum over all of the matrix would first make int64 of it
    sums = [strip.sum(1) for strip in counts.split(STRIP)]
    n = torch.cat(sums).float()

    # p(c)
    contexts = n**SMOOTHING
    contexts = contexts / contexts.sum()
    contexts = contexts.clamp(min=1e-30)

    # PPMI, in the memory of the counts
    ppmi = counts.view(torch.float32)
    for i in range(0, vocab_size, STRIP):
        strip = slice(i, i + STRIP)
        row_sums = n[strip, None].clamp(min=1)
        # in one expression, so that no copy of the strip outlives it
        ppmi[strip] = counts[strip].div(row_sums).div_(contexts).clamp_(min=1).log_()

    # its best factors; the 16 that are cut again make the others more exact
    rank = min(width + 16, vocab_size)
    u, s, _ = torch.svd_lowrank(ppmi, q=rank, niter=2)
    vectors = u[:, :width] * s[:width]

    # a random rotation spreads them evenly over the dimensions, which Adam treats alike
    noise = torch.randn(width, width)
    rotation, _ = torch.linalg.qr(noise)
    vectors = vectors @ rotation

    std = vectors.std().clamp(min=1e-12)
    vectors = vectors * (LENGTH / width**0.5 / std)
    frequencies = n.clamp(min=1) / n.sum()
    return vectors, frequencies.log()


def count_pairs(rows, vocab_size, tokens):
    """Return n(w, c), (V, V) int32, from about as many tokens of the rows, (N, T) uint16."""
    counts = torch.zeros(vocab_size**2, dtype=torch.int32)

    # pairs in the order of the text, from the first rows of each span
    fraction = min(tokens / rows.size, 1.0)
    for span in np.array_split(rows, SPANS):
        n_rows = math.ceil(fraction * len(span))
        span = span[:n_rows].astype(np.int64)
        ids = torch.from_numpy(span)
        furthest = min(WINDOW, ids.size(1) - 1)
        for d in range(1, furthest + 1):
            first = ids[:, :-d]
            second = ids[:, d:]
            pairs = first * vocab_size + second  # indices into the flat matrix
            pairs = pairs.flatten()
            weight = torch.tensor(WINDOW + 1 - d, dtype=torch.int32)
            weights = weight.expand(len(pairs))
            counts.scatter_add_(0, pairs, weights)
    counts = counts.view(vocab_size, vocab_size)

    # counts + counts.T, for both orders, by strips above and left of the diagonal
    for i in range(0, vocab_size, STRIP):
        strip = slice(i, i + STRIP)
        row = counts[strip, i:]
        column = counts[i:, strip]
        both = row + column.T
        row.copy_(both)
        column.copy_(both.T)
    return counts
