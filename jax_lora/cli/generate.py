"""Complete prompts with an adapter, or with the base model."""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from jax_lora.cli.adapters import load_for_inference
from jax_lora.cli.base_model import BaseModel
from jax_lora.cli.names import add_name
from jax_lora.cli.options import ADAPTER_HELP, add_model_option, add_template_options, at_least_one
from jax_lora.cli.parser import Parser
from jax_lora.data.tokenizer import Tokenizer
from jax_lora.errors import ConfigError, DataError
from jax_lora.finetune.generation import Generator
from jax_lora.finetune.memory import peak_memory
from jax_lora.finetune.prediction import complete
from jax_lora.finetune.tasks import CAUSAL, NO_LIMIT, SEQ2SEQ, longest_input
from jax_lora.printable import PROSE, printable

HELP = "complete prompts"
EXAMPLE = """\
jax-lora generate --prompt "def add(a, b):"
jax-lora generate --adapter-path adapters --prompts lines.txt --top-p 0.9
jax-lora generate model --prompt "2 + 3?" --prompt-template "Q: {prompt} A:"
"""
MAX_BATCH_SIZE = 8


def add_options(parser: Parser) -> None:
    """Add the options of the subcommand."""
    add_inference_options(parser)
    section = parser.section("prompts and completions")
    add = section.add_argument
    source = section.add_mutually_exclusive_group(required=True)
    text = r"a prompt; \n is a newline, - reads standard input; repeatable (or --prompts)"
    source.add_argument("--prompt", action="append", metavar="TEXT", help=text)
    text = r"file with one prompt per line; \n is a newline (or --prompt)"
    source.add_argument("--prompts", metavar="FILE", help=text)
    text = "maximum number of completion tokens [256]"
    add("--max-tokens", type=at_least_one, default=256, metavar="N", help=text)
    add("--chat", action="store_true", help="format prompts with the chat template")
    text = "system message, with --chat or a prompt template [none]"
    add("--system", metavar="TEXT", help=text)
    add_template_options(section)
    add_sampling_options(parser)


def add_inference_options(
    parser: Parser, default: str = "from the run, or the bundled model"
) -> None:
    """Add the options that `load_for_inference` reads; `default` is for the help of `--model`."""
    add_model_option(parser, default)
    text = f"{ADAPTER_HELP} [none: the base model]"
    add_name(parser, "--adapter-path", text, metavar="DIR")


def add_sampling_options(parser: Parser) -> None:
    """Add the options for sampling and for the end of completions."""
    add = parser.section("sampling").add_argument
    text = "0 selects greedy decoding [0; 1 with --top-k or --top-p]"
    add("--temperature", "--temp", type=float, metavar="X", help=text)
    text = "sample from the N most probable tokens; 0: from all [0]"
    add("--top-k", type=int, default=0, metavar="N", help=text)
    text = "sample from the most probable tokens up to this probability [1]"
    add("--top-p", type=float, default=1.0, metavar="P", help=text)
    add("--seed", type=int, default=0, metavar="N", help="random seed of sampling [0]")
    text = r"stop before this text; \n is a newline; repeatable [none]"
    add("--stop", action="append", default=[], metavar="TEXT", help=text)
    add("--stop-at-newline", action="store_true", help=r"same as --stop '\n'")


def run(options: argparse.Namespace) -> int:
    """Print the completions, and return the exit code."""
    prompts = _prompts(options)
    base, variables, _ = load_for_inference(options, "generate", [CAUSAL, SEQ2SEQ])
    began = time.perf_counter()
    if base.task == SEQ2SEQ:
        completions, prompt_tokens = _completed(base, variables, prompts, options)
    else:
        completions, prompt_tokens = _generated(base, variables, prompts, options)
    seconds = time.perf_counter() - began
    for prompt, completion in zip(prompts, completions, strict=True):
        if len(prompts) > 1:
            print(f"==> {printable(prompt, keep=PROSE)}")
        print(printable(completion, keep=PROSE))
    tokens = sum(len(_ids(base.tokenizer, completion)) for completion in completions)
    print(
        f"[{prompt_tokens} + {tokens} tokens, {seconds:.1f} s with compilation, "
        f"{peak_memory():.2f} GB]"
    )
    return 0


def _generated(
    base: BaseModel, variables: Any, prompts: Sequence[str], options: argparse.Namespace
) -> tuple[list[str], int]:
    """Complete prompts with a decoder; also return the number of prompt tokens."""
    generator = Generator(
        base.model,
        variables,
        base.tokenizer,
        max_tokens=options.max_tokens,
        rows=min(len(prompts), MAX_BATCH_SIZE),
        **sampling(options),
    )
    ids = [_encode(base.tokenizer, prompt, options) for prompt in prompts]
    return generator.answer(ids), sum(map(len, ids))


def _completed(
    base: BaseModel, variables: Any, prompts: Sequence[str], options: argparse.Namespace
) -> tuple[list[str], int]:
    """Complete prompts with an encoder-decoder; also return the number of prompt tokens."""
    if options.temperature or options.chat or options.stop or options.stop_at_newline:
        raise ConfigError(
            "--temperature, --chat, --stop",
            got=f"one of them for a {type(base.model).__name__}",
            expected="none of them: decoding is greedy and ends at the end token",
            fix="Remove the option.",
        )
    most = longest_input(base.model)
    ids = [base.tokenizer.encode(prompt, max_length=most).ids for prompt in prompts]
    sizes = {"max_tokens": options.max_tokens, "rows": min(len(prompts), MAX_BATCH_SIZE)}
    completions = complete(base.model, variables, base.tokenizer, ids, **sizes)
    return completions, sum(map(len, ids))


def _ids(tokenizer: Any, text: str) -> Sequence[int]:
    if isinstance(tokenizer, Tokenizer):
        return tokenizer.encode(text)
    return tokenizer.encode(text, max_length=NO_LIMIT).ids.tolist()


def sampling(options: argparse.Namespace) -> dict[str, Any]:
    """Return the options of `add_sampling_options` as arguments of a `Generator`."""
    stops = [_unescaped(text) for text in options.stop]
    temperature = options.temperature
    if temperature is None:
        temperature = 1.0 if options.top_k or options.top_p != 1 else 0.0
    return {
        "stop": (*stops, "\n") if options.stop_at_newline else tuple(stops),
        "temperature": temperature,
        "top_k": options.top_k or None,
        "top_p": options.top_p,
        "seed": options.seed,
    }


def _encode(tokenizer: Tokenizer, prompt: str, options: argparse.Namespace) -> list[int]:
    if options.chat:
        turns = [{"role": "user", "content": prompt}]
        if options.system is not None:
            turns.insert(0, {"role": "system", "content": options.system})
        return tokenizer.encode(tokenizer.render(turns, answer_next=True))
    if tokenizer.formats_prompts:
        return tokenizer.encode(tokenizer.format_prompt(prompt, options.system or ""))
    if options.system is not None:
        raise ConfigError(
            "--system",
            got="no --chat",
            expected="--chat, which formats prompts with the chat template",
            fix="Add --chat, or put the system message into the prompt.",
        )
    return tokenizer.encode(prompt)


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
    fix = "Check the path, or use --prompt."
    where = f"--prompts {path}"
    return DataError(where, got=got, expected="a text file with one prompt per line", fix=fix)


def _unescaped(text: str) -> str:
    # A shell passes \n as two characters.
    return text.replace("\\n", "\n")
