"""Negative prompts inside attention to text, against layers that are written by hand in float64."""

import pytest
import torch
from negative_proof import CROSS, draw, guidance, reference

pytestmark = pytest.mark.comfy

METHODS = ("nasa", "nag", "vsf")


def apply(*args, **kwargs):
    from stylewright.nodes.bridge.negative import apply

    return apply(*args, **kwargs)


def close(found, expected, base, tolerance=1e-4):
    """Equal, measured by what the negative prompt changes."""
    change = (expected - base).norm()
    assert change > 1e-3 * base.norm(), "the negative prompt has to be seen"
    assert (found - expected).norm() < tolerance * change


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("family", CROSS)
def test_against_float64(family, method, tiny, tiny_prompt):
    model, positive, negative = tiny(family), tiny_prompt(family, 5, 1), tiny_prompt(family, 7, 2)
    base = draw(model, family, positive)
    expected = reference(model, family, positive, negative, method)
    close(draw(apply(model, negative, guidance(method)), family, positive), expected, base)
    assert torch.equal(draw(model, family, positive), base)


@pytest.mark.parametrize("tokens", [5, 4])
@pytest.mark.parametrize("family", ["sd15", "sdxl", "pixart", "wan21", "cosmos", "ltxv"])
def test_it_acts_on_positive_prompts_alone(family, tokens, tiny, tiny_prompt):
    """Both halves of a guided step run together where their prompts are equally long, one by one otherwise."""
    model, positive, against = tiny(family), tiny_prompt(family, 5, 1), tiny_prompt(family, 7, 2)
    drawing = {"negative": tiny_prompt(family, tokens, 3), "cfg": 3.0, "batch": 2}
    base = draw(model, family, positive, **drawing)
    expected = reference(model, family, positive, against, "nag", **drawing)
    close(draw(apply(model, against, guidance("nag")), family, positive, **drawing), expected, base)


@pytest.mark.parametrize("family", CROSS)
def test_nothing_changes_where_nothing_is_asked(family, tiny, tiny_prompt):
    model, positive, negative = tiny(family), tiny_prompt(family, 5, 1), tiny_prompt(family, 7, 2)
    base = draw(model, family, positive)
    nothing = [[torch.zeros_like(negative[0][0]), negative[0][1]]]
    for conditioning, scale in ((negative, 0.0), (nothing, 1.0), ([], 1.0)):
        assert torch.equal(draw(apply(model, conditioning, guidance("nasa", scale)), family, positive), base)


@pytest.mark.parametrize(("method", "factor"), [("nasa", 1 - 0.4), ("nag", 1.0), ("vsf", (1 - 0.7) / 2)])
@pytest.mark.parametrize("family", CROSS)
def test_the_positive_prompt_held_against_itself(family, method, factor, tiny, tiny_prompt):
    """(1 - a) Z+, Z+ and (1 - a) / 2 Z+, in the place of each layer's Z+ before its output projection."""
    from negative_proof import in_place, layers_of

    model, prompt = tiny(family), tiny_prompt(family, 5, 1)
    base = draw(model, family, prompt)

    def of_values(layer, own):  # Z is linear in the values, and a projection of zeros leaves the bias
        def forward(x, context, *args, **kwargs):
            nothing = last_projection(layer).bias
            offset = 0 if nothing is None else nothing
            return factor * (own(x, context, *args, **kwargs) - offset) + offset

        return forward

    with in_place(layers_of(model, family), of_values):
        expected = draw(model, family, prompt)
    found = draw(apply(model, prompt, guidance(method)), family, prompt)
    assert (found - expected).norm() < 1e-4 * base.norm()
    assert (factor == 1) or (expected - base).norm() > 1e-3 * base.norm()


def last_projection(layer):
    names = ("to_out", "proj", "o", "output_proj")
    found = next(layer._modules[name] for name in names if name in layer._modules)
    return found[0] if isinstance(found, torch.nn.Sequential) else found


@pytest.mark.parametrize("family", ["sdxl", "pixart", "wan21"])
def test_some_layers_alone(family, tiny, tiny_prompt):
    model, positive, negative = tiny(family), tiny_prompt(family, 5, 1), tiny_prompt(family, 7, 2)
    base = draw(model, family, positive)
    expected = reference(model, family, positive, negative, "nasa", acts=lambda number: number == 1)
    found = draw(apply(model, negative, guidance("nasa"), layers=range(1, 2)), family, positive)
    close(found, expected, base)


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("family", ["sdxl", "pixart", "wan21"])
def test_several_negatives_are_averaged_by_their_strengths(family, method, tiny, tiny_prompt):
    model, positive = tiny(family), tiny_prompt(family, 5, 1)
    first, second = tiny_prompt(family, 7, 2), tiny_prompt(family, 3, 3)
    base = draw(model, family, positive)
    expected = reference(model, family, positive, {0.75: first, 0.25: second}, method)
    both = [[first[0][0], {**first[0][1], "strength": 1.5}], [second[0][0], {**second[0][1], "strength": 0.5}]]
    close(draw(apply(model, both, guidance(method)), family, positive), expected, base)
    twice = draw(apply(model, [*first, *first], guidance(method)), family, positive)
    close(twice, draw(apply(model, first, guidance(method)), family, positive), base)


@pytest.mark.parametrize("family", ["sd15", "pixart", "wan21"])
def test_windows_and_ranges(family, tiny, tiny_prompt, caplog):
    """A range of steps of a negative, and a window of log_snr, that the second of two steps is out of."""
    from stylewright.nodes.bridge.noise_levels import noise_levels
    from stylewright.training.windows import Window

    model, positive, negative = tiny(family), tiny_prompt(family, 5, 1), tiny_prompt(family, 7, 2)
    levels = noise_levels(model)
    top = float(model.get_model_object("model_sampling").sigma_max)
    level = float(levels.log_snr(torch.tensor(0.6 * top)))
    only_late = draw(apply(model, negative, guidance("nag"), Window(low=level)), family, positive)
    early = apply(model, negative, guidance("nag"), Window(high=level))
    ranged = [[negative[0][0], {**negative[0][1], "timestep_end": 0.6 * top}]]
    base, whole = draw(model, family, positive), draw(apply(model, negative, guidance("nag")), family, positive)
    found = draw(early, family, positive)
    assert torch.equal(found, draw(apply(model, ranged, guidance("nag")), family, positive))
    pictures = [base, whole, only_late, found]
    assert all(not torch.equal(a, b) for i, a in enumerate(pictures) for b in pictures[:i])
    nowhere = apply(model, negative, guidance("nag"), Window(low=90.0))
    caplog.clear()
    assert torch.equal(draw(nowhere, family, positive), base)
    assert "the negative prompt acted in none of the steps" in caplog.text


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("family", CROSS)
def test_batches_without_guidance(family, method, tiny, tiny_prompt):
    """Several pictures at CFG 1, and a negative prompt of a row for each."""
    model, positive, negative = tiny(family), tiny_prompt(family, 5, 1), tiny_prompt(family, 7, 2)
    base = draw(model, family, positive, batch=3)
    expected = reference(model, family, positive, negative, method, batch=3)
    close(draw(apply(model, negative, guidance(method)), family, positive, batch=3), expected, base)
    rows = [[torch.cat([text] * 3), values] for text, values in negative]
    if "attention_mask" not in negative[0][1] and "t5xxl_ids" not in negative[0][1]:
        close(draw(apply(model, rows, guidance(method)), family, positive, batch=3), expected, base)


@pytest.mark.parametrize(("family", "side"), [("sd15", 4), ("pixart", 24), ("wan21", 4), ("flux", 4)])
def test_pictures_in_tiles(family, side, tiny, tiny_prompt):
    """As nodes for large pictures run a model, tile after tile, of two sizes."""
    model, positive, negative = tiny(family), tiny_prompt(family, 5, 1), tiny_prompt(family, 7, 2)
    sizes = []

    def in_tiles(apply_model, given):
        tiles = given["input"].split([given["input"].shape[-1] - side, side], -1)
        sizes.extend(tile.shape[-1] for tile in tiles)
        return torch.cat([apply_model(tile, given["timestep"], **given["c"]) for tile in tiles], -1)

    tiled, after = model.clone(), apply(model, negative, guidance("nag"))
    tiled.set_model_unet_function_wrapper(in_tiles)
    after.set_model_unet_function_wrapper(in_tiles)
    base, found = draw(tiled, family, positive), draw(after, family, positive)
    assert len(set(sizes)) == 2 and (found - base).norm() > 1e-3 * base.norm()
    assert torch.equal(found, draw(apply(tiled, negative, guidance("nag")), family, positive))
    # Each tile is drawn as a picture of its own would be, where a step is one call.
    top = float(model.get_model_object("model_sampling").sigma_max)
    alone = draw(apply(model, negative, guidance("nag")), family, positive, sigmas=[top, 0.0], part=slice(-side, None))
    assert torch.allclose(draw(after, family, positive, sigmas=[top, 0.0])[..., -side:], alone, rtol=1e-4, atol=1e-4)
