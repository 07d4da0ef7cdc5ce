"""Teaches the embedded model, which knows pictures of one subject, pictures of several: a LoRA for other benchmarks.

    python benchmarks/several_subjects.py --steps 5500 --work work/several

It goes on where it stopped, and leaves ``several.safetensors`` in the folder. The pooled vector names all subjects of
a prompt, but none of their places; it is left out of most samples, so that the model learns to attend to words.
"""

import argparse
import logging
import math
from pathlib import Path

from package import load_package

load_package()

import torch  # noqa: E402
from torch import Tensor  # noqa: E402

from stylewright.training.adapters.attach import attached  # noqa: E402
from stylewright.training.adapters.methods import AdapterConfig  # noqa: E402
from stylewright.training.densities import Mixture, Normal, UniformTime, stratified_uniform  # noqa: E402
from stylewright.training.embedded.pretrain.prompts import prompts  # noqa: E402
from stylewright.training.embedded.pretrain.scenes import training_scenes  # noqa: E402
from stylewright.training.embedded.renderer import SUBJECTS, Scene, render, render_together  # noqa: E402
from stylewright.training.embedded.several import MOST, placed  # noqa: E402
from stylewright.training.embedded.vocabulary import INDEX, PAD, SLOTS  # noqa: E402
from stylewright.training.embedded.weights import Weights  # noqa: E402
from stylewright.training.formats.adapters import save_adapter  # noqa: E402
from stylewright.training.formats.metadata import AdapterMetadata, build_metadata  # noqa: E402
from stylewright.training.formats.state import load_state, save_state  # noqa: E402
from stylewright.training.hosts.attention import PlainAttention  # noqa: E402
from stylewright.training.hosts.embedded import load_embedded, load_text_encoder  # noqa: E402
from stylewright.training.hosts.host import Host  # noqa: E402
from stylewright.training.noise import add_noise  # noqa: E402
from stylewright.training.randomness import generator  # noqa: E402

logger = logging.getLogger(__name__)

CHUNK = 64  # pictures that are drawn and encoded at once
DENSITY = Mixture((Normal(-1.0, 2.4), UniformTime()), (0.7, 0.3))
SAVE_EVERY = 100  # steps


def chunk(host: Host, number: int) -> dict[str, Tensor]:
    """Latents (64, c, h, w) of pictures of 1 to 4 subjects, and the words of their prompts (64, 8)."""
    draw = generator(7, "several subjects", number)
    scenes = training_scenes(CHUNK, 7, "several subjects", number, named=0.3)
    attributes = [scenes.subject, scenes.palette, scenes.ground, scenes.fill, scenes.edge]
    words, pictures, rows = prompts(torch.stack(attributes, 1), draw), [], []
    for i in range(CHUNK):
        count = 1 + i % MOST
        if count == 1:
            pictures.append(render(scenes[i : i + 1])[0])
            rows.append(words[i].tolist())
            continue
        subjects = torch.randperm(len(SUBJECTS), generator=draw)[:count]
        one = scenes[torch.full((count,), i)]
        place = placed(count, draw)
        pictures.append(
            render_together(Scene(subjects, one.palette, one.ground, one.fill, one.edge, one.colours, *place))
        )
        style = [word for word in words[i, 1:].tolist() if word != PAD]
        named = [INDEX[SUBJECTS[subject]] for subject in subjects.tolist()]
        row = (named + style)[:SLOTS] if words[i].any() else []
        rows.append(row + [PAD] * (SLOTS - len(row)))
    return {"latents": host.encode_images(torch.stack(pictures)), "words": torch.tensor(rows)}


def pool(host: Host, folder: Path, chunks: int) -> dict[str, Tensor]:
    """All pictures, encoded once and kept."""
    parts = []
    for number in range(chunks):
        path = folder / f"pictures-{number}.safetensors"
        if not path.exists():
            save_state(path, chunk(host, number))
            logger.info("encoded %d of %d pictures", (number + 1) * CHUNK, chunks * CHUNK)
        parts.append(load_state(path))
    return {name: torch.cat([part[name] for part in parts]) for name in parts[0]}


def rate(step: int, steps: int) -> float:
    """Factor of the learning rate: a warm-up of 100 steps, and a linear end over the second half."""
    return min(1.0, (step + 1) / 100, max(0.02, 2 * (steps - step) / steps))


def teach(options: argparse.Namespace) -> None:
    host, text = load_embedded(), load_text_encoder(Weights())
    data = pool(host, options.work, math.ceil(options.pictures / CHUNK))
    config, checkpoint = AdapterConfig(rank=options.rank, targets="all"), options.work / "checkpoint.safetensors"
    with attached(host.denoiser.module, config, family="flux", seed=1) as adapter:
        optimizer, start = torch.optim.AdamW(adapter.parameters(), lr=options.rate, weight_decay=0.0), 0
        if checkpoint.exists():
            kept = load_state(checkpoint)
            adapter.load_state_dict(kept["adapter"])
            optimizer.load_state_dict(kept["optimizer"])
            start = kept["step"]
        total = 0.0
        for step in range(start, options.steps):
            for group in optimizer.param_groups:
                group["lr"] = options.rate * rate(step, options.steps)
            total += learn(host, text, data, step, options)
            optimizer.step()
            optimizer.zero_grad()
            if (step + 1) % SAVE_EVERY == 0 or step + 1 == options.steps:
                logger.info("step %d: loss %.4f", step + 1, total / ((step - start) % SAVE_EVERY + 1))
                total = 0.0
                state = {"adapter": adapter.state_dict(), "optimizer": optimizer.state_dict(), "step": step + 1}
                save_state(checkpoint, state)
                about = AdapterMetadata(family="flux", method="lora", rank=options.rank, alpha=None, steps=step + 1)
                save_adapter(options.work / "several.safetensors", adapter.state_dict(), build_metadata(about))


def learn(host: Host, text: torch.nn.Module, data: dict[str, Tensor], step: int, options: argparse.Namespace) -> float:
    """One backward pass; its loss."""
    draw = generator(3, "several subjects", "step", step)
    picked = torch.randint(len(data["latents"]), (options.batch,), generator=draw)
    x0, words = data["latents"][picked].float(), data["words"][picked]
    with torch.no_grad():
        context, pooled = text(words)
    kept = torch.rand(options.batch, 1, generator=draw) >= options.without_pooled
    log_snr = DENSITY.icdf(stratified_uniform(options.batch, draw))
    eps = torch.randn(x0.shape, generator=draw)
    with PlainAttention(), torch.autocast("cpu", torch.bfloat16):
        conditioning = {"context": context, "pooled": pooled * kept}
        flow = host.denoiser(add_noise("flow", x0, eps, log_snr), log_snr, conditioning)
    loss = (flow.float() - (eps - x0)).square().mean()
    loss.backward()
    return loss.item()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--work", type=Path, required=True, help="folder of pictures, checkpoint and adapter")
    parser.add_argument("--steps", type=int, default=5500)
    parser.add_argument("--pictures", type=int, default=5120)
    parser.add_argument("--batch", type=int, default=16)
    parser.add_argument("--rank", type=int, default=64)
    parser.add_argument("--rate", type=float, default=1e-3)
    parser.add_argument("--without-pooled", type=float, default=0.6, help="share of the samples")
    options = parser.parse_args()
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(message)s", datefmt="%H:%M")
    options.work.mkdir(parents=True, exist_ok=True)
    teach(options)


if __name__ == "__main__":
    main()
