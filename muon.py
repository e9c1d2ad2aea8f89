"""Muon for the matrices of the blocks: momentum whose singular values are all brought near 1 (Jordan et al. 2024).

Differs from torch.optim.Muon, against which it is tested, where that costs time or quality here: matrices of one shape are
orthogonalised as one stack; what one parameter holds of several matrices (queries, keys, values) is treated as several;
and a step whose gradient is not finite leaves itself out on the device, like the fused AdamW.
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
    """lr means what it means in AdamW: a step has the usual root mean square of AdamW's, 0.2 lr (Liu et al. 2025).

    params: groups with `parts`, the number of matrices of equal shape that each (parts * rows, columns) parameter holds.
    dtype: of the activations. The iterations are in bf16 where they are, else in fp32: a processor without bf16 takes a
    hundred times as long for its products, and the gradients are too small for fp16.
    """

    def __init__(self, params, lr, weight_decay, dtype, momentum=0.95):
        super().__init__(params, {"lr": lr, "weight_decay": weight_decay, "momentum": momentum, "parts": 1})
        self.dtype = torch.bfloat16 if dtype == torch.bfloat16 else torch.float32
        self.found_inf = None  # or 1.0 on the device, to leave a step out

    @torch.no_grad()
    def step(self):
        stacks = defaultdict(list)  # by shape, wide: [(parameter, step size, its nesterov momentum as (parts, a, b))]
        for group in self.param_groups:
            for p in group["params"]:
                if "momentum" not in self.state[p]:
                    self.state[p]["momentum"] = torch.zeros_like(p)
                momentum, grad, rate = self.state[p]["momentum"], p.grad, group["lr"]
                if self.found_inf is not None:
                    rate = rate * (1 - self.found_inf)
                    grad = torch.where(self.found_inf > 0, momentum, grad)  # which leaves the momentum as it is
                momentum.lerp_(grad, 1 - group["momentum"])
                p.mul_(1 - rate * group["weight_decay"])
                update = grad.lerp(momentum, group["momentum"]).to(self.dtype).unflatten(0, (group["parts"], -1))
                update = update.mT if update.size(1) > update.size(2) else update
                stacks[update.shape[1:]].append((p, rate * 0.2 * update.size(2) ** 0.5, update))
        for entries in stacks.values():
            results = orthogonalize(torch.cat([update for _, _, update in entries]))
            for (p, rate, update), result in zip(entries, results.split([len(update) for _, _, update in entries])):
                rows = p.size(0) // len(update)
                result = (result if result.size(1) == rows else result.mT).reshape(p.shape)
                p.sub_(result.float().mul_(rate))  # on a CPU the difference of two dtypes is slow
