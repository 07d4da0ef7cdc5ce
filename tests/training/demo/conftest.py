"""The demo on a model with random weights, drawing few subjects in few steps: all its parts, and no quality."""

import pytest
import torch
from safetensors.torch import save_file

from stylewright.training.demo import experiment, report
from stylewright.training.demo.experiment import DemoOptions, run_experiment
from stylewright.training.embedded.autoencoder import new_autoencoder, save_autoencoder
from stylewright.training.embedded.oracle import Oracle
from stylewright.training.embedded.text import TextEncoder
from stylewright.training.embedded.transformer import new_transformer, save_transformer
from stylewright.training.embedded.weights import Weights
from stylewright.training.hosts.embedded import load_embedded

SUBJECTS_SHOWN = [0, 7]  # of the nine that a demo draws


@pytest.fixture(scope="session")
def demo_weights(tmp_path_factory) -> Weights:
    weights = Weights(tmp_path_factory.mktemp("demo-weights"))
    with torch.random.fork_rng():
        torch.manual_seed(0)
        save_transformer(weights.transformer, new_transformer())
        save_autoencoder(weights.autoencoder, new_autoencoder(), torch.float32)
        for path, part in ((weights.text_encoder, TextEncoder()), (weights.oracle, Oracle())):
            save_file({key: value.clone() for key, value in part.state_dict().items()}, path)
    return weights


@pytest.fixture(scope="session")
def small_demo(demo_weights):
    """Runs the demo in three steps; returns the experiment and what it said of its progress."""

    def run(out, **options):
        told = []
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(experiment, "Weights", lambda: demo_weights)
            patch.setattr(experiment, "load_embedded", lambda: load_embedded(demo_weights))
            patch.setattr(experiment, "other_subjects", lambda shown: SUBJECTS_SHOWN)
            asked = DemoOptions(**{"steps": 3, "looks": 1, "sampling_steps": 1, **options})
            result = run_experiment(asked, out, lambda law, done, total: told.append((law, done, total)))
        return result, told

    return run


@pytest.fixture(scope="session")
def shipped() -> Weights:
    """The shipped weights; skips where they have not been built."""
    weights = Weights()
    if not (weights.transformer.is_file() and weights.oracle.is_file()):
        pytest.skip(f"no weights in {weights.folder}: `stylewright embedded build` makes them")
    return weights


@pytest.fixture(scope="session")
def finished(small_demo, tmp_path_factory):
    """A demo with three looks, its folder with the report, and what it told."""
    out = tmp_path_factory.mktemp("demo") / "out"
    result, told = small_demo(out, looks=3)
    experiment.write_results(result, out / "results.json")
    report.write_report(result, out)
    return result, out, told
