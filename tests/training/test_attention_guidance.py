"""Negative prompts inside attention, against the closed forms of the papers."""

import pytest
import torch

from stylewright.training.attention_guidance import METHODS, AttentionGuidance, Tokens, nag


def attend(q, tokens):
    return torch.nn.functional.scaled_dot_product_attention(q, tokens.k, tokens.v, attn_mask=tokens.mask)


@pytest.fixture
def parts():
    generator = torch.Generator().manual_seed(0)

    def tokens(count, mask=None):
        k, v = torch.randn(2, 2, 3, count, 8, generator=generator, dtype=torch.float64)
        return Tokens(k, v, mask)

    q = torch.randn(2, 3, 5, 8, generator=generator, dtype=torch.float64)
    return q, tokens(5), tokens(4), tokens(7)  # query, image, positive, negative


@pytest.mark.parametrize("method", METHODS)
def test_a_scale_of_zero_is_the_positive_answer_bit_for_bit(parts, method):
    q, image, positive, negative = parts
    off = AttentionGuidance(method, 0.0)
    assert torch.equal(off.cross(attend, q, positive, negative), attend(q, positive))
    assert torch.equal(off.joint(attend, q, image, positive, negative), attend(q, positive + image))


@pytest.mark.parametrize(("method", "share"), [("nasa", 1 - 0.3), ("nag", 1.0), ("vsf", (1 - 0.3) / 2)])
def test_the_same_text_twice(parts, method, share):
    q, _, positive, _ = parts
    answer = AttentionGuidance(method, 0.3).cross(attend, q, positive, positive)
    torch.testing.assert_close(answer, share * attend(q, positive), rtol=1e-12, atol=1e-12)


def test_nasa_of_text_only_leaves_the_images_part_alone(parts):
    q, image, positive, negative = parts
    joint = negative + image
    weights = torch.softmax(q @ joint.k.transpose(-1, -2) / 8**0.5, -1)
    from_text = weights[..., :7] @ negative.v
    answer = AttentionGuidance("nasa", 0.3).joint(attend, q, image, positive, negative)
    torch.testing.assert_close(answer, attend(q, positive + image) - 0.3 * from_text, rtol=1e-12, atol=1e-12)
    plain = AttentionGuidance("nasa", 0.3, text_only=False).joint(attend, q, image, positive, negative)
    torch.testing.assert_close(plain, attend(q, positive + image) - 0.3 * attend(q, joint), rtol=1e-12, atol=1e-12)


def test_vsf_is_nasa_with_a_weight_for_each_query(parts):
    q, _, positive, negative = parts
    total = [(q @ each.k.transpose(-1, -2) / 8**0.5).exp().sum(-1, keepdim=True) for each in (positive, negative)]
    share = total[0] / (total[0] + total[1])
    expected = share * attend(q, positive) - 0.3 * (1 - share) * attend(q, negative)
    answer = AttentionGuidance("vsf", 0.3).cross(attend, q, positive, negative)
    torch.testing.assert_close(answer, expected, rtol=1e-12, atol=1e-12)


def test_nag_is_bounded_and_goes_away_from_the_negative(parts):
    q, _, positive, negative = parts
    z, other = attend(q, positive), attend(q, negative)
    norm = z.abs().sum(-1)
    far = nag(z, other, 50.0, 2.5, 0.25)
    assert (far.abs().sum(-1) <= (0.25 * 2.5 + 0.75) * norm * (1 + 1e-6)).all()
    near = nag(z, other, 0.1, 2.5, 0.25)  # within the bound: a straight line
    torch.testing.assert_close(near, z + 0.25 * 0.1 * (z - other), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("method", METHODS)
def test_tokens_that_are_masked_out_count_nothing(parts, method):
    q, image, positive, negative = parts
    guidance, shown = AttentionGuidance(method, 0.3), torch.ones(2, 1, 1, 7, dtype=torch.bool)
    shown[..., 5:] = False
    hidden, short = Tokens(negative.k, negative.v, shown), Tokens(negative.k[..., :5, :], negative.v[..., :5, :])
    for shared in (None, image):
        answer = guidance.joint(attend, q, shared, positive, hidden)
        expected = guidance.joint(attend, q, shared, positive, short)
        torch.testing.assert_close(answer, expected, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize(
    "wrong", [{"method": "cfg"}, {"scale": float("nan")}, {"scale": -1.0}, {"tau": 0.0}, {"blend": 1.5}]
)
def test_what_makes_no_sense_is_refused(wrong):
    with pytest.raises(ValueError, match="expected"):
        AttentionGuidance(**wrong)
