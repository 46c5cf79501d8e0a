"""The training form against autograd on the formula; what it keeps; autocast, compile, export, DDP."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from clip_dissect_cvn.lwta import LWTA, lwta_straight_through

LAYOUTS = [((5, 12), -1), ((3, 5, 12), -1), ((2, 12, 3, 4), 1)]
each_layout = pytest.mark.parametrize(("shape", "dim"), LAYOUTS)


def seeded(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def gaussian(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=seeded(seed), dtype=torch.float64)


def reference(
    h: Tensor, competitors: int, *, dim: int, temperature: float, generator: torch.Generator
) -> Tensor:
    """method: hard * h forward, hard + h * d(soft)/dh backward, by autograd."""
    blocks = h.movedim(dim, -1).unflatten(-1, (-1, competitors))
    gumbel = -(-torch.rand(blocks.shape, dtype=h.dtype, generator=generator).log()).log()
    soft = ((blocks + gumbel) / temperature).softmax(-1)
    hard = torch.zeros_like(soft).scatter_(-1, (blocks + gumbel).argmax(-1, keepdim=True), 1)
    y = hard * blocks + blocks.detach() * (soft - soft.detach())
    return y.flatten(-2).movedim(-1, dim)


@each_layout
@pytest.mark.parametrize("temperature", [0.67, 0.1, 3.0])
@pytest.mark.parametrize("competitors", [2, 4, 12])
def test_value_and_gradient_equal_the_reference(
    shape: tuple[int, ...], dim: int, temperature: float, competitors: int
) -> None:
    h, upstream = gaussian(*shape).requires_grad_(), gaussian(*shape, seed=1)
    options = {"dim": dim, "temperature": temperature}
    ours = lwta_straight_through(h, competitors, generator=seeded(2), **options)
    theirs = reference(h, competitors, generator=seeded(2), **options)
    torch.testing.assert_close(ours, theirs)
    (got,), (expected,) = torch.autograd.grad(ours, h, upstream), torch.autograd.grad(theirs, h, upstream)
    torch.testing.assert_close(got, expected)


def test_gradient_survives_odd_layouts_of_the_upstream_gradient() -> None:
    h = gaussian(2, 12, 3, 4).requires_grad_()
    y = lwta_straight_through(h, 4, dim=1, generator=seeded())
    (plain,) = torch.autograd.grad(y, h, torch.ones_like(y), retain_graph=True)
    (expanded,) = torch.autograd.grad(y.sum(), h)
    torch.testing.assert_close(plain, expanded)


@pytest.mark.parametrize(("dtype", "most"), [(torch.float32, 8.5), (torch.bfloat16, 4.5)])
def test_backward_keeps_h_soft_and_the_winners(dtype: torch.dtype, most: float) -> None:
    h = torch.randn(64, 768, generator=seeded()).to(dtype).requires_grad_()
    kept: dict[int, int] = {}

    def weigh(saved: Tensor) -> Tensor:
        kept[saved.data_ptr()] = saved.untyped_storage().nbytes()
        return saved

    with torch.autograd.graph.saved_tensors_hooks(weigh, lambda saved: saved):
        lwta_straight_through(h, 16, generator=seeded())
    assert sum(kept.values()) / h.numel() <= most


def mlp(width: int = 16) -> nn.Sequential:
    return nn.Sequential(nn.Linear(8, width), LWTA(4), nn.Linear(width, 2))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("training", [True, False])
def test_autocast(dtype: torch.dtype, training: bool) -> None:
    model = mlp().train(training)
    seen: list[Tensor] = []
    model[1].register_forward_hook(lambda module, inputs, output: seen.append(output))
    with torch.autocast("cpu", dtype):
        model(torch.randn(32, 8, generator=seeded())).float().sum().backward()
    assert seen[0].dtype == dtype
    assert ((seen[0] != 0).view(32, 4, 4).sum(-1) == 1).all()
    assert model[0].weight.grad is not None
    assert model[0].weight.grad.isfinite().all()


def one_winner(y: Tensor, dim: int) -> bool:
    return bool(((y != 0).movedim(dim, -1).unflatten(-1, (-1, 4)).sum(-1) == 1).all())


@pytest.fixture
def fresh_compiler() -> Iterator[None]:
    if hasattr(LWTA.forward, "__wrapped__"):
        pytest.skip("dynamo does not trace jaxtyping's runtime checks")
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


@pytest.mark.usefixtures("fresh_compiler")
@pytest.mark.parametrize("training", [True, False])
def test_compiles_to_one_graph(training: bool) -> None:
    compiled = torch.compile(LWTA(4).train(training), fullgraph=True, backend="aot_eager")
    h = torch.randn(6, 12, generator=seeded()).requires_grad_()
    y = compiled(h)
    y.sum().backward()
    assert one_winner(y, -1)
    assert torch.equal(y[y != 0], h[y != 0])
    assert h.grad is not None
    assert (h.grad != 0).any()


@pytest.mark.slow
@pytest.mark.usefixtures("fresh_compiler")
@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("dynamic", [True, False])
@pytest.mark.parametrize(("shape", "dim"), [LAYOUTS[0], LAYOUTS[2]])
def test_compiles_with_inductor(training: bool, dynamic: bool, shape: tuple[int, ...], dim: int) -> None:
    compiled = torch.compile(LWTA(4, dim=dim).train(training), fullgraph=True, dynamic=dynamic)
    for images in (shape[0], shape[0] + 3):
        h = torch.randn(images, *shape[1:], generator=seeded()).requires_grad_()
        y = compiled(h)
        y.sum().backward()
        assert one_winner(y, dim)
        assert h.grad is not None
        assert (h.grad != 0).any()


@pytest.mark.parametrize("training", [True, False])
@each_layout
def test_exports(training: bool, shape: tuple[int, ...], dim: int) -> None:
    h = torch.randn(shape, generator=seeded())
    batch = {0: torch.export.Dim("batch", min=2)}
    program = torch.export.export(LWTA(4, dim=dim).train(training), (h,), dynamic_shapes=(batch,))
    y = program.module()(torch.cat([h, h]))
    assert one_winner(y, dim)


@pytest.mark.slow
def test_distributed_data_parallel(tmp_path: Path) -> None:
    torch.distributed.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    try:
        model = nn.parallel.DistributedDataParallel(mlp())
        model(torch.randn(32, 8, generator=seeded())).sum().backward()
        assert all(weight.grad is not None and weight.grad.isfinite().all() for weight in model.parameters())
        assert "module.0.weight" in model.state_dict()
    finally:
        torch.distributed.destroy_process_group()
