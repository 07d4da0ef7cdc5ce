"""What an adapter's file is, in a few lines for people: ours, and those of kohya's tools, diffusers and LyCORIS."""

import json
from collections import Counter
from collections.abc import Iterator, Mapping
from typing import Any

from ..adapters.text_tokens import CLIP_FAMILIES
from ..density_presets import preset_name
from ..density_words import in_words
from .adapters import AdapterReport, report_of
from .contents import AdapterFile
from .metadata import NEEDS_OUR_LOADER, AdapterMetadata
from .routing import routing_in_words

TAGS = 5  # of the words that a file of kohya's tools was trained on, the most frequent are shown


def describe(file: AdapterFile) -> str:
    """Method, size, family, style phrase, and how it was trained, as far as the file says."""
    report = report_of(file)
    lines = [
        _what(report),
        *_options(file),
        _for(report),
        *_words(report),
        *(_ours(file.about) if file.about else _theirs(file.header)),
    ]
    if report.unknown:
        lines.append(f"{len(report.unknown)} tensors of kinds that we do not know, for example {report.unknown[0]}")
    return "\n".join(line for line in lines if line)


def _what(report: AdapterReport) -> str:
    size = "" if not report.ranks else f", {'blocks of' if report.method == 'oft' else 'rank'} {span(report.ranks)}"
    alpha = f", alpha {span(report.alphas)}" if report.alphas else ""
    where = f" ({report.text_encoder_modules} in text encoders)" if report.text_encoder_modules else ""
    return (
        f"{report.method}{size}{alpha}: {report.modules} layers{where}, {report.tensors} tensors, "
        f"{report.parameters / 1e6:.3g} M parameters in {', '.join(report.dtypes)}"
    )


def _options(file: AdapterFile) -> Iterator[str]:
    if file.about and file.about.options:
        yield ", ".join(f"{name} {value}" for name, value in file.about.options.items())
    if file.unmergeable:
        yield NEEDS_OUR_LOADER
        yield told_of_prompts(file.family or "")
    if file.about and file.about.routing:
        yield routing_in_words(file.about.routing)


def told_of_prompts(family: str) -> str:
    """Which tokens of a prompt count in the means that a StyleInject adapter takes over them."""
    if family in CLIP_FAMILIES:
        return "of prompts all tokens count but the first of every 77: filling is not told from words"
    return "of prompts all tokens count that the model is not told to leave out: mostly their filling, too"


def _for(report: AdapterReport) -> str:
    family = report.family or "a family that its names do not tell"
    return f"for {family}" + (f", names in the style of {report.style}" if report.style else "")


def _words(report: AdapterReport) -> Iterator[str]:
    if report.style_phrase:
        yield f"style phrase: {report.style_phrase}"
    if report.trigger and report.trigger != report.style_phrase:
        yield f"trigger: {report.trigger}"


def _ours(about: AdapterMetadata) -> Iterator[str]:
    if "law" in about.density:
        yield f"noise levels: {in_words(about.density, preset_name(about.training.get('density', {})))}"
    facts = {
        "{} steps": about.steps,
        "on {} pictures": about.images,
        "at {} pixels": about.resolution,
        "learning rate {:g}": about.learning_rate,
        "{}": about.optimizer or None,
        "seed {}": about.seed,
        "base model {}": about.base_model or None,
    }
    yield _sentence(facts)


def _theirs(header: Mapping[str, str]) -> Iterator[str]:
    facts = {
        "{} steps": header.get("ss_steps") or header.get("ss_max_train_steps"),
        "on {} pictures": header.get("ss_num_train_images"),
        "learning rate {}": header.get("ss_learning_rate") or header.get("ss_unet_lr"),
        "base model {}": header.get("ss_sd_model_name") or header.get("modelspec.title"),
        "made with {}": header.get("ss_network_module") or header.get("modelspec.implementation"),
    }
    yield _sentence({text: value for text, value in facts.items() if value not in (None, "", "None")})
    if tags := _frequent_tags(header.get("ss_tag_frequency", "")):
        yield f"most frequent in its captions: {', '.join(tags)}"


def _sentence(facts: Mapping[str, Any]) -> str:
    return ", ".join(text.format(value) for text, value in facts.items() if value is not None)


def _frequent_tags(text: str) -> list[str]:
    """The words of captions by how often they came, from kohya's table of folders; none where it cannot be read."""
    try:
        folders = json.loads(text or "{}")
        counts = Counter[str]()
        for tags in folders.values():
            counts.update({str(tag).strip(): int(number) for tag, number in tags.items()})
    except (ValueError, TypeError, AttributeError):  # another tool's, of any form
        return []
    return [tag for tag, _ in counts.most_common(TAGS)]


def span(values: tuple[float, ...]) -> str:
    """ "8", or "4 to 32" where there are several."""
    return f"{values[0]:g}" if len(values) == 1 else f"{values[0]:g} to {values[-1]:g}"
