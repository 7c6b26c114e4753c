"""Answer a prompt, with an adapter or, without --adapter-path, with the base model."""

from __future__ import annotations

import argparse
import time

from jax_lora.cli.adapters import checkpoint_of, merged
from jax_lora.cli.base_model import BUNDLED, load_base
from jax_lora.cli.options import at_least_one
from jax_lora.finetune.generation import Generator

HELP = "answer a prompt"


def add_options(parser: argparse.ArgumentParser) -> None:
    """Add the verb's options."""
    add = parser.add_argument
    add("model_folder", metavar="MODEL", nargs="?", help="Hugging Face folder (the run's own)")
    add("--model", metavar="PATH", help="the same as MODEL")
    add("--prompt", required=True, metavar="TEXT", help=r"the prompt; \n is a new line")
    add("--adapter-path", metavar="DIR", help="run or checkpoint (none: the base model)")
    add("--max-tokens", type=at_least_one, default=256, metavar="N", help="of the answer (256)")
    add("--stop-at-newline", action="store_true", help="end with the answer's first line")


def run(options: argparse.Namespace) -> int:
    """Print the prompt's answer, and return the exit code."""
    checkpoint, settings = None, {}
    if options.adapter_path is not None:
        checkpoint, settings = checkpoint_of(options.adapter_path)
    name = options.model_folder or options.model or settings.get("model", BUNDLED)
    base = load_base(name, settings.get("dtype", "auto"))
    generator = Generator(
        base.model,
        base.variables if checkpoint is None else merged(base, checkpoint),
        base.tokenizer,
        max_tokens=options.max_tokens,
        stop_at_newline=options.stop_at_newline,
    )
    # A shell leaves \n as two characters, and nobody types a real new line into a command.
    prompt = base.tokenizer.encode(options.prompt.replace("\\n", "\n"))
    began = time.perf_counter()
    (answer,) = generator.answer([prompt])
    tokens = len(base.tokenizer.encode(answer))
    print(answer)
    print(f"[{len(prompt)} + {tokens} tokens, {time.perf_counter() - began:.1f} s with compiling]")
    return 0
