"""Maps: the attention of each place to a phrase, whatever the layout of the sequence."""

import math

import pytest
import torch

from stylewright.training.concepts.maps import Layout, Recorder, attention_to, contrasted, picture_first, text_first

ROWS, COLUMNS, TEXT, WIDTH = 4, 6, 5, 8  # of tokens


def planted(cells, token):
    """Queries (1, 2, n, d) and keys (1, 2, m, d) of which these cells look at this token."""
    q, k = torch.zeros(1, 2, ROWS * COLUMNS, WIDTH), torch.zeros(1, 2, TEXT, WIDTH)
    k[..., token, 0] = 1.0
    for row, column in cells:
        q[..., row * COLUMNS + column, 0] = 50.0
    return q, k


CELLS = [(1, 2), (1, 3), (2, 3)]


def expected(cells, looking, idle):
    found = torch.full((ROWS, COLUMNS), idle)
    for row, column in cells:
        found[row, column] = looking
    return found


@pytest.mark.parametrize("kind", ["cross", "text first", "picture first"])
def test_a_planted_attention_is_found(kind):
    q, k = planted(CELLS, token=3)
    recorder = Recorder(
        Layout(TEXT, 2 * ROWS, 2 * COLUMNS, text_first if kind == "text first" else picture_first), [[3], [0, 1]]
    )
    for _ in range(2):
        recorder.begin()
        if kind == "cross":
            recorder.see(q, k)
        else:  # one sequence: of the picture's keys and the text's queries nothing counts
            text, picture = torch.randn(1, 2, TEXT, WIDTH), torch.randn(1, 2, ROWS * COLUMNS, WIDTH)
            parts = [(text, k), (q, picture)] if kind == "text first" else [(q, picture), (text, k)]
            recorder.see(*(torch.cat(each, 2) for each in zip(*parts, strict=True)))
        recorder.see(torch.randn(1, 2, 7, WIDTH), torch.randn(1, 2, 7, WIDTH))  # of something else
    assert recorder.layer == 1 and recorder.joint == (kind != "cross")
    looking = math.exp(50 / WIDTH**0.5) / (math.exp(50 / WIDTH**0.5) + TEXT - 1)
    cells = recorder.sums[0] / 2
    torch.testing.assert_close(cells[0], expected(CELLS, looking, 1 / TEXT))
    torch.testing.assert_close(cells[1], expected(CELLS, (1 - looking) / (TEXT - 1), 1 / TEXT), rtol=1e-3, atol=1e-6)
    assert recorder.maps().shape == (2, 2 * ROWS, 2 * COLUMNS)


def test_attention_is_torchs_own():
    draw = torch.Generator().manual_seed(0)
    q, k = torch.randn(1, 3, 10, 4, generator=draw), torch.randn(1, 3, TEXT, 4, generator=draw)
    truth = torch.softmax(q @ k.transpose(-1, -2) / 2, -1).mean((0, 1))
    found = attention_to(q, k, [[0], [1, 4]])
    torch.testing.assert_close(found[0], truth[:, 0])
    torch.testing.assert_close(found[1], truth[:, [1, 4]].amax(1))


@pytest.mark.parametrize("kind", ["bool", "added"])
def test_masked_tokens_get_nothing(kind):
    q, k = torch.randn(1, 2, 6, 4), torch.randn(1, 2, TEXT, 4)
    seen = torch.tensor([True, True, True, False, False])
    mask = seen if kind == "bool" else torch.where(seen, 0.0, -torch.inf)
    found = attention_to(q, k, [[0], [1], [2], [3], [4]], mask[None, None, None])
    torch.testing.assert_close(found[:3], attention_to(q, k[:, :, :3], [[0], [1], [2]]))
    assert not found[3:].any()


def test_of_a_unet_the_middle_layers_count():
    recorder = Recorder(Layout(TEXT, 16, 16), [[0]])
    recorder.begin()
    for side in (1, 2, 4, 8):
        recorder.see(torch.randn(1, 1, (16 // side) ** 2, 4), torch.randn(1, 1, TEXT, 4))
    assert [recorder.sides[layer] for layer in recorder._counting()] == [2, 4]


def test_phrases_compete():
    maps = torch.stack([torch.tensor([[0.0, 1.0, 2.0]]), torch.tensor([[5.0, 5.0, 9.0]])])
    found = contrasted(maps)
    torch.testing.assert_close(found[0], torch.tensor([[0.0, 0.5, 0.0]]))
    torch.testing.assert_close(found[1], torch.tensor([[0.0, 0.0, 0.0]]))
    torch.testing.assert_close(contrasted(maps[:1])[0], torch.tensor([[0.0, 0.5, 1.0]]))
    assert not contrasted(torch.ones(2, 2, 2)).any()


def test_a_model_whose_attention_is_not_seen_is_an_error():
    with pytest.raises(ValueError, match="no attention of the picture"):
        Recorder(Layout(TEXT, 8, 8), [[0]]).maps()
