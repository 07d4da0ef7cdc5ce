import pytest
import torch

from stylewright.training.embedded.text import WIDTH, TextEncoder, encode_prompts
from stylewright.training.embedded.vocabulary import INDEX, SLOTS, STYLE_NAMES, WORDS


@pytest.fixture
def encoder():
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return TextEncoder().requires_grad_(False)


def test_shapes_and_rows_that_do_not_depend_on_each_other(encoder):
    prompts = ["star in ocean stripes style", "", "tree in jazz style"]
    context, pooled = encode_prompts(encoder, prompts)
    assert context.shape == (3, SLOTS, WIDTH) and pooled.shape == (3, WIDTH)
    for i, prompt in enumerate(prompts):
        alone = encode_prompts(encoder, [prompt])
        assert torch.equal(alone[0][0], context[i]) and torch.equal(alone[1][0], pooled[i])


def test_the_order_of_words_does_not_matter(encoder):
    context, pooled = encode_prompts(encoder, ["star in ocean stripes crisp style", "crisp stripes, a star in ocean"])
    torch.testing.assert_close(pooled[0], pooled[1])
    rows = [sorted(map(tuple, each.tolist())) for each in context]
    assert rows[0] == rows[1]
    assert not torch.equal(context[0], context[1])


def test_the_empty_prompt_is_exactly_zero(encoder):
    context, pooled = encode_prompts(encoder, ["", "in the style of a"])
    assert not pooled.any()
    assert torch.equal(context, encoder.words.weight[0].expand(2, SLOTS, WIDTH))


def test_the_pooled_vector_is_the_sum_of_its_words(encoder):
    _, pooled = encode_prompts(encoder, ["star in jazz style"])
    table = encoder.pooled.weight
    torch.testing.assert_close(pooled[0], table[INDEX["star"]] + table[INDEX["jazz"]])


def test_words_start_out_orthogonal(encoder):
    gram = encoder.pooled.weight @ encoder.pooled.weight.T
    torch.testing.assert_close(gram, WIDTH * torch.eye(len(WORDS)), atol=1e-3, rtol=0)


def test_padding_is_learned_in_the_context_and_not_in_the_pooled_vector():
    encoder = TextEncoder()
    context, pooled = encode_prompts(encoder, ["star"])
    (context.sum() + pooled.sum()).backward()
    assert encoder.words.weight.grad[0].eq(SLOTS - 1).all()
    assert not encoder.pooled.weight.grad[0].any()
    assert encoder.pooled.weight.grad[INDEX["star"]].eq(1).all()


def test_unknown_words_of_all_prompts_are_named_once(encoder):
    with pytest.raises(ValueError, match=r"does not know 'giraffe', 'velvet'\.") as caught:
        encode_prompts(encoder, ["velvet giraffe", "star", "giraffe in jazz style"])
    assert all(name in str(caught.value) for name in STYLE_NAMES)
