"""All steps, registered by being imported, and the one function that draws with them."""

from tests.properties import block_steps, data_steps, meeting_steps, weight_steps  # noqa: F401
from tests.properties.drawing import draw_program

__all__ = ["draw_program"]
