"""Parses the command line, runs a verb, and turns errors into one message and an exit code."""

from __future__ import annotations

import argparse
import sys
import traceback
from collections.abc import Sequence

from jax_lora.errors import LoraError, format_error

DONE, BAD_INPUT, OUT_OF_MEMORY, NON_FINITE, INTERRUPTED = 0, 2, 3, 4, 130

EXAMPLES = """\
examples:
  jax-lora train                                     the bundled model on the bundled task
  jax-lora eval --compare-base                       base and adapter side by side
  jax-lora generate --prompt "Once upon a time"
  jax-lora train path/to/model --data path/to/data   your own model and data
  jax-lora export --to peft served                   export a PEFT adapter for serving
  jax-lora fuse --save-path fused --check            merge the adapter into a Hugging Face folder
"""


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command.

    Args:
      arguments: The words after `jax-lora`; None takes them from the command line.

    Returns:
      The exit code: 0 done, 2 bad input or configuration, 3 out of memory, 4 non-finite loss,
      130 interrupted.
    """
    debug = False
    try:
        options = make_parser().parse_args(arguments)
        debug = options.debug
        return options.run(options)
    except KeyboardInterrupt:
        print("\ninterrupted", file=sys.stderr)
        return INTERRUPTED
    except ModuleNotFoundError as error:
        missing = LoraError(
            format_error(
                f"the package {error.name}",
                got="not installed",
                expected="the command's own packages beside the library",
                fix="pip install 'jax-lora[cli]'",
            )
        )
        return _explained(missing.with_traceback(error.__traceback__), debug)
    except (LoraError, OSError) as error:
        return _explained(error, debug)
    except (RuntimeError, MemoryError) as error:
        from jax_lora.cli.out_of_memory import is_out_of_memory, out_of_memory_message

        if not is_out_of_memory(error):
            raise
        print(f"error: {out_of_memory_message(error)}", file=sys.stderr)
        return OUT_OF_MEMORY


def _explained(error: Exception, debug: bool) -> int:
    if debug:
        traceback.print_exception(error)
    else:
        print(f"error: {error}", file=sys.stderr)
    return NON_FINITE if isinstance(error, FloatingPointError) else BAD_INPUT


def make_parser() -> argparse.ArgumentParser:
    """Build the command's parser: every verb and its flags."""
    from jax_lora.cli import (
        chat,
        doctor,
        export,
        fuse,
        generate,
        import_adapter,
        plan,
        plot,
        predict,
        rows,
        train,
        write_config,
    )
    from jax_lora.cli import eval as evaluate

    named = {
        "train": train,
        "generate": generate,
        "chat": chat,
        "eval": evaluate,
        "predict": predict,
        "fuse": fuse,
        "export": export,
        "import": import_adapter,
        "data": rows,
        "plan": plan,
        "init": write_config,
        "doctor": doctor,
        "plot": plot,
    }

    parser = argparse.ArgumentParser(
        prog="jax-lora",
        description="Fine-tune Hugging Face models with LoRA in JAX.",
        epilog=EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    verbs = parser.add_subparsers(title="verbs", metavar="VERB", required=True)
    for name, verb in named.items():
        of_verb = verbs.add_parser(name, help=verb.HELP, description=verb.__doc__)
        verb.add_options(of_verb)
        of_verb.add_argument("--debug", action="store_true", help="print the traceback of an error")
        of_verb.set_defaults(run=verb.run)
    return parser
