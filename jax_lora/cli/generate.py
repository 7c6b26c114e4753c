"""Complete prompts with an adapter, or with the base model alone."""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from jax_lora.cli.adapters import checkpoint_of, merged
from jax_lora.cli.base_model import BUNDLED, BaseModel, load_base_of_run
from jax_lora.cli.options import at_least_one
from jax_lora.data.tokenizer import Tokenizer
from jax_lora.errors import ConfigError, DataError, format_error
from jax_lora.finetune.generation import Generator
from jax_lora.finetune.memory import peak_memory
from jax_lora.finetune.prediction import complete
from jax_lora.finetune.tasks import CAUSAL, NO_LIMIT, SEQ2SEQ, longest_input
from jax_lora.report.printable import printable

HELP = "complete prompts"
MOST_ROWS = 8  # prompts that are answered together


def add_options(parser: argparse.ArgumentParser) -> None:
    """Add the verb's options."""
    add = parser.add_argument
    add("model_folder", metavar="MODEL", nargs="?", help="Hugging Face folder [the run's]")
    add("--model", metavar="PATH", help="same as MODEL")
    asked = parser.add_mutually_exclusive_group(required=True)
    text = r"a prompt; \n is a newline, - reads standard input; repeatable"
    asked.add_argument("--prompt", action="append", metavar="TEXT", help=text)
    text = r"file with one prompt per line; \n is a newline"
    asked.add_argument("--prompts", metavar="FILE", help=text)
    add("--adapter-path", metavar="DIR", help="run folder or checkpoint [base model only]")
    add(
        "--max-tokens",
        type=at_least_one,
        default=256,
        metavar="N",
        help="completion tokens [256]",
    )
    add("--chat", action="store_true", help="format prompts with the chat template")
    add("--system", metavar="TEXT", help="system message, with --chat")
    add_sampling_options(parser)


def add_sampling_options(parser: argparse.ArgumentParser) -> None:
    """Add the options that say how tokens are chosen, and where answers end."""
    add = parser.add_argument
    text = "0 is greedy decoding [0; 1 with --top-k or --top-p]"
    add("--temperature", "--temp", type=float, metavar="X", help=text)
    text = "sample from the N most probable tokens; 0: from all [0]"
    add("--top-k", type=int, default=0, metavar="N", help=text)
    text = "sample from the most probable tokens up to this probability [1]"
    add("--top-p", type=float, default=1.0, metavar="P", help=text)
    add("--seed", type=int, default=0, metavar="N", help="random seed of sampling [0]")
    text = r"stop before this text; \n is a newline; repeatable"
    add("--stop", action="append", default=[], metavar="TEXT", help=text)
    add("--stop-at-newline", action="store_true", help=r"same as --stop '\n'")


def run(options: argparse.Namespace) -> int:
    """Print the answers, and return the exit code."""
    prompts = _prompts(options)
    checkpoint, settings = None, {}
    if options.adapter_path is not None:
        checkpoint, settings = checkpoint_of(options.adapter_path)
    name = options.model_folder or options.model or settings.get("model", BUNDLED)
    base = load_base_of_run(name, settings, "generate", [CAUSAL, SEQ2SEQ])
    variables = base.variables if checkpoint is None else merged(base, checkpoint)
    began = time.perf_counter()
    if base.task == SEQ2SEQ:
        answers, asked = _completed(base, variables, prompts, options)
    else:
        answers, asked = _generated(base, variables, prompts, options)
    seconds = time.perf_counter() - began
    for prompt, answer in zip(prompts, answers, strict=True):
        if len(prompts) > 1:
            print(f"==> {printable(prompt)}")
        print(printable(answer))
    tokens = sum(len(_ids(base.tokenizer, answer)) for answer in answers)
    print(f"[{asked} + {tokens} tokens, {seconds:.1f} s with compiling, {peak_memory():.2f} GB]")
    return 0


def _generated(
    base: BaseModel, variables: Any, prompts: Sequence[str], options: argparse.Namespace
) -> tuple[list[str], int]:
    """Continue prompts with a decoder; also return the number of their tokens."""
    generator = Generator(
        base.model,
        variables,
        base.tokenizer,
        max_tokens=options.max_tokens,
        rows=min(len(prompts), MOST_ROWS),
        **sampling(options),
    )
    ids = [_encode(base.tokenizer, prompt, options) for prompt in prompts]
    return generator.answer(ids), sum(map(len, ids))


def _completed(
    base: BaseModel, variables: Any, prompts: Sequence[str], options: argparse.Namespace
) -> tuple[list[str], int]:
    """Complete prompts with an encoder-decoder; also return the number of their tokens."""
    if options.temperature or options.chat or options.stop or options.stop_at_newline:
        raise ConfigError(
            format_error(
                "--temperature, --chat, --stop",
                got=f"one of them for a {type(base.model).__name__}",
                expected="none: its completions are greedy and end at the end token",
                fix="Leave the option out.",
            )
        )
    most = longest_input(base.model)
    ids = [base.tokenizer.encode(prompt, max_length=most).ids for prompt in prompts]
    rows = min(len(prompts), MOST_ROWS)
    tokens = options.max_tokens
    answers = complete(base.model, variables, base.tokenizer, ids, max_tokens=tokens, rows=rows)
    return answers, sum(map(len, ids))


def _ids(tokenizer: Any, text: str) -> Sequence[int]:
    if isinstance(tokenizer, Tokenizer):
        return tokenizer.encode(text)
    return tokenizer.encode(text, max_length=NO_LIMIT).ids.tolist()


def sampling(options: argparse.Namespace) -> dict[str, Any]:
    """Read the options of `add_sampling_options`, for a `Generator`."""
    return {
        "stop": _stops(options),
        "temperature": _temperature(options),
        "top_k": options.top_k or None,
        "top_p": options.top_p,
        "seed": options.seed,
    }


def _encode(tokenizer: Tokenizer, prompt: str, options: argparse.Namespace) -> list[int]:
    if options.system is not None and not options.chat:
        raise ConfigError(
            format_error(
                "--system",
                got="no --chat",
                expected="--chat, which writes prompts as turns of a conversation",
                fix="Add --chat, or write it all into the prompt.",
            )
        )
    if not options.chat:
        return tokenizer.encode(prompt)
    turns = [{"role": "user", "content": prompt}]
    if options.system is not None:
        turns.insert(0, {"role": "system", "content": options.system})
    return tokenizer.encode(tokenizer.render(turns, answer_next=True))


def _prompts(options: argparse.Namespace) -> list[str]:
    if options.prompts is None:
        return [sys.stdin.read() if text == "-" else _unescaped(text) for text in options.prompt]
    try:
        lines = Path(options.prompts).read_text(encoding="utf-8").splitlines()
    except (OSError, ValueError) as error:
        raise _bad_file(options.prompts, str(error)) from error
    prompts = [_unescaped(line) for line in lines if line.strip()]
    if not prompts:
        raise _bad_file(options.prompts, "no prompt: the file is empty")
    return prompts


def _bad_file(path: str, got: str) -> DataError:
    fix = "Check the path, or give the prompts with --prompt."
    where = f"--prompts {path}"
    return DataError(
        format_error(where, got=got, expected="a text file, a prompt on each line", fix=fix)
    )


def _unescaped(text: str) -> str:
    # A shell leaves \n as two characters, and nobody types a real new line into a command.
    return text.replace("\\n", "\n")


def _stops(options: argparse.Namespace) -> tuple[str, ...]:
    stops = [_unescaped(text) for text in options.stop]
    return (*stops, "\n") if options.stop_at_newline else tuple(stops)


def _temperature(options: argparse.Namespace) -> float:
    """Who cuts the choice down wants a choice."""
    if options.temperature is not None:
        return options.temperature
    return 1.0 if options.top_k or options.top_p != 1 else 0.0
