"""NorMuon for the matrices of the blocks (Li et al. 2025, arXiv 2510.05491), and Adam for the rest.

Adam scales each weight's step on its own. Muon (Jordan et al. 2024) looks at the step of a weight
matrix as a whole. A gradient has few large singular values and many small ones, so a plain step
moves the layer in few directions only. Muon sets all singular values to about 1, which is called
orthogonalising, and so moves the layer equally far in every direction. NorMuon adds Adam's idea for
each row, which holds the weights of one neuron. One step:

1. momentum: a running mean of the gradients, in Nesterov's form
2. orthogonalise it
3. divide each row by the root mean square of its steps so far
4. scale to the size that a step of AdamW usually has, decay the weights, and subtract

Steps 1 and 2 are those of torch.optim.Muon, against which they are tested, with three differences
that save time or improve quality here. Matrices of one shape are orthogonalised together, as one
stack. A parameter that holds several matrices, such as queries, keys and values, is treated as
several. A step whose gradient is not finite is left out on the device, as in the fused AdamW.
"""

from collections import defaultdict

import torch

# of the polynomial a x + b x^3 + c x^5 by Jordan et al., chosen for a steep slope at zero
COEFFICIENTS = (3.4445, -4.7750, 2.0315)
ITERATIONS = 4
RMS_OF_ADAMW = 0.2  # root mean square of a usual step of AdamW, per lr (Liu et al. 2025)


def make_optimizers(model, name, learning_rate, weight_decay, betas, eps):
    """Return the optimizers of a BERT or a Classifier: one of torch's, then NorMuon if asked.

    name: "adamw", "muon" (NorMuon for matrices of the blocks, AdamW for the rest), or Adam, RAdam,
    NAdam, Adafactor of torch.optim. betas, eps: of all but Adafactor, which keeps its own.

    The decay is decoupled: it shrinks the weights themselves (Loshchilov & Hutter 2019). Only Adam
    adds it to the gradient, as torch has it and as [repo] ran "original training". There it is
    divided by the size of the gradient, so it takes weights with small gradients to zero. BERT's
    own optimizer decouples it.

    Matrices and embeddings decay; norms, biases and scalars do not (deviation: [repo] decays the
    position scalar).
    """
    matrices = []
    rest = list(model.parameters())
    if name == "muon":
        matrices, rest = split_parameters(model)

    decayed = [p for p in rest if p.ndim >= 2]
    exempt = [p for p in rest if p.ndim < 2]
    groups = [
        {"params": decayed, "weight_decay": weight_decay},
        {"params": exempt, "weight_decay": 0.0},
    ]
    common = {"lr": learning_rate, "betas": betas, "eps": eps}
    if name == "Adafactor":
        return [torch.optim.Adafactor(groups, lr=learning_rate)]
    if name in ("RAdam", "NAdam"):
        kind = getattr(torch.optim, name)
        return [kind(groups, **common, decoupled_weight_decay=True)]
    if name == "Adam":
        return [torch.optim.Adam(groups, **common, fused=True)]

    optimizers = [torch.optim.AdamW(groups, **common, fused=True)]
    if name == "muon":
        dtype = bert_of(model).dtype
        optimizers.append(NorMuon(matrices, learning_rate, weight_decay, dtype))
    return optimizers


def step_unless(is_bad, optimizer):
    """Take a step, unless is_bad, a bool tensor of one value on the optimizer's device.

    NorMuon and the fused optimizers of torch decide that on the device, so the program need not
    wait for it. The others ignore found_inf, or raise if it is set.
    """
    decides_itself = isinstance(optimizer, NorMuon) or optimizer.defaults.get("fused")
    if decides_itself and is_bad.device.type != "mps":  # whose fused step ignores found_inf, too
        optimizer.found_inf = is_bad.float()
        optimizer.step()
    elif not is_bad:
        optimizer.step()


def bert_of(model):
    """Return the BERT that a Classifier holds, or the model itself."""
    return getattr(model, "bert", model)


def split_parameters(model):
    """Return (groups for NorMuon, list of all other parameters).

    The groups hold the matrices of the blocks. `parts` of a group is the number of matrices in each
    of its parameters: 3 for queries, keys and values, 2 for the halves of a gated layer, else 1.
    """
    is_gated = bert_of(model).config.glu
    matrices = defaultdict(list)
    rest = []
    for name, p in model.named_parameters():
        if p.ndim != 2 or "blocks." not in name:
            rest.append(p)
            continue
        layer = name.split(".")[-2]
        if layer == "qkv":
            parts = 3
        elif layer == "up" and is_gated:
            parts = 2
        else:
            parts = 1
        matrices[parts].append(p)
    groups = [{"params": params, "parts": parts} for parts, params in matrices.items()]
    return groups, rest


def orthogonalize(stack):
    """Return nearly the nearest matrices with orthonormal rows, for a stack (n, a, b) with a <= b.

    X becomes a X + b (X X^T) X + c (X X^T)^2 X, several times. That leaves the singular vectors as
    they are and applies a x + b x^3 + c x^5 to the singular values, without computing any of them.
    Those above 1 % of the root of the sum of their squares end up in [0.65, 1.25]; smaller ones
    grow 140-fold. The result has the dtype of the stack.
    """
    a, b, c = COEFFICIENTS

    # no singular value is above 1 after this
    norm = stack.norm(dim=(1, 2), keepdim=True)
    x = stack / norm.clamp(min=1e-7)

    for _ in range(ITERATIONS):
        # for G = X X^T, a I + b G + c G^2 is c (G + b / 2c I)^2 + (a - b^2 / 4c) I, whose sums
        # change the diagonals only
        factor = x @ x.mT
        diagonal = factor.diagonal(dim1=1, dim2=2)
        diagonal.add_(b / (2 * c))
        factor = torch.baddbmm(factor, factor, factor, beta=0, alpha=c)
        diagonal = factor.diagonal(dim1=1, dim2=2)
        diagonal.add_(a - b * b / (4 * c))
        x = factor @ x
    return x


class NorMuon(torch.optim.Optimizer):
    """Algorithm 1 of the paper, with Nesterov momentum.

    params: groups with `parts`, the number of matrices of equal shape that a parameter of shape
    (parts * rows, columns) holds.
    lr means what it means in AdamW, since the steps have the same size.
    dtype: of the activations. The iterations are in bf16 if the activations are, else in fp32: the
    products of a processor without bf16 would take a hundred times as long, and the gradients are
    too small for fp16.
    """

    def __init__(self, params, lr, weight_decay, dtype, momentum=0.95, beta2=0.95):
        defaults = {
            "lr": lr,
            "weight_decay": weight_decay,
            "momentum": momentum,
            "beta2": beta2,
            "parts": 1,
        }
        super().__init__(params, defaults)
        self.dtype = torch.bfloat16 if dtype == torch.bfloat16 else torch.float32
        # a tensor on the device, 1.0 to leave the next step out; the name is that of torch's own
        self.found_inf = None

    @torch.no_grad()
    def step(self):
        # stack the matrices of one shape: few large products are faster than many small ones
        stacks = defaultdict(list)
        for group in self.param_groups:
            for p in group["params"]:
                update = self.momentum_update(p, group)
                stacks[update.shape[1:]].append((group, p, update))

        for entries in stacks.values():
            updates = [update for _, _, update in entries]
            sizes = [len(update) for update in updates]
            results = orthogonalize(torch.cat(updates)).split(sizes)
            for (group, p, _), result in zip(entries, results):
                self.apply_update(p, group, result)

    def momentum_update(self, p, group):
        """Return step 1 of a parameter, (parts, a, b) with a <= b, in the dtype of iterations."""
        parts = group["parts"]
        grad = p.grad
        state = self.state[p]
        if not state:
            state["momentum"] = torch.zeros_like(p)
            rows = len(p) // parts
            state["mean_squares"] = p.new_zeros(parts, rows, 1)  # of the steps of each row

        # a gradient that equals the momentum leaves the momentum as it is
        if self.found_inf is not None:
            grad = torch.where(self.found_inf > 0, state["momentum"], grad)
        state["momentum"].lerp_(grad, 1 - group["momentum"])

        update = grad.lerp(state["momentum"], group["momentum"])
        update = update.to(self.dtype).unflatten(0, (parts, -1))
        rows, columns = update.shape[1:]
        return update.mT if rows > columns else update

    def apply_update(self, p, group, update):
        """Take steps 3 and 4 for a parameter, whose orthogonalised update is (parts, a, b)."""
        factor = 1.0
        if self.found_inf is not None:
            factor = 1 - self.found_inf  # 0 leaves the step out
        mean_squares = self.state[p]["mean_squares"]
        if update.size(1) != mean_squares.size(1):
            update = update.mT
        update = update.float()

        # divide each row by the root mean square of its steps
        mean_square = update.square().mean(2, keepdim=True)
        mean_squares.lerp_(mean_square, (1 - group["beta2"]) * factor)
        update = update / (mean_squares.sqrt() + 1e-8)

        # decay the weights, and subtract a step whose root mean square is 0.2 lr
        rate = group["lr"] * factor
        size = update.square().mean((1, 2), keepdim=True)
        size = size.sqrt() + 1e-8
        p.mul_(1 - rate * group["weight_decay"])
        step = update * (RMS_OF_ADAMW * rate / size)
        p.sub_(step.reshape(p.shape))
