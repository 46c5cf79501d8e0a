"""Competition: exact draws from Pi, one winner a block on the right axis, visible NaN, errors."""

from __future__ import annotations

import copy
import math
import pickle

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats
from torch import Tensor

from clip_dissect_cvn.errors import ArgumentError
from clip_dissect_cvn.lwta import (
    LWTA,
    Competition,
    compete,
    lwta,
    lwta_kl,
    lwta_max,
    lwta_straight_through,
    win_probability,
)

LAYOUTS = [((6, 12), -1), ((3, 5, 12), 2), ((2, 3, 4, 12), -1), ((2, 12, 3, 5), 1), ((2, 12, 3, 5), -3)]
FORMS = {"lwta": lwta, "lwta_max": lwta_max, "lwta_straight_through": lwta_straight_through}
each_form = pytest.mark.parametrize("form", FORMS.values(), ids=FORMS)
each_layout = pytest.mark.parametrize(("shape", "dim"), LAYOUTS)


def seeded(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def gaussian(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=seeded(seed))


def blocks_of(h: Tensor, competitors: int, dim: int) -> Tensor:
    """Gather h as (images, *positions, blocks, competitors), unit by unit."""
    units = h.movedim(dim, -1).unbind(-1)
    rows = [torch.stack(units[i : i + competitors], -1) for i in range(0, len(units), competitors)]
    return torch.stack(rows, -2)


@each_form
@each_layout
@pytest.mark.parametrize("competitors", [2, 4, 12])
def test_one_winner_a_block_passes_its_response(
    form, shape: tuple[int, ...], dim: int, competitors: int
) -> None:
    h = gaussian(*shape)
    y = form(h, competitors, dim=dim)
    assert (y.shape, y.dtype, y.stride()) == (h.shape, h.dtype, h.stride())
    winners = blocks_of(y != 0, competitors, dim)
    assert (winners.sum(-1) == 1).all()
    assert torch.equal(y[y != 0], h[y != 0])


@each_layout
def test_the_winner_is_recorded_even_when_it_passes_zero(shape: tuple[int, ...], dim: int) -> None:
    h = torch.zeros(shape)
    uniform = torch.rand(blocks_of(h, 4, dim).shape[:-1], generator=seeded())
    competition = compete(h, 4, dim=dim, uniform=uniform)
    assert competition.winner.dtype == torch.int64
    assert torch.equal(competition.winner, (uniform * 4).long())
    assert not competition.response.any()


def first_above(h: Tensor, uniform: float) -> int:
    """Invert the CDF by hand, in float64."""
    cumulated = 0.0
    for competitor, probability in enumerate(h.double().softmax(0).tolist()):
        cumulated += probability
        if uniform < cumulated:
            return competitor
    raise AssertionError("the probabilities do not sum to 1")


@settings(deadline=None, max_examples=100)
@given(st.lists(st.floats(-20, 20, width=32), min_size=2, max_size=8), st.integers(0, 2**24 - 1))
def test_compete_inverts_the_cdf(responses: list[float], step: int) -> None:
    h, uniform = torch.tensor([responses]), step / 2**24
    competition = compete(h, len(responses), uniform=torch.tensor([[uniform]]))
    winner = int(competition.winner)
    edges = h[0].double().softmax(0).cumsum(0)
    if (edges - uniform).abs().min() > 1e-6:
        assert winner == first_above(h[0], uniform)
    assert competition.response[0, winner] == h[0, winner]


@pytest.mark.parametrize("competitors", [2, 3, 16, 768])
@pytest.mark.parametrize("uniform", [0.0, 1 - 2**-24])
def test_somebody_wins_at_the_ends_of_the_interval(competitors: int, uniform: float) -> None:
    h = gaussian(500, competitors) * 5
    ends = torch.full((500, 1), uniform)
    winner = compete(h, competitors, uniform=ends).winner
    assert ((winner >= 0) & (winner < competitors)).all()
    masked = h.clone()
    masked[:, -1 if uniform else 0] = -torch.inf
    response = compete(masked, competitors, uniform=ends).response
    assert (response.isfinite() & (response.count_nonzero(-1) == 1)[:, None]).all()


@pytest.mark.parametrize("form", [lwta, lwta_straight_through])
@pytest.mark.parametrize("dim", [-1, 1])
@pytest.mark.parametrize("competitors", [2, 8, 16])
def test_draw_frequencies_match_pi(form, dim: int, competitors: int) -> None:
    draws, row = 100_000, gaussian(2 * competitors, seed=competitors)
    h = row.expand(draws, -1) if dim == -1 else row[None, :, None].expand(1, -1, draws)
    wins = (
        (form(h, competitors, dim=dim, generator=seeded(1)) != 0).movedim(dim, -1).reshape(draws, -1).sum(0)
    )
    expected = row.double().view(2, competitors).softmax(-1) * draws
    for block in range(2):
        observed = wins.view(2, competitors)[block].numpy()
        assert observed.sum() == draws
        assert stats.chisquare(observed, expected[block].numpy(), sum_check=False).pvalue > 1e-4


def test_blocks_draw_independently() -> None:
    winner = compete(torch.zeros(40_000, 8), 4, uniform=torch.rand(40_000, 2, generator=seeded())).winner
    cells = (winner[:, 0] * 4 + winner[:, 1]).bincount(minlength=16)
    assert stats.chisquare(cells.numpy()).pvalue > 1e-4


@pytest.mark.parametrize("form", [lwta, lwta_straight_through])
def test_the_same_generator_state_gives_the_same_draw(form) -> None:
    h = gaussian(64, 32)
    assert torch.equal(form(h, 8, generator=seeded(5)), form(h, 8, generator=seeded(5)))
    assert not torch.equal(form(h, 8, generator=seeded(5)), form(h, 8, generator=seeded(6)))
    before = torch.get_rng_state()
    form(h, 8, generator=seeded(5))
    assert torch.equal(before, torch.get_rng_state())


@settings(deadline=None, max_examples=30)
@given(st.integers(1, 6), st.integers(0, 2**32))
def test_images_compete_on_their_own(size: int, seed: int) -> None:
    h = gaussian(6, 5, 8, seed=seed)
    uniform = torch.rand(6, 5, 2, generator=seeded(seed))
    whole = compete(h, 4, uniform=uniform)
    parts = [compete(a, 4, uniform=u) for a, u in zip(h.split(size), uniform.split(size), strict=True)]
    assert torch.equal(whole.winner, torch.cat([part.winner for part in parts]))
    assert torch.equal(whole.response, torch.cat([part.response for part in parts]))


def test_a_convolution_competes_as_the_dense_layer_at_every_position() -> None:
    h = gaussian(2, 12, 3, 5)
    uniform = torch.rand(2, 3, 5, 3, generator=seeded())
    conv = compete(h, 4, dim=-3, uniform=uniform)
    dense = compete(h.movedim(1, -1).contiguous(), 4, uniform=uniform)
    assert torch.equal(conv.winner, dense.winner)
    assert torch.equal(conv.response.movedim(1, -1), dense.response)


@each_form
def test_channels_last_stays_channels_last(form) -> None:
    h = gaussian(2, 12, 3, 5).contiguous(memory_format=torch.channels_last)
    y = form(h, 4, dim=1)
    assert y.is_contiguous(memory_format=torch.channels_last)
    assert torch.equal(y[y != 0], h[y != 0])


@each_form
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_the_dtype_is_kept(form, dtype: torch.dtype) -> None:
    h = gaussian(10, 12).to(dtype)
    y = form(h, 4)
    assert y.dtype == dtype
    assert ((y != 0).view(10, 3, 4).sum(-1) == 1).all()


def test_half_precision_competes_in_float32() -> None:
    h = gaussian(100, 16).bfloat16()
    uniform = torch.rand(100, 1, generator=seeded())
    assert torch.equal(compete(h, 16, uniform=uniform).winner, compete(h.float(), 16, uniform=uniform).winner)
    assert win_probability(h, 16).dtype == torch.float32


def test_max_lets_the_largest_win() -> None:
    h = gaussian(50, 12)
    hard = torch.zeros(50, 3, 4).scatter_(-1, h.view(50, 3, 4).argmax(-1, keepdim=True), 1)
    assert torch.equal(lwta_max(h, 4), h * hard.view(50, 12))


@pytest.mark.parametrize(
    "bad", [(0, torch.nan), (2, torch.nan), (3, torch.inf), (1, torch.inf), (slice(None), -torch.inf)]
)
@each_form
@pytest.mark.parametrize("dim", [-1, 1])
def test_a_block_without_probabilities_is_nan_all_over(form, dim: int, bad) -> None:
    h = gaussian(3, 12) if dim == -1 else gaussian(3, 12, 2, 2)
    h[1, 4:8][bad[0]] = bad[1]
    y = form(h, 4, dim=dim)
    assert y[1, 4:8].isnan().all()
    y[1, 4:8] = 0
    assert y.isfinite().all()


def test_nobody_is_recorded_as_the_winner_of_a_block_without_probabilities() -> None:
    h = gaussian(2, 8)
    h[0, 1] = torch.nan
    competition = compete(h, 4, uniform=torch.full((2, 2), 0.5))
    assert competition.winner[0, 0] == -1
    assert (competition.winner.flatten()[1:] >= 0).all()


@each_form
def test_minus_infinity_never_wins(form) -> None:
    h = gaussian(2000, 8)
    h[:, [1, 2, 3, 7]] = -torch.inf
    y = form(h, 4)
    assert torch.equal(y[:, 0], h[:, 0])
    assert y.isfinite().all()


@each_form
def test_large_responses_are_stable(form) -> None:
    h = gaussian(10, 8) * 1e30
    assert torch.equal(form(h, 4), lwta_max(h, 4))


@each_layout
def test_win_probability_is_the_softmax_of_each_block(shape: tuple[int, ...], dim: int) -> None:
    h = gaussian(*shape)
    probability = win_probability(h, 4, dim=dim)
    torch.testing.assert_close(
        blocks_of(probability, 4, dim), blocks_of(h.double(), 4, dim).softmax(-1).float()
    )
    assert probability.shape == h.shape


@each_layout
def test_kl_equals_the_sum_over_blocks_and_positions(shape: tuple[int, ...], dim: int) -> None:
    h = gaussian(*shape).double() * 3
    total = []
    for example in blocks_of(h, 4, dim):
        rows = example.reshape(-1, 4).softmax(-1).tolist()
        total.append(sum(p * math.log(4 * p) for row in rows for p in row))
    torch.testing.assert_close(lwta_kl(h, 4, dim=dim), torch.tensor(total, dtype=torch.float64))


def test_kl_is_finite_at_its_extremes_and_has_a_gradient() -> None:
    h = torch.tensor([[1e4, -1e4, -torch.inf, 0.0]], requires_grad=True)
    kl = lwta_kl(h, 4)
    torch.testing.assert_close(kl, torch.tensor([math.log(4)]))
    kl.sum().backward()
    assert h.grad is not None
    assert h.grad.isfinite().all()
    assert lwta_kl(torch.full((2, 8), -7.0), 4).abs().max() < 1e-6
    assert torch.autograd.gradcheck(lambda x: lwta_kl(x, 4), gaussian(2, 8).double().requires_grad_())


def test_inference_gradient_reaches_the_winners_alone() -> None:
    h = gaussian(5, 8).requires_grad_()
    y = lwta(h, 4)
    (gradient,) = torch.autograd.grad(y.sum(), h)
    assert torch.equal(gradient, (y != 0).float())


class Notebook:
    """A referee that writes down what it sees."""

    def __init__(self) -> None:
        self.shapes: list[tuple[int, ...]] = []
        self.seen: list[tuple[Tensor, Competition]] = []

    def uniforms(self, shape: tuple[int, ...]) -> Tensor:
        self.shapes.append(shape)
        return torch.full(shape, 0.5)

    def observe(self, h: Tensor, competition: Competition) -> None:
        self.seen.append((h, competition))


@pytest.mark.parametrize("training", [True, False])
def test_a_referee_decides_and_observes(training: bool) -> None:
    module, h = LWTA(4, dim=1).train(training), gaussian(2, 12, 3, 5)
    module.referee = Notebook()
    y = module(h)
    assert module.referee.shapes == [(2, 3, 5, 3)]
    ((seen, competition),) = module.referee.seen
    assert seen is h
    assert y is competition.response
    expected = compete(h, 4, dim=1, uniform=torch.full((2, 3, 5, 3), 0.5))
    assert torch.equal(competition.winner, expected.winner)


def test_the_module_is_a_shell_without_state() -> None:
    module = LWTA(16, dim=-3, temperature=0.5)
    assert not module.state_dict()
    assert not list(module.parameters())
    assert repr(module) == "LWTA(16, dim=-3, temperature=0.5)"
    for twin in (copy.deepcopy(module), pickle.loads(pickle.dumps(module))):
        assert repr(twin) == repr(module)
        assert twin.referee is None


def test_the_module_draws_exactly_in_eval() -> None:
    module, h = LWTA(4).eval(), gaussian(1, 4).expand(100_000, -1)
    share = (module(h) != 0).float().mean(0)
    assert (share - h[0].softmax(0)).abs().max() < 0.01


@pytest.mark.parametrize("competitors", [1, 0, -4])
def test_a_block_needs_rivals(competitors: int) -> None:
    message = f"^competitors is {competitors}, but a block needs rivals. Use 2 or more.$"
    with pytest.raises(ArgumentError, match=message):
        LWTA(competitors)
    with pytest.raises(ArgumentError, match=message):
        lwta(torch.zeros(1, 4), competitors)


@each_form
def test_competitors_have_to_divide_the_channels(form) -> None:
    message = (
        "h has 768 channels along dim -1, which 7 competitors do not divide. "
        "Use one of 2, 3, 4, 6, 8, 12, 16, 24, …."
    )
    with pytest.raises(ArgumentError) as raised:
        form(torch.zeros(1, 768), 7)
    assert str(raised.value) == message


def test_few_divisors_are_all_named() -> None:
    with pytest.raises(ArgumentError, match=r"which 4 competitors do not divide. Use one of 2, 3, 6.$"):
        lwta(torch.zeros(1, 6), 4)


@pytest.mark.parametrize("temperature", [0.0, -1.0, math.nan, math.inf])
def test_temperature_has_to_be_positive(temperature: float) -> None:
    with pytest.raises(ArgumentError, match=r"^temperature is .*, but has to be positive and finite"):
        LWTA(2, temperature=temperature)
    with pytest.raises(ArgumentError, match=r"^temperature is"):
        lwta_straight_through(torch.zeros(1, 2), 2, temperature=temperature)


def test_one_uniform_number_for_every_block() -> None:
    with pytest.raises(ArgumentError, match=r"^uniform has the shape \(2, 4\), but .* \(2, 2\)\. Pass one"):
        compete(torch.zeros(2, 8), 4, uniform=torch.zeros(2, 4))


def test_kl_needs_an_axis_of_examples() -> None:
    with pytest.raises(ArgumentError, match=r"^dim is 0, the first axis of h, which counts examples\."):
        lwta_kl(torch.zeros(8, 3), 4, dim=0)
