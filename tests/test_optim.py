import numpy as np
import pytest
import torch

from nanocram.optim import ITERATIONS, NorMuon, make_optimizers, orthogonalize, step_unless


def matrix(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("shape", [(3, 32, 32), (2, 16, 64)])
def test_orthogonalize_is_the_polar_factor_roughly(shape):
    """Against a singular value decomposition: the same vectors, and values in [0.65, 1.25]."""
    stack = matrix(*shape) + 12 * torch.eye(shape[1], shape[2])  # no singular value near zero
    found = orthogonalize(stack.bfloat16()).float()
    u, _, v = torch.linalg.svd(stack, full_matrices=False)
    inner = u.mT @ found @ v.mT
    diagonal = inner.diagonal(dim1=1, dim2=2)
    assert 0.65 < diagonal.min() and diagonal.max() < 1.25
    assert (inner - torch.diag_embed(diagonal)).abs().max() < 0.05


def test_orthogonalize_applies_the_quintic_to_the_singular_values():
    """In float64, so that rounding hides nothing: 3.4445 x - 4.775 x^3 + 2.0315 x^5 each time."""
    stack = matrix(3, 16, 24).double()
    u, s, v = torch.linalg.svd(stack, full_matrices=False)
    s = s / s.norm(dim=1, keepdim=True)
    for _ in range(ITERATIONS):
        s = 3.4445 * s - 4.775 * s**3 + 2.0315 * s**5
    assert torch.allclose(orthogonalize(stack), u @ torch.diag_embed(s) @ v, rtol=0, atol=1e-10)


@pytest.mark.parametrize("shape", [(24, 24), (16, 48), (48, 16)])
def test_steps_are_algorithm_1_of_normuon_after_torchs_muon(shape):
    """Five steps: torch.optim.Muon, then as in the paper; equal but for the rounding of bf16."""
    ours, theirs = torch.nn.Parameter(matrix(*shape)), torch.nn.Parameter(torch.zeros(shape))
    opt = NorMuon([ours], 0.02, 0.1, torch.bfloat16)
    torchs = torch.optim.Muon(
        [theirs], lr=1.0, weight_decay=0.0, momentum=0.95, ns_steps=ITERATIONS
    )
    expected, v = matrix(*shape).double().numpy(), np.zeros((shape[0], 1))
    for i in range(5):
        ours.grad = (
            matrix(*shape, seed=i + 1) * torch.logspace(0, -1, shape[0])[:, None]
        )  # rows of unequal size
        theirs.grad, before = ours.grad, theirs.detach().clone()
        opt.step()
        torchs.step()
        o = (before - theirs.detach()).double().numpy()
        v = 0.95 * v + 0.05 * (o**2).mean(1, keepdims=True)
        o = o / np.sqrt(v)
        expected = (
            expected * (1 - 0.02 * 0.1) - 0.02 * 0.2 * np.sqrt(o.size) / np.linalg.norm(o) * o
        )
    moved = np.linalg.norm(expected - matrix(*shape).numpy())
    assert np.linalg.norm(ours.detach().numpy() - expected) < 0.03 * moved
    assert torch.equal(opt.state[ours]["momentum"], torchs.state[theirs]["momentum_buffer"])


@pytest.mark.parametrize(
    "dtype, error", [(torch.bfloat16, 3e-2), (torch.float16, 1e-4), (torch.float32, 1e-4)]
)
def test_iterations_are_in_fp32_unless_the_activations_are_in_bf16(dtype, error):
    """Algorithm 1 in float64, on two matrices of one parameter with gradients of zero in fp16."""
    p, scale = (
        torch.nn.Parameter(torch.zeros(48, 16)),
        torch.tensor([1e-6, 1e-7]).repeat_interleave(24)[:, None],
    )
    opt = NorMuon([{"params": [p], "parts": 2}], 1.0, 0.0, dtype)
    momentum, v, expected = (torch.zeros(2, 24, n).double() for n in (16, 1, 16))
    for i in range(5):
        p.grad = scale * matrix(48, 16, seed=i)
        opt.step()
        grad = p.grad.double().view(2, 24, 16)
        momentum = 0.95 * momentum + 0.05 * grad
        o = orthogonalize((0.05 * grad + 0.95 * momentum).mT).mT
        v = 0.95 * v + 0.05 * o.square().mean(2, keepdim=True)
        o = o / v.sqrt()
        expected -= 0.2 * (24 * 16) ** 0.5 * o / torch.linalg.matrix_norm(o, keepdim=True)
    found = ((p - expected.view(48, 16)).norm() / expected.norm()).item()
    assert found < error and (found > 1e-4) == (dtype == torch.bfloat16)


@pytest.mark.parametrize("shape", [(24, 24), (16, 48), (48, 16)])
def test_parts_are_matrices_of_their_own_and_stacks_change_nothing(shape):
    pieces = [torch.nn.Parameter(matrix(*shape, seed=i)) for i in range(3)]
    whole = torch.nn.Parameter(torch.cat([p.detach() for p in pieces]))
    other, other_alone = (
        torch.nn.Parameter(matrix(shape[1], shape[0])) for _ in range(2)
    )  # transposed, of the same stack
    together = NorMuon(
        [{"params": [whole], "parts": 3}, {"params": [other]}], 0.02, 0.1, torch.bfloat16
    )
    alone = [NorMuon([p], 0.02, 0.1, torch.bfloat16) for p in [*pieces, other_alone]]
    for i, p in enumerate(pieces):
        p.grad = matrix(*shape, seed=10 + i)
    whole.grad = torch.cat([p.grad for p in pieces])
    other.grad = other_alone.grad = matrix(shape[1], shape[0], seed=20)
    for opt in (together, *alone):
        opt.step()
    moved = (other - other_alone).norm(), (other - matrix(shape[1], shape[0])).norm()
    assert moved[0] < 0.01 * moved[1]
    start = torch.cat([matrix(*shape, seed=i) for i in range(3)])
    assert (whole - torch.cat(list(pieces))).norm() < 0.01 * (whole - start).norm()


def test_a_gradient_that_is_not_finite_changes_nothing():
    p = torch.nn.Parameter(matrix(8, 8))
    opt = NorMuon([p], 0.02, 0.1, torch.bfloat16)
    p.grad = matrix(8, 8, seed=1)
    opt.step()
    before, state = p.detach().clone(), {k: v.clone() for k, v in opt.state[p].items()}
    p.grad, opt.found_inf = torch.full((8, 8), float("nan")), torch.tensor(1.0)
    opt.step()
    assert torch.equal(p, before) and all(torch.equal(opt.state[p][k], v) for k, v in state.items())
    p.grad, opt.found_inf = matrix(8, 8, seed=2), torch.tensor(0.0)
    opt.step()
    assert p.isfinite().all() and not torch.equal(p, before)


# --------------------------------------------------------------------------------------------------
# The optimizers of torch


class OneMatrix(torch.nn.Module):
    """Looks like a model to make_optimizers: one matrix that decays, one vector that does not."""

    def __init__(self):
        super().__init__()
        self.matrix = torch.nn.Parameter(matrix(4, 3))
        self.vector = torch.nn.Parameter(matrix(1, 3)[0])


def one_step(name, gradient):
    """Return (matrix, vector) before and after a step with lr 0.1 and a decay of 0.5."""
    model = OneMatrix()
    before = [p.detach().clone() for p in model.parameters()]
    (opt,) = make_optimizers(model, name, 0.1, 0.5, betas=(0.9, 0.98), eps=1e-6)
    for p in model.parameters():
        p.grad = torch.full_like(p, gradient)
    step_unless(torch.tensor(False), opt)
    return before, [p.detach() for p in model.parameters()]


@pytest.mark.parametrize("name", ["adamw", "RAdam", "NAdam", "Adafactor"])
def test_decay_is_decoupled(name):
    """Without a gradient a weight is multiplied by 1 - lr * decay, and nothing else happens."""
    before, after = one_step(name, 0.0)
    assert torch.allclose(after[0], before[0] * (1 - 0.1 * 0.5), rtol=1e-6)
    assert torch.equal(after[1], before[1])


def test_adam_alone_has_its_decay_in_the_gradient():
    """As the authors ran it: Adam's first step has the size lr whatever the gradient's size."""
    before, after = one_step("Adam", 0.0)
    assert torch.allclose(after[0], before[0] - 0.1 * before[0].sign(), atol=1e-4)
    assert torch.equal(after[1], before[1])


def test_small_gradients_do_not_let_decoupled_decay_take_a_weight_to_zero():
    """What broke BERT's recipe: 300 steps of gradients that have no mean, and are small."""
    sizes = {}
    for name in ("Adam", "adamw"):
        model = OneMatrix()
        (opt,) = make_optimizers(model, name, 1e-2, 0.01, betas=(0.9, 0.98), eps=1e-8)
        for i in range(300):
            for p in model.parameters():
                p.grad = 1e-4 * matrix(*p.shape, seed=i)
            step_unless(torch.tensor(False), opt)
        sizes[name] = model.matrix.abs().mean().item()
    assert sizes["Adam"] < 0.1 and sizes["adamw"] > 0.5


@pytest.mark.parametrize("name", ["adamw", "muon", "Adam", "RAdam", "NAdam", "Adafactor"])
def test_a_bad_step_changes_neither_weights_nor_moments(name):
    from test_model import bert

    model = bert()
    optimizers = make_optimizers(model, name, 0.1, 0.5, betas=(0.9, 0.98), eps=1e-6)
    for is_bad, value in ((False, 1e-3), (True, float("nan")), (False, 1e-3)):
        before = [p.detach().clone() for p in model.parameters()]
        old = [[v.clone() for s in opt.state.values() for v in s.values()] for opt in optimizers]
        for p in model.parameters():
            p.grad = torch.full_like(p, value)
        for opt in optimizers:
            step_unless(torch.tensor(is_bad), opt)
        new = [[v for s in opt.state.values() for v in s.values()] for opt in optimizers]
        if is_bad:
            assert all(torch.equal(a, b) for a, b in zip(before, model.parameters()))
            assert all(torch.equal(a, b) for x, y in zip(old, new) for a, b in zip(x, y))
        else:
            assert not any(torch.equal(a, b) for a, b in zip(before, model.parameters()))
    assert all(p.isfinite().all() for p in model.parameters())
