"""``stylewright approximate``: an adapter that acts by its input, as a LoRA that loads everywhere."""

from pathlib import Path
from typing import Annotated

import typer

from .generate import Components, Guidance, Model, Prompts, in_style, require_family
from .output import Json, show


def approximate(
    source: Annotated[Path, typer.Argument(metavar="IN", help="The StyleInject adapter's .safetensors file.")],
    target: Annotated[Path, typer.Argument(metavar="OUT", help="The LoRA's file to write.")],
    prompts: Prompts,
    rank: Annotated[int, typer.Option(help="Of the LoRA.")] = 16,
    model: Model = "embedded",
    components: Components = None,
    seed: int = 0,
    steps: int = 20,
    guidance: Guidance = None,
    device: str = "auto",
    as_json: Json = False,
) -> None:
    """Write the LoRA that comes nearest to a StyleInject adapter while it draws these prompts, and say what is lost.

    Prompts get the adapter's style phrase.
    """
    from ..adapters.approximation import approximate as nearest
    from ..adapters.methods import STYLE_INJECT
    from ..formats.adapters import loaded_from
    from ..formats.approximating import approximated_file
    from ..formats.contents import read_adapter
    from ..formats.resizing import write_file
    from ..hosts.generate import generate
    from ..hosts.loading import load_host
    from .train import device_of

    if target.exists():
        raise ValueError(f"{target} is there already: name a file to make")
    file = read_adapter(source)
    if not file.unmergeable:
        raise ValueError(f"{source} is a change of weights already: it loads everywhere as it is")
    if methods := {layer.method for layer in file.layers.values()} - {STYLE_INJECT}:
        raise ValueError(f"{source} is a {methods.pop()} adapter, and this is for StyleInject: no LoRA is known for it")
    host = load_host(model, device_of(device), components=components)
    require_family(file, host)
    family = host.denoiser.family
    loaded = loaded_from(file, "diffusers", family=family)
    asked = in_style(prompts, file.about.style_phrase if file.about else "")
    found = nearest(
        host.denoiser.module,
        loaded.config,
        loaded.state,
        loaded.names,
        lambda: generate(host, asked, seed=seed, steps=steps, guidance_scale=guidance),
        family=family,
        rank=rank,
        seed=seed,
    )
    write_file(target, approximated_file(file, found))
    result = {"file": target, "rank": found.rank, "lost": found.lost, "distance": found.distance}
    show(result, [f"wrote {target}: {found.summary()}"], as_json)
