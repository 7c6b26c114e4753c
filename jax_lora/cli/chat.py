"""Chat with a model in the terminal; /help lists the commands of a chat."""

from __future__ import annotations

import argparse
import re
import shutil
import signal
import sys
import time

from jax_lora.cli.adapters import load_for_inference
from jax_lora.cli.generate import add_inference_options, add_sampling_options, sampling
from jax_lora.cli.options import add_template_options, at_least_one
from jax_lora.cli.parser import Parser
from jax_lora.errors import ConfigError, DataError
from jax_lora.finetune.conversation import Conversation
from jax_lora.finetune.generation import Generator
from jax_lora.finetune.interrupts import Interrupts
from jax_lora.finetune.memory import peak_memory
from jax_lora.finetune.streaming import stream
from jax_lora.finetune.tasks import CAUSAL
from jax_lora.printable import PROSE, printable
from jax_lora.report.word_wrap import WordWrap

HELP = "chat with a model in the terminal"
EXAMPLE = """\
jax-lora chat path/to/model
jax-lora chat --adapter-path adapters --system "Answer in one sentence."
jax-lora chat path/to/model --chat-template my_template.jinja
"""
HEADER = "/help lists the commands, /reset starts a new conversation, /exit quits."
COMMANDS = """\
/help, h    show this list
/reset, r   start a new conversation
/exit, q    quit; Ctrl-D does the same
Ctrl-C      stop a response"""


def add_options(parser: Parser) -> None:
    """Add the options of the subcommand."""
    add_inference_options(parser)
    section = parser.section("conversation")
    add = section.add_argument
    add("--system", metavar="TEXT", help="system message [none]")
    add(
        "--max-tokens",
        type=at_least_one,
        default=256,
        metavar="N",
        help="maximum number of response tokens [256]",
    )
    add_template_options(section)
    add_sampling_options(parser)


def run(options: argparse.Namespace) -> int:
    """Chat until the user quits, and return the exit code."""
    base, variables, checkpoint = load_for_inference(options, "chat", [CAUSAL])
    context_length = base.model.config.max_position_embeddings
    # A response has at most half of the context, so that the other half is left for the prompt.
    max_tokens = min(options.max_tokens, context_length // 2)
    if max_tokens < options.max_tokens:
        _say(f"Responses have at most {max_tokens} tokens, half of the context length.")
    generator = Generator(
        base.model,
        variables,
        base.tokenizer,
        max_tokens=max_tokens,
        pad_to_powers_of_two=True,
        **sampling(options),
    )
    conversation = Conversation(base.tokenizer, options.system)
    if options.system is not None and not conversation.has_template:
        raise _no_template(base.name)
    print(f"{base.name}{'' if checkpoint is None else f' with {checkpoint}'}")
    _say(HEADER)
    if not conversation.has_template:
        _say("This model has no chat template: it continues the text that you type.")
    return _chat(generator, conversation, context_length - max_tokens)


def _no_template(name: str) -> ConfigError:
    return ConfigError(
        "--system",
        got=f"{name}, which has no chat template",
        expected="a model whose chat template supports system messages",
        fix="Remove --system, or use an instruction-tuned model.",
    )


def _chat(generator: Generator, conversation: Conversation, max_prompt_tokens: int) -> int:
    while True:
        try:
            text = input("> ")
        except (EOFError, KeyboardInterrupt):
            print()
            return 0
        match text.strip():
            case "":
                continue
            case "/exit" | "q":
                return 0
            case "/reset" | "r":
                conversation.reset()
                print("(new conversation)")
            case "/help" | "h":
                print(COMMANDS)
            case command if re.fullmatch("/[a-z]+", command):
                print(f"{command} is not a command.\n{COMMANDS}")
            case _:
                _answer_message(generator, conversation, text, max_prompt_tokens)


def _answer_message(
    generator: Generator, conversation: Conversation, text: str, max_prompt_tokens: int
) -> None:
    """Respond to one message, and add both to the conversation."""
    conversation.ask(text)
    try:
        prompt, removed = conversation.prompt(max_prompt_tokens)
    except DataError as error:  # the template rejects the conversation
        conversation.undo()
        print(f"error: {error}")
        return
    if len(prompt) > max_prompt_tokens:
        conversation.undo()
        _say(
            f"(The prompt has {len(prompt)} tokens; the maximum is {max_prompt_tokens}. "
            "Shorten the message, or enter /reset for a new conversation.)"
        )
        return
    if removed:
        _say(
            f"(The first {removed} turns were removed: the maximum is {max_prompt_tokens} tokens.)"
        )
    response, tokens, seconds = _respond(generator, prompt)
    conversation.respond(response)
    # The time to the first token includes the prompt and compilation.
    speed = f", {(tokens - 1) / seconds:.1f} tokens/s" if tokens > 1 and seconds > 0 else ""
    counts = f"prompt {len(prompt)} tokens, response {tokens} tokens"
    print()
    _say(f"[{counts}{speed}, peak memory {peak_memory():.2f} GB]")


def _say(text: str) -> None:
    """Print a line, wrapped between words on a terminal."""
    wrap = _wrap()
    print(text if wrap is None else wrap.feed(text) + wrap.flush())


def _wrap() -> WordWrap | None:
    """Return how to wrap on a terminal, which may have been resized; None for a file or a pipe."""
    return WordWrap(shutil.get_terminal_size().columns) if sys.stdout.isatty() else None


def _respond(generator: Generator, prompt: list[int]) -> tuple[str, int, float]:
    """Stream a response; return it, its number of tokens, and the seconds since the first token."""
    pieces: list[str] = []
    tokens, first_token_time = 0, 0.0
    wrap = _wrap()
    # Interrupts are checked between tokens: an exception during a compilation can crash XLA.
    with Interrupts() as interrupts:
        for piece, count in stream(generator, prompt):
            tokens, first_token_time = count, first_token_time or time.perf_counter()
            pieces.append(piece)
            shown = printable(piece, keep=PROSE)
            print(shown if wrap is None else wrap.feed(shown), end="", flush=True)
            if interrupts.requested:
                break
    print("" if wrap is None else wrap.flush(), end="")
    if interrupts.requested:
        print(" (stopped)", end="", flush=True)
    if interrupts.requested == "SIGTERM":
        signal.raise_signal(signal.SIGTERM)  # ends the process, not only the response
    return "".join(pieces), tokens, time.perf_counter() - first_token_time
