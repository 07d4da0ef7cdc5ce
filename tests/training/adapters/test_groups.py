"""Groups of layers, from names alone."""

import pytest

from stylewright.training.adapters.groups import block_of, groups_of, layer_strengths, read_strengths

FLUX = [
    "img_in",
    *(f"double_blocks.{i}.{s}_{part}" for i in range(3) for s in ("img", "txt") for part in ("attn.qkv", "mlp.0")),
    *(f"single_blocks.{i}.{part}" for i in range(3) for part in ("linear1", "modulation.lin")),
    "final_layer.linear",
]
UNET = ["time_embed.0"] + [
    f"{block}.1.transformer_blocks.0.{part}"
    for block in ("input_blocks.1", "input_blocks.2", "middle_block.1", "output_blocks.0")
    for part in ("attn1.to_q", "attn2.to_k", "ff.net.2")
]


def test_blocks_are_thirds_in_the_order_in_which_they_run():
    groups = groups_of(FLUX)
    assert groups.layers("early") == [
        name for name in FLUX if name.startswith(("double_blocks.0.", "double_blocks.1."))
    ]
    assert groups.layers("late") == [name for name in FLUX if name.startswith(("single_blocks.1.", "single_blocks.2."))]
    assert groups.layers("other") == ["img_in", "final_layer.linear"]
    assert groups.layers("all") == FLUX
    assert block_of("double_blocks.10.img_attn.qkv") == "double_blocks.10" and block_of("time_embed.0") is None


def test_two_blocks_are_the_first_and_the_last_third():
    groups = groups_of([f"joint_blocks.{i}.x_block.attn.qkv" for i in range(2)])
    assert groups.layers("early") == ["joint_blocks.0.x_block.attn.qkv"] and "middle" not in groups.names


def test_kinds_and_streams():
    groups = groups_of(FLUX)
    assert groups.layers("fused") == [f"single_blocks.{i}.linear1" for i in range(3)]
    assert groups.layers("modulation") == [f"single_blocks.{i}.modulation.lin" for i in range(3)]
    assert groups.layers("text") == [name for name in FLUX if ".txt_" in name]
    assert groups.layers("attention") == [name for name in FLUX if "_attn" in name]
    unet = groups_of(UNET)
    assert unet.layers("cross") == [name for name in UNET if "attn2" in name]
    assert "image" not in unet.names, "there is no text stream to tell it from"


@pytest.mark.parametrize(
    ("pattern", "count"),
    [("double_blocks.1", 4), ("double_blocks.0-1", 8), ("*_blocks.2.*", 6), ("img_attn.qkv", 3), ("linear*", 4)],
)
def test_parts_of_names(pattern, count):
    assert len(groups_of([*FLUX, "double_blocks.10.img_attn.proj"]).layers(pattern)) == count


def test_a_pattern_that_means_nothing_lists_what_there_is():
    with pytest.raises(ValueError, match=r"'double_block' is no group.*fused.*double_blocks\.\*\.img_attn\.qkv"):
        groups_of(FLUX).layers("double_block")


def test_strengths_multiply():
    groups = groups_of(FLUX)
    factors = layer_strengths(
        groups, read_strengths("early = 0.5\n\n# a remark\ndouble_blocks.0.txt_attn=-2\ntext = 0.5")
    )
    assert factors["double_blocks.0.txt_attn.qkv"] == -0.5
    assert factors["double_blocks.1.img_mlp.0"] == 0.5 and factors["single_blocks.2.linear1"] == 1
    for line in ("late", "late = x", "= 2"):
        with pytest.raises(ValueError, match="expected lines such as"):
            read_strengths(line)
