"""The parts of a model on disk: a folder in diffusers' layout, and maybe a single file whose weights come first.

Nothing is downloaded. Every call says so *and* names a folder: without a folder of configurations, diffusers'
``from_single_file`` goes to the hub even when it is told ``local_files_only``. Nothing is unpickled: only
safetensors are read.
"""

import importlib
import inspect
import json
import re
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn

LIBRARIES = ("diffusers", "transformers")
DTYPE_SINCE = {"diffusers": (0, 40), "transformers": (4, 56)}  # the option was called torch_dtype before
PART = r"(text_encoder|tokenizer)(_\d)?|unet|transformer|vae|scheduler|safety_checker|feature_extractor|image_encoder"
OPTIONAL = ("text_encoder_3", "tokenizer_3")  # SD3's T5: diffusers puts zeros in its place
UNUSED = ("safety_checker", "feature_extractor", "image_encoder")  # parts of pipelines that training has no use for
DENOISER_PREFIX = "model.diffusion_model."  # in checkpoints that hold more than the denoiser
VAE_PREFIXES = ("first_stage_model.", "vae.")
TEXT_PREFIXES = {  # where single files keep text encoders, if they hold any
    "flux": {"text_encoder": "text_encoders.clip_l.", "text_encoder_2": "text_encoders.t5xxl."},
    "sd3": {
        "text_encoder": "text_encoders.clip_l.",
        "text_encoder_2": "text_encoders.clip_g.",
        "text_encoder_3": "text_encoders.t5xxl.",
    },
    "sdxl": {"text_encoder": "conditioner.embedders.0.", "text_encoder_2": "conditioner.embedders.1."},
    "sd15": {"text_encoder": "cond_stage_model."},
}


Placing = Callable[[Any], Any]  # a network, as it computes


@dataclass(frozen=True)
class Parts:
    """Where the parts of one model are, and how they are to be loaded."""

    family: str
    folder: Path  # model_index.json and one folder for each part
    checkpoint: Path | None  # a single file with the denoiser, and maybe the autoencoder and text encoders
    device: str
    dtype: torch.dtype  # of the denoiser and the text encoders; the autoencoder runs in float32
    place: Placing | None = None  # brings the denoiser to where it computes; None = whole onto the device

    @property
    def name(self) -> str:
        return str(self.checkpoint or self.folder)

    @property
    def index(self) -> dict[str, Any]:
        return read_json(self.folder / "model_index.json")

    def config(self, part: str) -> dict[str, Any]:
        """A part's own configuration."""
        return read_json(self.folder / part / ("scheduler_config.json" if part == "scheduler" else "config.json"))

    def keys(self) -> list[str]:
        """The keys of the single file, if there is one."""
        return checkpoint_keys(self.checkpoint) if self.checkpoint else []

    def load(self, part: str, dtype: torch.dtype) -> Any:
        """A model of diffusers or transformers, frozen, in evaluation mode and main memory."""
        if (listed := self.listed(part)) is None:
            raise ValueError(f"{self.folder} has no {part}")
        library, class_name = listed
        model_class = getattr(importlib.import_module(library), class_name)
        options: dict[str, Any] = {"subfolder": part, "local_files_only": True, **dtype_option(library, dtype)}
        with reading(f"the {part} ({class_name}) of {self.name}"):
            if self.holds(part):
                model = model_class.from_single_file(self.state(part), config=str(self.folder), **options)
                require_all(name for name, value in model.named_parameters() if value.is_meta)
            else:
                options |= {"use_safetensors": True, "variant": self._variant(part), "output_loading_info": True}
                model, info = model_class.from_pretrained(self.folder, **options)
                require_all(info["missing_keys"])
        return model.requires_grad_(False).eval()

    def load_denoiser(self, part: str) -> Any:
        """The denoiser, where it computes."""
        return self.placed(self.load(part, self.dtype))

    def placed(self, denoiser: Any) -> Any:
        return denoiser.to(self.device) if self.place is None else self.place(denoiser)

    def load_text_pipeline(self, denoiser: nn.Module) -> Any:
        """The diffusers pipeline with tokenizers and text encoders only; it knows how this model reads prompts."""
        given: dict[str, Any] = {}
        for part in self.pipeline_parts():
            if part in ("vae", *UNUSED) or self.listed(part) is None:
                given[part] = None
            elif part.startswith("text_encoder") and not self.holds(part):
                given[part] = self.load(part, self.dtype)
        given["unet" if "unet" in self.pipeline_parts() else "transformer"] = denoiser
        if "safety_checker" in given:
            given["requires_safety_checker"] = False
        with reading(f"the text encoders of {self.name}"):
            if any(self.holds(part) for part in TEXT_PREFIXES.get(self.family, ())):
                given |= {"config": str(self.folder)} | dtype_option("diffusers", self.dtype)
                return self.pipeline_class().from_single_file(str(self.checkpoint), local_files_only=True, **given)
            return self.pipeline_class().from_pretrained(self.folder, local_files_only=True, **given)

    def pipeline_class(self) -> Any:
        return getattr(importlib.import_module("diffusers"), self.index["_class_name"])

    def pipeline_parts(self) -> list[str]:
        """The models, tokenizers and the scheduler that this kind of pipeline is made of."""
        parameters = inspect.signature(self.pipeline_class().__init__).parameters
        return [name for name in parameters if re.fullmatch(PART, name)]

    def listed(self, part: str) -> tuple[str, str] | None:
        """Library and class of a part according to the folder; None where it has none that we know how to open."""
        entry = self.index.get(part)
        return (entry[0], entry[1]) if isinstance(entry, list) and entry[0] in LIBRARIES else None

    def holds(self, part: str) -> bool:
        """Whether the weights of this part are in the single file."""
        if part in ("unet", "transformer"):
            return self.checkpoint is not None
        prefixes = VAE_PREFIXES if part == "vae" else TEXT_PREFIXES.get(self.family, {}).get(part)
        return prefixes is not None and any(key.startswith(prefixes) for key in self.keys())

    def state(self, part: str) -> dict[str, Tensor]:
        """The tensors of the autoencoder or the denoiser in the single file, in its own key names."""
        assert self.checkpoint is not None
        if part == "vae":
            return read_tensors(self.checkpoint, [key for key in self.keys() if key.startswith(VAE_PREFIXES)])
        inside = [key for key in self.keys() if key.startswith(DENOISER_PREFIX)]
        state = read_tensors(self.checkpoint, inside or self.keys())
        # diffusers finds a UNet by its prefix, which files with nothing else in them leave out.
        return state if inside or part == "transformer" else {DENOISER_PREFIX + key: state[key] for key in state}

    def require_channels(self, found: int, expected: int) -> None:
        """ValueError for models that read more than a latent: inpainting, control and editing variants."""
        if found != expected:
            raise ValueError(
                f"{self.name} is not a text-to-image model: its input has {found} channels, its latents have {expected}"
            )

    def missing(self) -> list[str]:
        """What is not on disk, one description for each part."""
        lacking = []
        for part in self.pipeline_parts():
            listed = self.listed(part)
            if part in UNUSED or (part in OPTIONAL and listed is None):
                continue
            if listed is None:
                lacking.append(f"{part} (model_index.json says {self.index.get(part)})")
            elif not self._is_complete(part):
                lacking.append(f"{part} ({listed[1]}) in {self.folder / part}")
        return lacking

    def _is_complete(self, part: str) -> bool:
        folder = self.folder / part
        if part == "scheduler":
            return (folder / "scheduler_config.json").is_file()
        if part.startswith("tokenizer"):
            return folder.is_dir() and any(folder.iterdir())
        if self.family == "flux" and part == "transformer" and self.checkpoint:
            return True  # its configuration follows from its tensors
        return (folder / "config.json").is_file() and (self.holds(part) or any(folder.glob("*.safetensors")))

    def _variant(self, part: str) -> str | None:
        """Half-precision files are asked for where there are no others."""
        files = [file.name for file in (self.folder / part).glob("*.safetensors")]
        return "fp16" if files and all(".fp16" in name for name in files) else None


def dtype_option(library: str, dtype: torch.dtype) -> dict[str, torch.dtype]:
    """The option that sets a model's type while it loads, which both libraries have renamed."""
    release = tuple(int(number) for number in version(library).split(".")[:2])
    return {"dtype" if release >= DTYPE_SINCE[library] else "torch_dtype": dtype}


def require_all(missing: Iterable[str]) -> None:
    """ValueError where weights were not in the file: the libraries only warn, and go on with random ones."""
    if names := sorted(missing):
        raise ValueError(f"{len(names)} of its weights are missing, for example {', '.join(names[:3])}")


def read_json(path: Path) -> dict[str, Any]:
    """ValueError where the file is missing or holds something else."""
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ValueError(f"cannot read {path}: {error}") from error
    if not isinstance(content, dict):
        raise ValueError(f"cannot read {path}: expected a JSON object, got {type(content).__name__}")
    return content


def checkpoint_keys(path: Path) -> list[str]:
    with reading(str(path)), safe_open(path, framework="pt") as file:
        return list(file.keys())


def read_tensors(path: Path, keys: list[str]) -> dict[str, Tensor]:
    with reading(str(path)), safe_open(path, framework="pt") as file:
        return {key: file.get_tensor(key) for key in keys}


@contextmanager
def reading(what: str) -> Iterator[None]:
    """Turns what libraries raise about a file into one ValueError that names it.

    Their constructors draw weights, which the file then replaces: the global generator is left as it was.
    """
    try:
        with torch.random.fork_rng(devices=[]):
            yield
    except (OSError, SafetensorError, KeyError, ValueError, RuntimeError) as error:
        raise ValueError(f"cannot read {what}: {error}") from error
