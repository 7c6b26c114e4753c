import pytest

from jax_lora.errors import ConfigError
from jax_lora.finetune.samples import Sampler


def test_every_prompt_is_returned_with_its_completion(tiny, tokenizer):
    model, variables = tiny
    answers = Sampler(model, tokenizer, ("count", "how many")).answers(variables)
    assert [prompt for prompt, _ in answers] == ["count", "how many"]
    assert all(isinstance(answer, str) for _, answer in answers)
    assert Sampler(model, tokenizer, ()).answers(variables) == ()


@pytest.mark.parametrize("prompt", ["x" * 70, ""])
def test_a_prompt_that_is_too_long_is_refused_before_training(tiny, tokenizer, prompt):
    model, _ = tiny
    with pytest.raises(ConfigError, match=r"(?s)sample prompt.*expected: from 1 to 64"):
        Sampler(model, tokenizer, (prompt,))
