import pytest
import torch

from muon import ITERATIONS, Muon, orthogonalize


def matrix(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("shape", [(3, 32, 32), (2, 16, 64)])
def test_orthogonalize_is_the_polar_factor_roughly(shape):
    """Against the singular value decomposition: the same singular vectors, values in [0.65, 1.25]."""
    stack = matrix(*shape) + 12 * torch.eye(shape[1], shape[2])  # no singular value near zero
    found = orthogonalize(stack.bfloat16()).float()
    u, _, v = torch.linalg.svd(stack, full_matrices=False)
    inner = u.mT @ found @ v.mT
    diagonal = inner.diagonal(dim1=1, dim2=2)
    assert 0.65 < diagonal.min() and diagonal.max() < 1.25
    assert (inner - torch.diag_embed(diagonal)).abs().max() < 0.05


def test_orthogonalize_applies_the_quintic_to_the_singular_values():
    """In float64, where rounding hides nothing: x to 3.4445 x - 4.775 x^3 + 2.0315 x^5, once an iteration."""
    stack = matrix(3, 16, 24).double()
    u, s, v = torch.linalg.svd(stack, full_matrices=False)
    s = s / s.norm(dim=1, keepdim=True)
    for _ in range(ITERATIONS):
        s = 3.4445 * s - 4.775 * s**3 + 2.0315 * s**5
    assert torch.allclose(orthogonalize(stack), u @ torch.diag_embed(s) @ v, rtol=0, atol=1e-10)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("shape", [(24, 24), (16, 48), (48, 16)])
def test_steps_equal_torchs(shape, dtype):
    """Five steps of torch.optim.Muon with match_rms_adamw, weight decay and Nesterov, but for the rounding of bf16."""
    ours, theirs = (torch.nn.Parameter(matrix(*shape)) for _ in range(2))
    settings = {"lr": 0.02, "weight_decay": 0.1, "momentum": 0.95}
    as_ours = settings | {"adjust_lr_fn": "match_rms_adamw", "ns_steps": ITERATIONS}
    opts = [Muon([ours], dtype=dtype, **settings), torch.optim.Muon([theirs], **as_ours)]
    for i in range(5):
        for p, opt in zip((ours, theirs), opts):
            p.grad = matrix(*shape, seed=i + 1)
            opt.step()
    moved = (theirs - matrix(*shape)).norm()
    assert (ours - theirs).norm() < 0.03 * moved
    assert torch.equal(opts[0].state[ours]["momentum"], opts[1].state[theirs]["momentum_buffer"])


@pytest.mark.parametrize("dtype, error", [(torch.bfloat16, 3e-2), (torch.float16, 1e-4), (torch.float32, 1e-4)])
def test_iterations_are_in_fp32_unless_the_activations_are_in_bf16(dtype, error):
    """The first step, of a gradient that would be zero in fp16, against the iterations in float64."""
    p = torch.nn.Parameter(torch.zeros(16, 24))
    p.grad = 1e-6 * matrix(16, 24)
    Muon([p], 1.0, 0.0, dtype).step()
    exact = -0.2 * 24**0.5 * orthogonalize(p.grad.double()[None])[0]
    found = ((p - exact).norm() / exact.norm()).item()
    assert found < error and (found > 1e-4) == (dtype == torch.bfloat16)


@pytest.mark.parametrize("shape", [(24, 24), (16, 48), (48, 16)])
def test_parts_are_matrices_of_their_own_and_stacks_change_nothing(shape):
    pieces = [torch.nn.Parameter(matrix(*shape, seed=i)) for i in range(3)]
    whole = torch.nn.Parameter(torch.cat([p.detach() for p in pieces]))
    other, other_alone = (torch.nn.Parameter(matrix(shape[1], shape[0])) for _ in range(2))  # transposed, of the same stack
    together = Muon([{"params": [whole], "parts": 3}, {"params": [other]}], 0.02, 0.1, torch.bfloat16)
    alone = [Muon([p], 0.02, 0.1, torch.bfloat16) for p in [*pieces, other_alone]]
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
    opt = Muon([p], 0.02, 0.1, torch.bfloat16)
    p.grad = matrix(8, 8, seed=1)
    opt.step()
    before, momentum = p.detach().clone(), opt.state[p]["momentum"].clone()
    p.grad, opt.found_inf = torch.full((8, 8), float("nan")), torch.tensor(1.0)
    opt.step()
    assert torch.equal(p, before) and torch.equal(opt.state[p]["momentum"], momentum)
    p.grad, opt.found_inf = matrix(8, 8, seed=2), torch.tensor(0.0)
    opt.step()
    assert p.isfinite().all() and not torch.equal(p, before)
