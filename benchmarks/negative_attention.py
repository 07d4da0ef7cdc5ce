"""What a negative prompt inside attention costs, against CFG, ComfyUI's NAGuidance and ComfyUI-NAG.

    COMFYUI_PATH=… python benchmarks/negative_attention.py [--time] [--nag PATH] [--json]

``flops``: products of one step at CFG 1, batch 1, over those of the plain model, in percent: counted on models of their
real sizes without weights (device ``meta``), with 77 tokens (SD), 300 (PixArt) or 256 (FLUX) of either prompt.
``first``: the step that makes the negative keys and values, ``later``: those that find them kept.
``--time``: processor time of a run of four steps on small models over that of the plain one, medians of interleaved
rounds, and that of others over that of our ``nag``. ``--nag``: a checkout of ComfyUI-NAG, which is timed, too, where it
runs.
"""

import argparse
import importlib
import json
import statistics
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import torch
from comfyui import open_comfyui, why_absent
from comfyui_models import FLUX_DEV, SDXL, UNET
from package import load_package

SD15 = UNET | {
    "model_channels": 320, "num_heads": 8, "num_head_channels": -1, "context_dim": 768, "channel_mult": [1, 2, 4, 4],
    "num_res_blocks": [2, 2, 2, 2], "transformer_depth": [1, 1, 1, 1, 1, 1, 0, 0], "transformer_depth_middle": 1,
    "transformer_depth_output": [1, 1, 1, 1, 1, 1, 1, 1, 1, 0, 0, 0], "use_linear_in_transformer": False,
    "adm_in_channels": None, "num_classes": None,
}  # fmt: skip
SD21 = SD15 | {"num_heads": -1, "num_head_channels": 64, "context_dim": 1024, "use_linear_in_transformer": True}
PIXART = {
    "image_model": "pixart_alpha", "num_heads": 16, "patch_size": 2, "hidden_size": 1152, "in_channels": 4,
    "depth": 28, "model_max_length": 120, "pe_interpolation": 1, "input_size": 64, "micro_condition": False,
    "caption_channels": 4096,
}  # fmt: skip
# class, configuration, channels and side of latents, tokens and width of text, pooled width
REAL = {
    "SD1.5, 512": ("SD15", SD15, 4, 64, 77, 768, None),
    "SD2.1, 512": ("SD20", SD21, 4, 64, 77, 1024, None),
    "SDXL, 1024": ("SDXL", SDXL, 4, 128, 77, 2048, 2816),
    "PixArt, 512": ("PixArtAlpha", PIXART, 4, 64, 120, 4096, None),
    "FLUX.1, 1024": ("Flux", FLUX_DEV, 16, 128, 256, 4096, 768),
}
METHODS = ("nasa", "nag", "vsf")
PEERS = ("cfg", "NAGuidance", "ComfyUI-NAG")
TOKENS = 77  # of either prompt, of the small models


def model_of(kind: str, config: dict, device: str) -> Any:
    import comfy.model_patcher
    from comfy import supported_models

    known = getattr(supported_models, kind)
    detected = {
        k: v for k, v in known.unet_config.items() if k not in ("use_temporal_attention", "attention_resolutions")
    }
    made = known({**detected, **config, "dtype": torch.float32})
    made.set_inference_dtype(torch.float32, None)
    model = made.get_model({}, "", device=torch.device(device))
    return comfy.model_patcher.ModelPatcher(model, torch.device(device), torch.device(device))


def flops(model: Any, name: str, rows: int = 1) -> list[float]:
    """Of the first call of a run, and of a later one."""
    from comfy.patcher_extension import WrapperExecutor, WrappersMP

    from stylewright.nodes.bridge.denoiser import transformer_options
    from stylewright.training.memory import Footprint

    _, _, channels, side, tokens, width, pooled = REAL[name]
    options = {**transformer_options(model), "cond_or_uncond": [0, 1][:rows]}
    shapes = {"x": (channels, side, side), "c_crossattn": (tokens, width)} | ({"y": (pooled,)} if pooled else {})
    told = {key: torch.zeros(rows, *shape, device="meta") for key, shape in shapes.items()}
    told |= {"t": torch.ones(rows, device="meta")} | (
        {"guidance": torch.ones(rows, device="meta")} if "FLUX" in name else {}
    )
    model.model.current_patcher = model
    x, t, text = told.pop("x"), told.pop("t"), told.pop("c_crossattn")
    counted: list[float] = []

    def network(x: Any, t: Any, c_concat: Any, text: Any, control: Any, options: dict, **rest: Any) -> Any:
        return model.model.diffusion_model(x, t, context=text, control=control, transformer_options=options, **rest)

    # Not apply_model: the tables of its model_sampling are on the CPU.
    call = WrapperExecutor.new_class_executor(network, model.model, all_wrappers(model, WrappersMP.APPLY_MODEL))

    def run() -> None:
        for _ in range(2):
            with Footprint() as cost:
                call.execute(x, t, None, text, None, options, **told)
            counted.append(cost.flops)

    with torch.no_grad(), patched(model):  # in inference mode operations are not taken apart into products
        wrappers = all_wrappers(model, WrappersMP.OUTER_SAMPLE)
        WrapperExecutor.new_class_executor(run, SimpleNamespace(conds={}), wrappers).execute()
    return counted


def all_wrappers(model: Any, kind: str) -> list:
    return [each for found in model.wrappers.get(kind, {}).values() for each in found]


class patched:
    """With a clone's object patches on its model."""

    def __init__(self, model: Any) -> None:
        self._model = model

    def __enter__(self) -> None:
        for path in self._model.object_patches:
            import comfy.utils

            before = comfy.utils.set_attr(self._model.model, path, self._model.object_patches[path])
            self._model.object_patches_backup[path] = before

    def __exit__(self, *_: object) -> None:
        import comfy.utils

        for path, before in self._model.object_patches_backup.items():
            comfy.utils.set_attr(self._model.model, path, before)
        self._model.object_patches_backup.clear()


def products() -> list[dict]:
    from stylewright.nodes.bridge.negative import apply
    from stylewright.training.attention_guidance import AttentionGuidance

    rows = []
    for name, (kind, config, _, _, tokens, width, _) in REAL.items():
        model = model_of(kind, config, "meta")
        negative = [[torch.ones(1, tokens, width), {"pooled_output": torch.ones(1, 1280 if kind == "SDXL" else 768)}]]
        plain = flops(model, name)[0]
        row = {"model": name, "tflop": plain / 1e12, "cfg": 100 * (flops(model, name, 2)[0] / plain - 1)}
        for method in METHODS:
            first, later = flops(apply(model, negative, AttentionGuidance(method, 0.5)), name)
            row |= {f"{method} first": 100 * (first / plain - 1), f"{method} later": 100 * (later / plain - 1)}
        rows.append(row)
    return rows


def contenders(model: Any, own: Any, positive: list, negative: list, nag: Any) -> dict[str, Any]:
    """Guiders by name. ComfyUI-NAG has a model of its ``own``: it leaves one changed where it fails."""
    import comfy.samplers
    from comfy_extras.nodes_nag import NAGuidance

    from stylewright.nodes.bridge.negative import apply
    from stylewright.training.attention_guidance import AttentionGuidance

    def guided(patcher: Any, cfg: float = 1.0) -> Any:
        guider = comfy.samplers.CFGGuider(patcher)
        guider.set_conds(positive, negative)
        guider.set_cfg(cfg)
        return guider

    found = {
        "plain": guided(model),
        "nasa": guided(apply(model, negative, AttentionGuidance("nasa", 0.2))),
        "nag": guided(apply(model, negative, AttentionGuidance("nag", 2.0, 2.5, 0.5))),
        "cfg": guided(model, 2.0),
        "NAGuidance": guided(NAGuidance.execute(model, 3.0, 0.5, 2.5).result[0]),
    }
    if nag is not None:
        for layer in own.model.diffusion_model.modules():
            if type(layer).__name__ == "DoubleStreamBlock":  # which ComfyUI had once, and the pack still asks for
                vars(layer).setdefault("flipped_img_txt", False)
        guider = nag.NAGCFGGuider(own)
        guider.set_conds(positive, negative)
        guider.set_cfg(1.0)
        guider.set_batch_size(1)
        guider.set_nag(negative, 3.0, 2.5, 0.5, 0.0)
        found["ComfyUI-NAG"] = guider
    return found


def small_models() -> dict[str, tuple[str, dict, tuple[int, ...], int, int | None]]:
    """Class, configuration, shape of latents, width of text and of its pooled vector."""
    from comfyui_models import SMALL_FLUX, SMALL_SD3, SMALL_SDXL

    small_sd15 = SMALL_SDXL | {
        "channel_mult": [1, 2, 4], "num_res_blocks": [2, 2, 2], "transformer_depth": [1, 1, 1, 1, 0, 0],
        "transformer_depth_middle": 1, "transformer_depth_output": [1, 1, 1, 1, 1, 1, 0, 0, 0],
        "use_linear_in_transformer": False, "adm_in_channels": None, "num_classes": None,
    }  # fmt: skip
    wan = {
        "image_model": "wan2.1", "model_type": "t2v", "dim": 384, "out_dim": 16, "in_dim": 16, "num_heads": 3,
        "ffn_dim": 1536, "num_layers": 4, "patch_size": (1, 2, 2), "freq_dim": 256, "text_dim": 256,
        "window_size": (-1, -1), "qk_norm": True, "cross_attn_norm": True, "eps": 1e-6,
    }  # fmt: skip
    hunyuan = {
        "image_model": "hunyuan_video", "in_channels": 16, "out_channels": 16, "patch_size": [1, 2, 2],
        "vec_in_dim": 128, "axes_dim": [16, 56, 56], "meanflow": False, "context_in_dim": 256, "hidden_size": 384,
        "mlp_ratio": 4.0, "num_heads": 3, "depth": 2, "depth_single_blocks": 4, "theta": 256, "qkv_bias": True,
        "byt5": False, "guidance_embed": True, "use_cond_type_embedding": False, "vision_in_dim": None,
        "meanflow_sum": False,
    }  # fmt: skip
    return {
        "SD1.5": ("SD15", small_sd15, (4, 32, 32), 256, None),
        "SDXL": ("SDXL", SMALL_SDXL, (4, 32, 32), 256, 128),
        "FLUX": ("Flux", SMALL_FLUX, (16, 32, 32), 256, 128),
        "SD3": ("SD3", SMALL_SD3, (16, 32, 32), 256, 128),
        "Wan": ("WAN21_T2V", wan, (16, 1, 32, 32), 256, None),
        "HunyuanVideo": ("HunyuanVideo", hunyuan, (16, 1, 32, 32), 256, 128),
    }


def times(nag: Any, rounds: int, families: list[str], without: list[str]) -> Iterator[dict]:
    """Processor time over the plain model's, in percent, and peers' over ours: medians of ratios within a round."""
    import comfy.samplers
    from comfyui_models import fill

    for name, (kind, config, shape, width, pooled) in small_models().items():
        if families and name not in families:
            continue
        model, own = (model_of(kind, config, "cpu") for _ in range(2))
        for each in (model, own):
            fill(each.model.requires_grad_(False), torch.device("cpu"))
        draw = torch.Generator().manual_seed(0)
        rest = {"pooled_output": torch.ones(1, pooled)} if pooled else {}
        positive, negative = ([[torch.randn(1, TOKENS, width, generator=draw), rest]] for _ in range(2))
        noise = torch.randn(1, *shape, generator=draw)
        top = float(model.get_model_object("model_sampling").sigma_max)
        sigmas = torch.tensor([top, 0.7 * top, 0.4 * top, 0.2 * top, 0.0])
        guiders, failed, taken = contenders(model, own, positive, negative, nag), {}, {}
        for round_ in range(rounds + 1):
            for contender, guider in guiders.items():
                if contender in failed or contender in without:
                    continue
                since = time.process_time()
                try:
                    with torch.inference_mode():
                        guider.sample(
                            noise, torch.zeros_like(noise), comfy.samplers.sampler_object("euler"), sigmas,
                            disable_pbar=True, seed=0,
                        )  # fmt: skip
                except Exception as error:  # a peer that this ComfyUI broke
                    failed[contender] = f"{type(error).__name__}: {error}"[:120]
                    continue
                if round_:  # the first warms up
                    taken.setdefault(contender, []).append(time.process_time() - since)
        if "plain" in failed:
            raise SystemExit(f"{name}: {failed['plain']}")
        row = {"model": name, "seconds": statistics.median(taken["plain"])}
        row |= {each: 100 * (ratio(found, taken["plain"]) - 1) for each, found in taken.items() if each != "plain"}
        row |= {f"{peer} / nag": ratio(taken[peer], taken["nag"]) for peer in PEERS if peer in taken}
        yield row | failed


def ratio(times: list[float], others: list[float]) -> float:
    return statistics.median(one / other for one, other in zip(times, others, strict=True))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--time", action="store_true", help="times of small models, in place of products")
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--families", nargs="*", default=[], help="of the times: some alone, as SDXL FLUX")
    parser.add_argument("--without", nargs="*", default=[], help="of the times: contenders that are left out, as cfg")
    parser.add_argument("--nag", type=Path, help="a checkout of ComfyUI-NAG")
    parser.add_argument("--json", action="store_true")
    options = parser.parse_args()
    if reason := why_absent():
        raise SystemExit(f"negative_attention.py: {reason}")
    with tempfile.TemporaryDirectory() as base:
        open_comfyui(Path(base), "cpu", "--use-pytorch-cross-attention")
        load_package()
        rows = (
            times(opened(options.nag), options.rounds, options.families, options.without)
            if options.time
            else products()
        )
        found = [print_row(row, options.json) for row in rows]
    if options.json:
        print(json.dumps(found))


def print_row(row: dict, quiet: bool) -> dict:
    if not quiet:
        words = (f"{key} {value:.3f}" if isinstance(value, float) else f"{key} {value}" for key, value in row.items())
        print(", ".join(words), flush=True)
    return row


NAG_FAMILIES = {
    "flux.model": "NAGFluxSwitch", "chroma.model": "NAGChromaSwitch", "sd.openaimodel": "NAGUNetModelSwitch",
    "sd3.mmdit": "NAGOpenAISignatureMMDITWrapperSwitch", "wan.model": "NAGWanModelSwitch",
    "hunyuan_video.model": "NAGHunyuanVideoSwitch", "hidream.model": "NAGHiDreamImageTransformer2DModelSwitch",
}  # fmt: skip


def opened(path: Path | None) -> Any:
    """ComfyUI-NAG's samplers, as ComfyUI imports a pack, but for families that this ComfyUI has broken."""
    if path is None:
        return None
    package = ModuleType("comfyui_nag")
    package.__path__ = [str(path)]
    sys.modules["comfyui_nag"] = package
    for name, switch in NAG_FAMILIES.items():
        try:
            importlib.import_module(f"comfyui_nag.{name}")
        except Exception as error:
            print(f"ComfyUI-NAG without {name}: {type(error).__name__}: {error}", file=sys.stderr)
            left_out = ModuleType(f"comfyui_nag.{name}")
            setattr(left_out, switch, None)
            sys.modules[f"comfyui_nag.{name}"] = left_out
    return importlib.import_module("comfyui_nag.samplers")


if __name__ == "__main__":
    main()
