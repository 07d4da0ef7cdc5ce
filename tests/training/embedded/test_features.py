import pytest
import torch
from torch.nn.functional import cosine_similarity

from stylewright.training.embedded.features import features_of, text_features
from stylewright.training.embedded.renderer import SUBJECTS, Style, render, scene_of
from stylewright.training.embedded.vocabulary import named_styles
from stylewright.training.randomness import generator


def test_a_name_stands_for_its_words_and_what_means_nothing_for_nothing():
    style = named_styles()["jazz"]
    by_name, by_words, empty = text_features(["star in jazz style", f"star in {' '.join(style.words)} style", ""])
    assert torch.equal(by_name, by_words) and by_name.sum() == 5 and not empty.any()
    assert text_features(["a star in <v0> style"]).sum() == 1


def test_the_right_pictures_are_more_like_their_prompts_than_others(shipped_oracle):
    features = features_of(shipped_oracle)
    styles = [Style(0, 0, 0, 0), Style(3, 2, 1, 2), Style(7, 4, 2, 1)]
    scenes = [scene_of(torch.tensor([i]), style, generator(0, "scene", i)) for i, style in enumerate(styles)]
    pictures = torch.cat([render(scene) for scene in scenes]).requires_grad_()
    phrases = [" ".join(style.words) for style in styles]
    prompts = [f"{SUBJECTS[subject]} in {phrase} style" for subject, phrase in enumerate(phrases)]
    seen, told = features.pictures(pictures), features.texts(prompts)
    likeness = torch.stack([cosine_similarity(seen, row[None]) for row in told])
    assert likeness.diagonal().min() > 0.9
    assert (likeness - torch.diag(likeness.diagonal())).max() < 0.5
    likeness[0, 1].backward()
    assert pictures.grad[1].any() and not pictures.grad[0].any()
    assert seen.detach().square().sum(1).tolist() == pytest.approx([5.0] * 3, abs=1e-4)
