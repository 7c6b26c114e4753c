"""Other people's models are run as they are, also where they mix types or ranks."""

import jax
import pytest


@pytest.fixture
def usual_promotion():
    with jax.numpy_dtype_promotion("standard"), jax.numpy_rank_promotion("allow"):
        yield
