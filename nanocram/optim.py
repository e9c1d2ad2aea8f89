"""NorMuon for the matrices of the blocks (Li et al. 2025, arXiv 2510.05491).

Momentum, whose singular values are all brought near 1 (Muon, Jordan et al. 2024), and then its rows, those of one neuron
each, to a root mean square near 1 in the long run. The first half differs from torch.optim.Muon, against which it is
tested, where that costs time or quality here: matrices of one shape are orthogonalised as one stack; what one parameter
holds of several matrices (queries, keys, values) is treated as several; and a step whose gradient is not finite leaves
itself out on the device, like the fused AdamW.
"""

from collections import defaultdict

import torch

COEFFICIENTS = 3.4445, -4.7750, 2.0315  # of the quintic whose slope at zero is the steepest
ITERATIONS = 4


def split(model, glu):
    """(groups for Muon: the blocks' matrices; the parameters of all else).

    Queries, keys and values, and the halves of a gated layer, count each for itself.
    """
    groups, rest = defaultdict(list), []
    for name, p in model.named_parameters():
        if p.ndim == 2 and "blocks." in name:
            groups[3 if "qkv" in name else 2 if "up" in name and glu else 1].append(p)
        else:
            rest.append(p)
    return [{"params": params, "parts": n} for n, params in groups.items()], rest


def orthogonalize(stack):
    """(n, a, b), a <= b, to nearly the nearest matrices with orthonormal rows, in the dtype of the stack.

    Singular values above 1 % of the root of the sum of their squares come to [0.65, 1.25], smaller ones grow 140-fold.
    """
    a, b, c = COEFFICIENTS
    x = stack / stack.norm(dim=(1, 2), keepdim=True).clamp(min=1e-7)  # no singular value above 1
    for _ in range(ITERATIONS):
        # a I + b G + c G^2 as c (G + b / 2c)^2 + a - b^2 / 4c: the sums are on the diagonal alone
        factor = x @ x.mT
        factor.diagonal(dim1=1, dim2=2).add_(b / (2 * c))
        factor = torch.baddbmm(factor, factor, factor, beta=0, alpha=c)
        factor.diagonal(dim1=1, dim2=2).add_(a - b * b / (4 * c))
        x = factor @ x
    return x


class Muon(torch.optim.Optimizer):
    """Algorithm 1 of the paper, with Nesterov momentum.

    lr means what it means in AdamW: a step has the usual root mean square of AdamW's, 0.2 lr (Liu et al. 2025).
    params: groups with `parts`, the number of matrices of equal shape that each (parts * rows, columns) parameter holds.
    dtype: of the activations. The iterations are in bf16 where they are, else in fp32: a processor without bf16 takes a
    hundred times as long for its products, and the gradients are too small for fp16.
    """

    def __init__(self, params, lr, weight_decay, dtype, momentum=0.95, beta2=0.95):
        defaults = {"lr": lr, "weight_decay": weight_decay, "momentum": momentum, "beta2": beta2, "parts": 1}
        super().__init__(params, defaults)
        self.dtype = torch.bfloat16 if dtype == torch.bfloat16 else torch.float32
        self.found_inf = None  # or 1.0 on the device, to leave a step out

    @torch.no_grad()
    def step(self):
        done = 1.0 if self.found_inf is None else 1 - self.found_inf
        stacks = defaultdict(list)  # by shape, wide: [(group, parameter, its nesterov momentum as (parts, a, b))]
        for group in self.param_groups:
            for p in group["params"]:
                state, grad, parts = self.state[p], p.grad, group["parts"]
                if not state:
                    state["momentum"] = torch.zeros_like(p)
                    state["mean_squares"] = p.new_zeros(parts, len(p) // parts, 1)  # of each row's steps
                if self.found_inf is not None:
                    grad = torch.where(self.found_inf > 0, state["momentum"], grad)  # which leaves it as it is
                state["momentum"].lerp_(grad, 1 - group["momentum"])
                update = grad.lerp(state["momentum"], group["momentum"]).to(self.dtype).unflatten(0, (parts, -1))
                update = update.mT if update.size(1) > update.size(2) else update
                stacks[update.shape[1:]].append((group, p, update))
        for entries in stacks.values():
            updates = [update for _, _, update in entries]
            results = orthogonalize(torch.cat(updates)).split([len(update) for update in updates])
            for (group, p, _), result in zip(entries, results):
                mean_squares, rate = self.state[p]["mean_squares"], group["lr"] * done
                result = (result if result.size(1) == mean_squares.size(1) else result.mT).float()
                mean_squares.lerp_(result.square().mean(2, keepdim=True), (1 - group["beta2"]) * done)
                result = result / (mean_squares.sqrt() + 1e-8)
                size = result.square().mean((1, 2), keepdim=True).sqrt() + 1e-8
                p.mul_(1 - rate * group["weight_decay"]).sub_((result * (0.2 * rate / size)).reshape(p.shape))
