"""What has to hold of every family that can be trained, found out on a tiny random model of it.

The tests assert it, and ``benchmarks/families.py`` makes a table of it.
"""

import contextlib
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path

import comfy.lora
import comfy.lora_convert
import comfy.samplers
import comfy.sd
import comfy.utils
import folder_paths
import torch
from comfy.model_management import InterruptProcessingException
from safetensors import safe_open
from tiny_models import TINY, TinyClip, TinyVae, tiny_model
from torch import Tensor, nn

from stylewright.nodes.bridge.denoiser import ComfyDenoiser
from stylewright.nodes.bridge.families import family_of, is_film
from stylewright.nodes.bridge.fitting import ReadingRecord
from stylewright.nodes.bridge.noise_levels import noise_levels
from stylewright.nodes.bridge.prompts import PromptTable
from stylewright.nodes.bridge.session import training_session
from stylewright.nodes.dataset import StyleDatasetNode
from stylewright.nodes.trainer import StyleFriendlySNRTrainer
from stylewright.training.adapters.attach import Adapter, attached
from stylewright.training.adapters.methods import AdapterConfig
from stylewright.training.adapters.targets import exactly, resolve_targets, target_patterns
from stylewright.training.denoiser import Conditioning
from stylewright.training.formats.adapters import load_adapter
from stylewright.training.gradients import differentiable
from stylewright.training.predictions import to_x0_eps

STEPS = 3
PROMPT = "star in red chalk style"


@dataclass(frozen=True)
class Parts:
    """What a user has loaded."""

    family: str  # a key of TINY
    model: object
    clip: TinyClip
    vae: TinyVae


def load(family: str) -> Parts:
    """As loader nodes do, in inference mode."""
    with torch.inference_mode():
        model = tiny_model(family)
    return Parts(family, model, TinyClip(family), TinyVae(family, is_film(model)))


@contextmanager
def folders(base: Path) -> Iterator[Path]:
    """models/loras and output of ComfyUI below ``base``; yields the first."""
    loras, output = base / "loras", base / "output"
    loras.mkdir(parents=True, exist_ok=True)
    before = folder_paths.folder_names_and_paths["loras"], folder_paths.output_directory
    folder_paths.folder_names_and_paths["loras"] = ([str(loras)], {".safetensors"})
    folder_paths.output_directory = str(output)
    try:
        yield loras
    finally:
        folder_paths.folder_names_and_paths["loras"], folder_paths.output_directory = before


def defaults(node: type) -> dict[str, object]:
    """A node's widgets as they stand when it is put into a graph."""
    inputs = node.define_schema().inputs
    return {each.id: each.default for each in inputs if getattr(each, "default", None) is not None}


def train(parts: Parts, base: Path, **widgets: object) -> Path:
    """The file of a run of ``STEPS`` steps on two pictures, by the nodes, as ComfyUI's executor runs them."""
    side = TINY[parts.family].size[0] * TINY[parts.family].pixels
    pictures = torch.rand(2, side, side, 3, generator=torch.Generator().manual_seed(2))
    stated = defaults(StyleDatasetNode) | {"captions": "star\nhouse by a lake", "style_phrase": "red chalk"}
    stated |= {"resolution": side}

    class Trainer(StyleFriendlySNRTrainer):
        """With the hidden inputs that an executor would set."""

    Trainer.hidden = type("Hidden", (), {"unique_id": None})
    short = {"steps": STEPS, "learning_rate": 2e-2, "rank": 2, "alpha": 0.0, "batch_size": 2, "accumulation": 1}
    short |= {"precision": "float32", "gradient_checkpointing": False, "file_name": "test"}
    short |= {"sample_prompt": "tree", "sample_every": STEPS, "sample_steps": 1}
    with folders(base), torch.inference_mode():
        dataset = StyleDatasetNode.execute(images=[pictures], **{name: [value] for name, value in stated.items()})
        options = defaults(StyleFriendlySNRTrainer) | short | widgets
        outputs = Trainer.execute(parts.model, parts.clip, parts.vae, dataset.args[0], **options).args
    return Path(outputs[2])


def train_with_a_cancel(parts: Parts, base: Path, passes: int) -> Path:
    """The same, cancelled by the user in some forward pass of the second half of ``passes``, and queued again.

    Which one is drawn from the family's name.
    """
    draw = torch.Generator().manual_seed(sum(parts.family.encode()))
    cancelled_in = int(torch.randint(passes // 2, passes, (), generator=draw))
    with counted(parts.model, cancel_in=cancelled_in), contextlib.suppress(InterruptProcessingException):
        train(parts, base)
        raise AssertionError(f"there was no pass {cancelled_in} to cancel")
    return train(parts, base)


@contextmanager
def counted(model: object, cancel_in: int | None = None) -> Iterator[list[None]]:
    """One entry for each forward pass of the network, probes and sample pictures included."""
    passes: list[None] = []

    def count(*unused: object) -> None:
        if len(passes) == cancel_in:
            raise InterruptProcessingException
        passes.append(None)

    handle = model.model.diffusion_model.register_forward_pre_hook(count)
    try:
        yield passes
    finally:
        handle.remove()


def latents(parts: Parts, rows: int = 2) -> Tensor:
    tiny = TINY[parts.family]
    return torch.randn(rows, tiny.channels, *tiny.size, generator=torch.Generator().manual_seed(9))


def answer(model: object, parts: Parts) -> Tensor:
    """The prediction of a model with whatever patches it has, (2, c, h, w)."""
    with torch.inference_mode(), training_session(model), torch.no_grad():
        return _answer(model, parts)


def _answer(model: object, parts: Parts) -> Tensor:
    prompts = PromptTable(parts.clip)
    levels = torch.tensor([-3.0, 0.5])
    return ComfyDenoiser(model, prompts)(latents(parts), levels, prompts.encode([PROMPT, "a"]))


def answer_as_trained(parts: Parts, path: Path) -> Tensor:
    """The prediction with the adapter of a file attached as in training, by peft."""
    return as_trained(parts, path, lambda *unused: _answer(parts.model, parts))


def as_trained(parts: Parts, path: Path, ask: Callable[[ComfyDenoiser, Conditioning], Tensor]) -> Tensor:
    """What ``ask`` makes of the denoiser with that adapter, and of a prompt."""
    loaded = load_adapter(path)
    config = AdapterConfig(loaded.method, loaded.rank, loaded.alpha, exactly(loaded.names))
    with torch.inference_mode(), training_session(parts.model), torch.no_grad():
        module = parts.model.model.diffusion_model
        with attached(module, config, family=loaded.family, seed=0) as adapter:
            adapter.load_state_dict(loaded.state)
            prompts = PromptTable(parts.clip)
            return ask(ComfyDenoiser(parts.model, prompts), prompts.encode([PROMPT]))


@dataclass(frozen=True)
class StockAnswer:
    """What ComfyUI's own loader makes of a file."""

    answer: Tensor
    unmatched: tuple[str, ...]  # tensors that found no place
    layers: int  # that were patched


def answer_of_stock_loader(parts: Parts, path: Path) -> StockAnswer:
    file = comfy.utils.load_torch_file(str(path))
    record = ReadingRecord(comfy.lora_convert.convert_lora(dict(file)))
    patches = comfy.lora.load_lora(record, comfy.lora.model_lora_keys_unet(parts.model.model, {}), log_missing=False)
    with torch.inference_mode():
        model, _ = comfy.sd.load_lora_for_models(parts.model, None, file, 1.0, 0.0)
    return StockAnswer(answer(model, parts), tuple(key for key in record if key not in record.read), len(patches))


@dataclass(frozen=True)
class Gradients:
    """Of the loss by an adapter's parameters, against differences of the loss itself."""

    slope: float  # along a direction that every parameter has a part in
    difference: float  # of the loss, along the same
    checkpointed: float  # the slope with blocks recomputed
    finite: bool
    idle: int  # parameters that get none
    influence_of_idle: float  # on the loss, where these are changed
    foreign: tuple[str, ...]  # parameters of the model that got one


def gradients(parts: Parts, targets: str = "all") -> Gradients:
    """With the adapter somewhere, not at its start, where half of the gradients are zero."""
    wanted = torch.randn(latents(parts).shape, generator=torch.Generator().manual_seed(5))
    module = parts.model.model.diffusion_model

    def loss() -> Tensor:
        return (_answer(parts.model, parts) - wanted).square().mean()

    with torch.inference_mode(), training_session(parts.model):
        config, family = AdapterConfig(rank=2, targets=targets), family_of(parts.model)
        with attached(module, config, family=family, seed=0) as adapter:
            fill(adapter.parameters())
            recomputed, _ = backward(module, loss, adapter, checkpoint=True)
            found, foreign = backward(module, loss, adapter, checkpoint=False)
            return compared(adapter, loss, found, recomputed, foreign)


@torch.no_grad()
def fill(parameters: list[nn.Parameter]) -> None:
    draw = torch.Generator().manual_seed(5)
    for parameter in parameters:
        parameter.copy_(torch.randn(parameter.shape, generator=draw) * 0.3)


def backward(
    module: nn.Module, loss: Callable[[], Tensor], adapter: Adapter, *, checkpoint: bool
) -> tuple[list[Tensor | None], list[str]]:
    """The adapter's gradients, and the names of what else got one."""
    ours = adapter.parameters()
    with differentiable(module, checkpoint=checkpoint):
        loss().backward()
    found = [None if parameter.grad is None else parameter.grad.clone() for parameter in ours]
    known = {id(parameter) for parameter in ours}
    foreign = [name for name, each in module.named_parameters() if each.grad is not None and id(each) not in known]
    for parameter in ours:
        parameter.grad = None
    return found, foreign


@torch.no_grad()
def compared(
    adapter: Adapter,
    loss: Callable[[], Tensor],
    found: list[Tensor | None],
    recomputed: list[Tensor | None],
    foreign: list[str],
) -> Gradients:
    ours = adapter.parameters()
    live = [(parameter, gradient) for parameter, gradient in zip(ours, found, strict=True) if gradient is not None]
    # Of the same size as the gradients, so that none drowns, and not along them, so that no error hides.
    draw = torch.Generator().manual_seed(6)
    directions = [gradient + gradient.std() * torch.randn(gradient.shape, generator=draw) for _, gradient in live]
    size = torch.cat([direction.flatten() for direction in directions]).double().norm()
    directions = [direction / size for direction in directions]
    slope = sum(float((g.double() * d.double()).sum()) for (_, g), d in zip(live, directions, strict=True))
    again = [gradient for gradient in recomputed if gradient is not None]
    start = [parameter.clone() for parameter, _ in live]

    def loss_at(step: float) -> float:
        for (parameter, _), value, direction in zip(live, start, directions, strict=True):
            parameter.copy_(value + step * direction)
        return float(loss().double())

    h = min(0.1, 1e-3 / abs(slope))  # far enough for float32; of fourth order, because the loss bends
    difference = (8 * (loss_at(h) - loss_at(-h)) - (loss_at(2 * h) - loss_at(-2 * h))) / (12 * h)
    here = loss_at(0.0)
    idle = [parameter for parameter, gradient in zip(ours, found, strict=True) if gradient is None]
    for parameter in idle:
        parameter.mul_(2)
    return Gradients(
        slope=slope,
        difference=difference,
        checkpointed=sum(float((g.double() * d.double()).sum()) for g, d in zip(again, directions, strict=True)),
        finite=all(bool(gradient.isfinite().all()) for _, gradient in live),
        idle=len(idle),
        influence_of_idle=abs(float(loss().double()) - here),
        foreign=tuple(foreign),
    )


def relative(a: Tensor, b: Tensor) -> float:
    return float((a - b).norm() / b.norm())


def same_content(one: Path, other: Path) -> bool:
    """Whether two adapters' files hold the same tensors and say the same. safetensors shuffles its header."""
    with safe_open(one, "pt") as first, safe_open(other, "pt") as second:
        names = list(first.keys())
        return (
            names == list(second.keys())
            and first.metadata() == second.metadata()
            and all(torch.equal(first.get_tensor(name), second.get_tensor(name)) for name in names)
        )


def answer_of_comfyui(parts: Parts, log_snr: float) -> tuple[Tensor, Tensor]:
    """The clean latents that ComfyUI's own guider finds at one noise level, and those that our denoiser means."""
    x_t, levels = latents(parts, 1), torch.tensor([log_snr])
    with torch.inference_mode(), training_session(parts.model), torch.no_grad():
        prompts = PromptTable(parts.clip)
        denoiser = ComfyDenoiser(parts.model, prompts)
        ours, _ = to_x0_eps(
            denoiser.prediction, denoiser(x_t, levels, prompts.encode([PROMPT])), denoiser.process, x_t, levels
        )
    counted = noise_levels(parts.model)
    x, sigma = counted.comfy_input(x_t, levels), counted.sigma(levels)
    found = []

    def call_once(model_k, noise, sigmas, extra_args=None, callback=None, disable=None):
        found.append(model_k(x[:, :, None] if is_film(parts.model) else x, sigma, **extra_args))
        return noise

    with torch.inference_mode():
        guider = comfy.samplers.CFGGuider(parts.model)
        guider.set_conds(parts.clip.encode_from_tokens_scheduled(PROMPT), [])
        guider.set_cfg(1.0)
        empty = torch.zeros_like(x[:, :, None] if is_film(parts.model) else x)
        sampler = comfy.samplers.KSAMPLER(call_once)
        # A second time like the first: where a mean velocity is asked for, it is the velocity here.
        guider.sample(empty, empty, sampler, sigma.repeat(2), disable_pbar=True)
    return found[0].reshape(x.shape).clone() / counted.data_scale, ours


def tokens_of(parts: Parts, size: tuple[int, int]) -> int:
    """The longest sequence that the network's attention layers are given for latents of a size."""
    lengths, network = [], parts.model.model.diffusion_model

    def note(layer: nn.Module, args: tuple) -> None:
        lengths.append(args[0].numel() // args[0].shape[-1])

    with torch.inference_mode(), torch.no_grad(), ExitStack() as stack:
        for name in resolve_targets(network, target_patterns(family_of(parts.model), "attention")):
            stack.callback(network.get_submodule(name).register_forward_pre_hook(note).remove)
        stack.enter_context(training_session(parts.model))
        prompts = PromptTable(parts.clip)
        x_t = torch.zeros(1, TINY[parts.family].channels, *size)
        ComfyDenoiser(parts.model, prompts)(x_t, torch.tensor([-1.0]), prompts.encode([PROMPT]))
    return max(lengths)
