"""StyleInject's formulas: identities, what each form keeps, rows by themselves; against a reference in plain loops."""

import math

import pytest
import torch
import torch.nn.functional as F

from stylewright.training.style_inject import FORMS, Factors, style_injected

B, P, IN, OUT, N, R = 3, 12, 10, 6, 4, 2


def random(*shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def factors(kernel=(), seed=1):
    return Factors(
        random(N, R, IN, *kernel, seed=seed), random(OUT, R, seed=seed + 1),
        random(N, IN, seed=seed + 2), random(N, seed=seed + 3),
    )  # fmt: skip


def layer(x, seed=9):
    return x @ random(OUT, IN, seed=seed).T + random(OUT, seed=seed + 1)


def added(x, h, form, tensors=None, **options):
    return style_injected(x, h, tensors or factors(), form, **options)[0]


@pytest.mark.parametrize("form", FORMS)
def test_each_form_is_its_formula(form):
    x = random(B, P, IN)
    h, f = layer(x), factors()
    found, shares = style_injected(x, h, f, form)
    for row in range(B):
        s = torch.softmax(f.router @ x[row].mean(0) + f.router_bias, 0)
        torch.testing.assert_close(shares[row], s)
        delta = torch.stack([f.b @ sum(s[i] * (f.a[i] @ x[row, p]) for i in range(N)) for p in range(P)])
        mean = h[row].mean(0)
        spread = ((h[row] - mean).square().mean(0) + 1e-5).sqrt()
        z = (h[row] - mean) / spread
        y = {"f2": (spread + delta) * z, "f1": (spread + delta.mean(0)) * z}.get(form, (spread + delta) * z)
        new = {"lora": h[row] + delta, "f2c": mean + y - y.mean(0)}.get(form, mean + y)
        torch.testing.assert_close(h[row] + found[row], new)


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_without_an_up_projection_not_a_bit_changes(form, dtype):
    x = random(B, P, IN).to(dtype)
    h = layer(x.double()).to(dtype)
    f = factors()
    nothing = Factors(f.a.to(dtype), torch.zeros(OUT, R, dtype=dtype), f.router.to(dtype), f.router_bias.to(dtype))
    assert torch.equal((h + added(x, h, form, nothing)).to(dtype), h)


def test_means_of_channels_stay_in_f1_and_f2c_alone():
    x = random(B, P, IN)
    h = layer(x)
    moved = {form: added(x, h, form).mean(1).abs().max() for form in FORMS}
    assert moved["f1"] < 1e-12 and moved["f2c"] < 1e-12
    assert moved["f2"] > 0.01 and moved["lora"] > 0.01


def test_f1_needs_the_pooled_input_only():
    x = random(B, P, IN)
    h, f = layer(x), factors()
    delta = added(x.mean(1), h.mean(1), "lora", f)
    z = (h - h.mean(1, keepdim=True)) / (h.var(1, correction=0, keepdim=True) + 1e-5).sqrt()
    torch.testing.assert_close(added(x, h, "f1"), delta[:, None] * z)


@pytest.mark.parametrize("form", FORMS)
def test_a_row_knows_nothing_of_its_neighbours(form):
    x = random(B, P, IN)
    h = layer(x)
    whole = added(x, h, form)
    for row in range(B):
        torch.testing.assert_close(added(x[row, None], h[row, None], form)[0], whole[row])
        torch.testing.assert_close(added(x[[row, 0]], h[[row, 0]], form)[0], whole[row])


@pytest.mark.parametrize("form", FORMS)
def test_positions_that_do_not_count_change_nothing_and_stay(form):
    """Whatever is in them; and a prompt that is repeated to another's length is the same prompt."""
    x = random(B, P, IN)
    counted = torch.ones(B, P, 1, dtype=torch.bool)
    counted[0, 8:], counted[1, :1] = False, False
    other = torch.where(counted, x, 100 * random(B, P, IN, seed=5))
    one, two = (added(each, layer(each), form, counted=counted) for each in (x, other))
    torch.testing.assert_close(one * counted, two * counted)
    if form != "lora":
        assert (two[~counted.expand_as(two)] == 0).all()
        torch.testing.assert_close(one[0, :8], added(x[:1, :8], layer(x[:1, :8]), form)[0])
    twice = x.repeat(1, 2, 1)
    torch.testing.assert_close(added(twice, layer(twice), form), added(x, layer(x), form).repeat(1, 2, 1))


def test_nothing_that_counts_is_nothing_to_add():
    x = random(B, P, IN)
    assert (added(x, layer(x), "f2c", counted=torch.zeros(B, P, 1, dtype=torch.bool)) == 0).all()


@pytest.mark.parametrize("shape", [(B, IN), (B, 1, IN)])
def test_without_positions_any_form_is_the_plain_one(shape):
    x = random(*shape)
    for form in FORMS:
        torch.testing.assert_close(added(x, layer(x), form), added(x, layer(x), "lora"))


@pytest.mark.parametrize("form", FORMS)
def test_a_convolution_of_one_pixel_is_a_linear_layer_over_pixels(form):
    x = random(B, 3, 4, IN)
    h = layer(x)
    f = factors()
    kernel = Factors(f.a[..., None, None], f.b, f.router, f.router_bias)
    convolved, shares = style_injected(x.movedim(-1, 1), h.movedim(-1, 1), kernel, form, convolve=F.conv2d)
    expected, expected_shares = style_injected(x, h, f, form)
    torch.testing.assert_close(convolved.movedim(1, -1), expected)
    torch.testing.assert_close(shares, expected_shares)


def test_a_convolution_has_the_layers_stride_and_padding():
    x, weight = random(B, IN, 8, 6), random(OUT, IN, 3, 3, seed=4)

    def convolve(x, weight):
        return F.conv2d(x, weight, stride=2, padding=1)

    h, f = convolve(x, weight), factors((3, 3))
    found, shares = style_injected(x, h, f, "lora", convolve=convolve)
    for row in range(B):
        whole = torch.einsum("or,n,nr...->o...", f.b, shares[row], f.a)
        torch.testing.assert_close(found[row, None], convolve(x[row, None], whole))
    torch.testing.assert_close(added(x, h, "f2c", f, convolve=convolve).mean((2, 3)), torch.zeros(B, OUT).double())


def test_gradients_reach_every_part_once_the_up_projection_is_not_zero():
    x = random(B, P, IN)
    f = Factors(*(tensor.clone().requires_grad_() for tensor in vars(factors()).values()))
    style_injected(x, layer(x), f, "f2c")[0].square().sum().backward()
    assert all(tensor.grad.abs().sum() > 0 for tensor in vars(f).values())
    assert math.isfinite(sum(float(tensor.grad.sum()) for tensor in vars(f).values()))
