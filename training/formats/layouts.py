"""An adapter's layers from one layout of names into the other, where some layers are fused."""

from collections.abc import Collection, Mapping

from .keys import TEXT_ENCODER, UNET_LAYERS, diffusers_names, is_swapped, native_place
from .layers import Layer, padded
from .stacking import merged, split, swapped_halves

Layers = Mapping[str, Layer]  # by layer name, with dots


def to_native(layers: Layers, family: str, unet_layers: int = UNET_LAYERS) -> dict[str, Layer]:
    """Under native names. Parts of a fused layer that cannot be one adapter keep their diffusers names."""
    native: dict[str, Layer] = {}
    fused: dict[str, dict[int, str]] = {}  # native name -> part -> diffusers name
    for name, layer in layers.items():
        place = native_place(family, name, unet_layers)
        if place is None:
            _require_known(family, name, unet_layers)
            native[name] = layer
        elif place.parts == 1:
            native[place.module] = _swapped(family, place.module, layer)
        else:
            fused.setdefault(place.module, {})[place.part] = name
    for module, present in fused.items():
        parts = len(diffusers_names(family, module) or ())
        one = merged([layers[present[part]] if part in present else None for part in range(parts)])
        native |= {module: one} if one else {name: layers[name] for name in present.values()}
    return native


def to_diffusers(
    layers: Layers, family: str, unet_layers: int = UNET_LAYERS, trained: Collection[str] = ()
) -> dict[str, Layer]:
    """Under diffusers names. ``trained``: names of layers that the adapter is known to have had in this layout."""
    diffusers: dict[str, Layer] = {}
    for name, layer in layers.items():
        names = diffusers_names(family, name, unet_layers)
        if names is None:
            _require_known(family, name, unet_layers)
            diffusers[name] = layer
        elif len(names) == 1:
            diffusers[names[0]] = _swapped(family, name, layer)
        else:
            present = [part in trained for part in names]
            pieces = split(layer, len(names), present if any(present) else None)
            diffusers |= {part: piece for part, piece in zip(names, pieces, strict=True) if piece is not None}
    return diffusers


def at_one_rank(layers: Layers) -> dict[str, Layer]:
    """Every layer padded to the highest rank, which is how peft makes them."""
    rank = max((layer.rank or 0 for layer in layers.values()), default=0)
    return {name: padded(layer, rank) for name, layer in layers.items()}


def _swapped(family: str, native: str, layer: Layer) -> Layer:
    if layer.method in ("oft", "glora") or not is_swapped(family, native, layer.inputs, layer.outputs):
        return layer
    return swapped_halves(layer)


def _require_known(family: str, name: str, unet_layers: int) -> None:
    known = native_place(family, name, unet_layers) or diffusers_names(family, name, unet_layers)
    if not known and not name.startswith(TEXT_ENCODER):
        raise ValueError(f"{name} is no layer of the family {family} that this version knows under both of its names")
