"""How often a phrase's box is right: on pictures of several subjects with known places, by a model's attention, and
by where its prediction is worse without the phrase.

    python benchmarks/concept_locator.py --pictures 60 --figure docs/concept_locator.png

Each subject's box, without padding, is held against the truth: intersection over union (IoU), its mean and the share
of phrases at 0.5 or better. ``--adapter`` puts an adapter on the model first, such as one of several_subjects.py.
"""

import argparse
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from package import load_package

load_package()

import torch  # noqa: E402
import torch.nn.functional as F  # noqa: E402
from torch import Tensor  # noqa: E402

from stylewright.training.adapters.attach import attached_to_parts, parts_named  # noqa: E402
from stylewright.training.concepts.boxes import Box, BoxOptions, box_of_map, overlap  # noqa: E402
from stylewright.training.concepts.drawing import draw_found  # noqa: E402
from stylewright.training.concepts.errors import error_maps  # noqa: E402
from stylewright.training.concepts.locate import Search, looked  # noqa: E402
from stylewright.training.concepts.maps import Recorder, contrasted  # noqa: E402
from stylewright.training.concepts.reference import Found  # noqa: E402
from stylewright.training.embedded.renderer import SUBJECTS, extents, render, scene_of  # noqa: E402
from stylewright.training.embedded.several import Several, draw_several  # noqa: E402
from stylewright.training.embedded.vocabulary import named_styles  # noqa: E402
from stylewright.training.formats.adapters import load_adapter  # noqa: E402
from stylewright.training.hosts.attention_maps import watch_of  # noqa: E402
from stylewright.training.hosts.embedded import load_embedded  # noqa: E402
from stylewright.training.hosts.host import Host  # noqa: E402
from stylewright.training.metrics import mean_interval  # noqa: E402
from stylewright.training.randomness import generator  # noqa: E402

SEED = 1
SHOWN = 6  # pictures of the figure
LEVELS = {"clean": (3.0,), "middle": (), "noisy": (-3.0,)}  # log_snr; () = the locator's own


@dataclass(frozen=True)
class Seen:
    """A picture with the truth, and what the model attended to at each of LEVELS."""

    scene: Several
    looks: dict[str, Recorder]
    errors: Tensor  # maps (phrases, h, w) by prediction error


def prompt_of(scene: Several) -> str:
    return f"{scene.content} in {' '.join(scene.style.words)} style"


def pictures(kind: str, count: int) -> Iterator[Several]:
    """Of "several" subjects or of "one", in known styles in turn."""
    styles = list(named_styles().values())
    for number in range(count):
        style = styles[7 * number % len(styles)]
        if kind == "several":
            yield draw_several(number, style, SEED)
        else:
            subject = number % len(SUBJECTS)
            scene = scene_of(torch.tensor([subject]), style, generator(SEED, "one", number))
            yield Several(render(scene)[0], (SUBJECTS[subject],), extents(scene), style)


def look(host: Host, scene: Several, noises: int) -> Seen:
    phrases = [*scene.subjects, " ".join(scene.style.words)]
    return Seen(
        scene,
        {
            name: looked(host, watch_of(host), scene.picture, prompt_of(scene), phrases, Search(levels, noises))
            for name, levels in LEVELS.items()
        },
        error_maps(host, scene.picture, prompt_of(scene), scene.subjects, Search(noises=noises)),
    )


def layers_of(recorder: Recorder, first: float, last: float) -> Tensor:
    """The mean map (phrases, h, w) of a part of the layers, given by shares of their number."""
    chosen = list(recorder.sums)[int(first * len(recorder.sums)) : max(1, round(last * len(recorder.sums)))]
    size = (recorder.layout.height, recorder.layout.width)
    return torch.stack([F.interpolate(recorder.sums[n][None], size, mode="bilinear")[0] for n in chosen]).mean(0)


def planted(scene: Several) -> Tensor:
    """The truth as a perfect attention would have it: the share of each token that is in a phrase's box."""
    maps = torch.zeros(len(scene.boxes), *scene.picture.shape[1:])
    for number, (left, top, right, bottom) in enumerate(scene.boxes.tolist()):
        maps[number, top:bottom, left:right] = 1
    return F.adaptive_avg_pool2d(maps, 8)


def boxes(maps: Tensor, scene: Several, options: BoxOptions) -> list[Box | None]:
    height, width = scene.picture.shape[1:]
    return [box_of_map(values, height, width, options) for values in maps[: len(scene.subjects)]]


def centred(scene: Several) -> list[Box | None]:
    """The middle of the picture, whatever is asked for: 60 % of each side, as subjects that are alone have."""
    side = scene.picture.shape[-1]
    return [Box(round(0.2 * side), round(0.2 * side), round(0.8 * side), round(0.8 * side))] * len(scene.subjects)


def own(seen: Seen, level: str = "middle") -> Tensor:
    return contrasted(seen.looks[level].maps())


def errors_of(seen: Seen) -> Tensor:
    return seen.errors


PLAIN, OTSU = BoxOptions(), BoxOptions(rule="otsu")
WAYS: dict[str, Callable[[Seen], list[Box | None]]] = {
    "planted maps, 8x8 tokens": lambda seen: boxes(planted(seen.scene), seen.scene, PLAIN),
    "the middle of the picture": lambda seen: centred(seen.scene),
    "attention, as shipped": lambda seen: boxes(own(seen), seen.scene, PLAIN),
    "prediction error, as shipped": lambda seen: boxes(seen.errors, seen.scene, PLAIN),
    "prediction error, threshold by Otsu": lambda seen: boxes(seen.errors, seen.scene, OTSU),
    "attention, threshold by Otsu": lambda seen: boxes(own(seen), seen.scene, OTSU),
    "attention, not less the others": lambda seen: boxes(seen.looks["middle"].maps(), seen.scene, PLAIN),
    "attention, first third of the layers": lambda seen: boxes(
        contrasted(layers_of(seen.looks["middle"], 0, 1 / 3)), seen.scene, PLAIN
    ),
    "attention, last third of the layers": lambda seen: boxes(
        contrasted(layers_of(seen.looks["middle"], 2 / 3, 1)), seen.scene, PLAIN
    ),
    "attention, little noise": lambda seen: boxes(own(seen, "clean"), seen.scene, PLAIN),
    "attention, much noise": lambda seen: boxes(own(seen, "noisy"), seen.scene, PLAIN),
}


def overlaps(found: Sequence[Box | None], scene: Several) -> list[float]:
    return [
        0.0 if box is None else overlap(box, Box(*truth))
        for box, truth in zip(found, scene.boxes.tolist(), strict=True)
    ]


def report(kind: str, seen: Sequence[Seen]) -> Iterator[str]:
    """A row a way."""
    for name, way in WAYS.items():
        values = torch.tensor([value for each in seen for value in overlaps(way(each), each.scene)])
        mean, good = mean_interval(values), mean_interval((values >= 0.5).float())
        yield (
            f"| {kind} | {name} | {mean.mean:.2f} ± {mean.mean - mean.low:.2f} | "
            f"{100 * good.mean:.0f} ± {100 * (good.mean - good.low):.0f} % | {len(values)} |"
        )


def draw_figure(path: Path, seen: Sequence[Seen], maps_of: Callable[[Seen], Tensor]) -> None:
    """What each phrase took, picture under picture; thick frames are the truth, thin ones what was found."""
    from PIL import Image

    rows = []
    for each in seen[:SHOWN]:
        height, width = each.scene.picture.shape[1:]
        maps, found = maps_of(each), []
        for number, phrase in enumerate(each.scene.subjects):
            place = F.interpolate(maps[None, number : number + 1], (height, width), mode="bilinear")[0, 0]
            tight = boxes(maps, each.scene, PLAIN)[number] or Box(0, 0, width, height)
            place = place / place.max().clamp(min=1e-6)
            found.append(Found(phrase, tight, Box(*each.scene.boxes[number].tolist()), place, False))
        rows.append(draw_found(each.scene.picture, found, columns=5))
    width = max(row.shape[2] for row in rows)
    sheet = torch.cat([F.pad(row, (0, width - row.shape[2]), value=1.0) for row in rows], 1)
    pixels = (sheet.movedim(0, -1) * 255).round().to(torch.uint8).numpy()
    Image.fromarray(pixels).reduce(2).save(path, optimize=True)


@contextmanager
def with_adapter(host: Host, path: Path | None) -> Iterator[None]:
    if path is None:
        yield
        return
    loaded = load_adapter(path, "diffusers")
    parts = parts_named({"": host.denoiser.module}, loaded.names, host.denoiser.family)
    with attached_to_parts(parts, loaded.config, seed=0) as adapter:
        adapter.load_state_dict(loaded.state)
        yield


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--pictures", type=int, default=60, help="of each kind")
    parser.add_argument("--noises", type=int, default=4, help="at each noise level")
    parser.add_argument("--adapter", type=Path, default=None, help="to put on the model first")
    parser.add_argument("--figure", type=Path, default=None, help="a PNG of what the phrases took")
    parser.add_argument("--errors", action="store_true", help="draw what prediction errors found in the figure")
    options = parser.parse_args()
    host = load_embedded()
    print("| subjects | boxes by | mean IoU | IoU 0.5 or better | phrases |\n| --- | --- | --- | --- | --- |")
    with with_adapter(host, options.adapter):
        for kind in ("one", "several"):
            seen = [look(host, scene, options.noises) for scene in pictures(kind, options.pictures)]
            print("\n".join(report(kind, seen)), flush=True)
        if options.figure is not None:
            draw_figure(options.figure, seen, errors_of if options.errors else own)


if __name__ == "__main__":
    main()
