"""The shipped weights, for the tests that ask how good they are."""

import pytest

from stylewright.training.embedded.weights import Weights


@pytest.fixture(scope="session")
def shipped() -> Weights:
    """The shipped weights; skips where they have not been built."""
    weights = Weights()
    files = (weights.transformer, weights.text_encoder, weights.autoencoder, weights.oracle)
    if missing := [path.name for path in files if not path.is_file()]:
        pytest.skip(f"no {', '.join(missing)} in {weights.folder}: `stylewright embedded build` makes them")
    return weights


@pytest.fixture(scope="session")
def shipped_oracle(shipped):
    from stylewright.training.embedded.oracle import load_oracle

    return load_oracle(shipped.oracle)


@pytest.fixture(scope="session")
def shipped_host(shipped):
    from stylewright.training.hosts.embedded import load_embedded

    return load_embedded(shipped)
