"""Chat with a model in the terminal: q quits, r starts a new conversation, h shows help."""

from __future__ import annotations

import argparse
import signal
import time

from jax_lora.cli.adapters import checkpoint_of, merged
from jax_lora.cli.base_model import BUNDLED, load_base_of_run
from jax_lora.cli.generate import add_sampling_options, sampling
from jax_lora.cli.options import at_least_one
from jax_lora.errors import ConfigError, DataError, format_error
from jax_lora.finetune.conversation import Conversation
from jax_lora.finetune.generation import Generator
from jax_lora.finetune.interrupts import Interrupts
from jax_lora.finetune.memory import peak_memory
from jax_lora.finetune.streaming import stream
from jax_lora.finetune.tasks import CAUSAL
from jax_lora.report.printable import printable

HELP = "chat with a model in the terminal"
COMMANDS = "q quits, r forgets what was said, h shows this; Ctrl-C ends an answer"


def add_options(parser: argparse.ArgumentParser) -> None:
    """Add the verb's options."""
    add = parser.add_argument
    add("model_folder", metavar="MODEL", nargs="?", help="Hugging Face folder [the run's]")
    add("--model", metavar="PATH", help="same as MODEL")
    add("--adapter-path", metavar="DIR", help="run folder or checkpoint [base model only]")
    add("--system", metavar="TEXT", help="system message")
    add(
        "--max-tokens",
        type=at_least_one,
        default=256,
        metavar="N",
        help="tokens of a reply [256]",
    )
    add_sampling_options(parser)


def run(options: argparse.Namespace) -> int:
    """Talk until there is no more to say, and return the exit code."""
    checkpoint, settings = None, {}
    if options.adapter_path is not None:
        checkpoint, settings = checkpoint_of(options.adapter_path)
    name = options.model_folder or options.model or settings.get("model", BUNDLED)
    base = load_base_of_run(name, settings, "chat", [CAUSAL])
    most = base.model.config.max_position_embeddings
    generator = Generator(
        base.model,
        base.variables if checkpoint is None else merged(base, checkpoint),
        base.tokenizer,
        max_tokens=min(options.max_tokens, most // 2),
        doubling=True,
        **sampling(options),
    )
    conversation = Conversation(base.tokenizer, options.system)
    if options.system is not None and not conversation.has_template:
        raise _no_template(name)
    print(f"{base.name}{'' if checkpoint is None else f' with {checkpoint}'}. {COMMANDS}.")
    if not conversation.has_template:
        print("This model has no chat template: it continues the text that you type.")
    return _talk(generator, conversation, most - generator.max_tokens)


def _no_template(name: str) -> ConfigError:
    return ConfigError(
        format_error(
            "--system",
            got=f"{name}, which has no chat template",
            expected="a model whose chat template has system messages",
            fix="Leave --system out, or take an instruction-tuned model.",
        )
    )


def _talk(generator: Generator, conversation: Conversation, room: int) -> int:
    while True:
        try:
            text = input("> ")
        except (EOFError, KeyboardInterrupt):
            print()
            return 0
        match text.strip():
            case "":
                continue
            case "q":
                return 0
            case "r":
                conversation.reset()
                print("(forgotten)")
            case "h":
                print(COMMANDS)
            case _:
                _turn(generator, conversation, text, room)


def _turn(generator: Generator, conversation: Conversation, text: str, room: int) -> None:
    """Answer one turn, and keep both in the conversation."""
    conversation.ask(text)
    try:
        prompt, forgotten = conversation.prompt(room)
    except DataError as error:  # the template refuses the order of the turns
        conversation.take_back()
        print(f"error: {error}")
        return
    if len(prompt) > room:
        conversation.take_back()
        print(f"(too long: {len(prompt)} tokens, and the model has room for {room})")
        return
    if forgotten:
        print(f"(the first {forgotten} turns are forgotten: the model sees {room} tokens)")
    answer, tokens, seconds = _answer(generator, prompt)
    conversation.answer(answer)
    # The first token waits for the prompt, and for the compiler; the others tell the speed.
    speed = f", {(tokens - 1) / seconds:.1f} tokens/s" if tokens > 1 and seconds > 0 else ""
    print(f"\n[{len(prompt)} + {tokens} tokens{speed}, {peak_memory():.2f} GB]")


def _answer(generator: Generator, prompt: list[int]) -> tuple[str, int, float]:
    """Print an answer as it comes; return it, its tokens, and the seconds after the first one."""
    pieces: list[str] = []
    tokens, first = 0, 0.0
    # Asked between tokens: an exception out of the midst of a compilation can take XLA down.
    with Interrupts() as interrupts:
        for piece, count in stream(generator, prompt):
            tokens, first = count, first or time.perf_counter()
            pieces.append(piece)
            print(printable(piece), end="", flush=True)
            if interrupts.requested:
                print(" (stopped)", end="", flush=True)
                break
    if interrupts.requested == "SIGTERM":
        signal.raise_signal(signal.SIGTERM)  # whoever sent it means the program
    return "".join(pieces), tokens, time.perf_counter() - first
