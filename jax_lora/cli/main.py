"""Parse the command line, run a subcommand, and turn errors into a message and an exit code."""

from __future__ import annotations

import sys
import traceback
from collections.abc import Mapping, Sequence

import jax_lora
from jax_lora.cli.model_pin import pinned
from jax_lora.cli.parser import Parser, listed
from jax_lora.errors import LoraError, install_command
from jax_lora.report.screen import screened

DONE, BAD_INPUT, OUT_OF_MEMORY, NON_FINITE, INTERRUPTED = 0, 2, 3, 4, 130
# The subcommands that read a model.
PINNED = frozenset("train generate chat eval predict fuse export import push plan".split())

# The modules that the extra `cli` installs.
CLI_MODULES = frozenset("grain jinja2 matplotlib rich tensorboardX tokenizers yaml".split())

# The subcommands by purpose, in the order of the help.
GROUPS = {
    "fine-tune": ("train", "eval", "plot"),
    "use an adapter": ("generate", "chat", "predict"),
    "share an adapter": ("export", "import", "fuse", "push"),
    "prepare a run": ("data", "plan", "init", "doctor"),
}

EXAMPLES = """\
examples:
  jax-lora train                           the bundled model on the bundled task
  jax-lora eval --compare-base             base and adapter side by side
  jax-lora generate --prompt "Once upon a time"
  jax-lora train model --data data         your own model and data
  jax-lora export --save-path served       the adapter in PEFT's format
  jax-lora fuse --save-path fused --check  merge the adapter
"""


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command.

    Args:
      arguments: The arguments after `jax-lora`; None: those of the process.

    Returns:
      The exit code: 0 done, 2 bad input or configuration, 3 out of memory, 4 non-finite loss,
      130 interrupted. With `--distributed`, the process exits after an error, with 5 if another
      process has ended.
    """
    from jax_lora.cli.distributed import crash, end_process, shown_process

    with screened():
        try:
            return end_process(_run(arguments))
        except BaseException as error:
            if shown_process():
                crash(error)
            raise


def _run(arguments: Sequence[str] | None) -> int:
    from jax_lora.cli.names import parse
    from jax_lora.data.columns import renaming
    from jax_lora.models.ignored_fields import ignoring

    debug = False
    try:
        options = parse(make_parser(), arguments)
        debug = getattr(options, "debug", False)
        ignored = getattr(options, "ignore", None) or ()
        columns = getattr(options, "columns", None)
        with pinned(getattr(options, "pin", None)), ignoring(ignored), renaming(columns):
            return options.run(options)
    except KeyboardInterrupt:
        print(f"\n{_process()}interrupted", file=sys.stderr)
        return INTERRUPTED
    except ModuleNotFoundError as error:
        if (error.name or "").partition(".")[0] not in CLI_MODULES:
            raise
        missing = LoraError(
            f"the package {error.name}",
            got="not installed",
            expected="the packages that the command needs in addition to the library",
            fix=install_command("cli"),
        )
        return _report(missing.with_traceback(error.__traceback__), debug)
    except (LoraError, OSError) as error:
        return _report(error, debug)
    except (RuntimeError, MemoryError) as error:
        from jax_lora.cli.out_of_memory import out_of_memory_message
        from jax_lora.finetune.memory import is_out_of_memory

        if not is_out_of_memory(error):
            raise
        print(f"{_process()}error: {out_of_memory_message(error)}", file=sys.stderr)
        return OUT_OF_MEMORY


def _process() -> str:
    from jax_lora.cli.distributed import shown_process

    return shown_process()


def _report(error: Exception, debug: bool) -> int:
    """Print an error, and return its exit code."""
    if debug:
        traceback.print_exception(error)
    else:
        print(f"{_process()}error: {error}", file=sys.stderr)
    return NON_FINITE if isinstance(error, FloatingPointError) else BAD_INPUT


def make_parser() -> Parser:
    """Build the parser of the command with all subcommands and their options."""
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
        push,
        rows,
        train,
        write_config,
    )
    from jax_lora.cli import eval as evaluate
    from jax_lora.cli.options import add_general_options, add_subcommand

    modules = {
        "train": train,
        "eval": evaluate,
        "plot": plot,
        "generate": generate,
        "chat": chat,
        "predict": predict,
        "export": export,
        "import": import_adapter,
        "fuse": fuse,
        "push": push,
        "data": rows,
        "plan": plan,
        "init": write_config,
        "doctor": doctor,
    }
    parser = Parser(
        prog="jax-lora",
        usage="jax-lora SUBCOMMAND [options]",
        description=_described({name: module.HELP for name, module in modules.items()}),
        epilog=EXAMPLES,
        add_help=False,
    )
    general = parser.section("general")
    general.add_argument(
        "--version",
        action="version",
        version=f"jax-lora {jax_lora.__version__}",
        help="show the version and exit",
    )
    general.add_argument("-h", "--help", action="help", help="show this help and exit")
    parser.set_defaults(run=parser.show_help)
    subparsers = parser.add_subcommands()
    for name, module in modules.items():
        subparser = add_subcommand(subparsers, name, module)
        add_general_options(subparser, reads_model=name in PINNED)
        subparser.set_defaults(run=module.run)
    return parser


def _described(texts: Mapping[str, str]) -> str:
    """Describe the command: its subcommands in groups."""
    groups = (
        listed(title, {name: texts[name] for name in names}) for title, names in GROUPS.items()
    )
    return "\n\n".join(["Fine-tune Hugging Face models with LoRA in JAX.", *groups])
