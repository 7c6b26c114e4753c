"""Whether `lora_apply` and `find_kernels` say the same of a program: two readings of one table.

python -m tests.properties.agreement --programs 5000 --seed 0
"""

from __future__ import annotations

import argparse
import collections
import dataclasses
import sys
from typing import Any

import tests.conftest  # isort: skip  # noqa: F401 - strict promotion and the CPU, as in every test
import jax

import jax_lora as jl
from jax_lora.transform.apply import with_settings
from jax_lora.transform.sites import Settings
from jax_lora.transform.strategies import FORMS, MATERIALIZED
from tests.properties.programs import PRECISIONS, Program
from tests.properties.steps import draw_program


@dataclasses.dataclass(frozen=True)
class Readings:
    """What the two interpretations say of the kernels of one program.

    Args:
      carried: Kernels that `lora_apply` carries to a use with their factors.
      used: Kernels that `lora_apply` uses in any way.
      found: Kernels that `find_kernels` reports.
      skipped: Kernels that it names as out of reach, with the reason.
    """

    carried: frozenset[str]
    used: frozenset[str]
    found: frozenset[str]
    skipped: dict[str, str]

    @property
    def disagreement(self) -> str | None:
        """Say where they disagree, or return None."""
        if missing := self.carried - self.found:
            return f"carried by lora_apply, not found: {sorted(missing)}; {self.skipped}"
        if missing := self.used - self.found - {*self.skipped}:
            return f"used, neither found nor skipped: {sorted(missing)}"
        return None


def readings(program: Program) -> Readings:
    """Trace a program in both ways; nothing is computed."""
    program = dataclasses.replace(program, outer="plain")
    with jax.enable_x64(True):
        if program.found:
            program = program.with_axes_found()
        tree, adapter, inputs = program.arrays()
        settings = Settings("allow", program.form)
        with_lora = with_settings(program.function(), settings)

        def run(tree: Any, adapter: Any, inputs: Any) -> Any:
            return with_lora(jl.combine(tree, adapter), *inputs.values())

        jax.eval_shape(run, tree, adapter, inputs)
        shaped = jax.ShapeDtypeStruct
        high = PRECISIONS[program.precision]["high"]
        data = [shaped(shape, high) for shape in program.inputs.values()]
        kernels = jl.find_kernels(program.function(), tree, *data)
    sites = settings.sites
    return Readings(
        carried=frozenset(site.path for site in sites if site.form != MATERIALIZED),
        used=frozenset(site.path for site in sites),
        found=frozenset(kernels),
        skipped=kernels.skipped,
    )


def main() -> None:
    """Compare the readings of many programs, and print the ones that differ."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--programs", type=int, default=5000)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--start", type=int, default=0)
    options = parser.parse_args()
    counts: collections.Counter[str] = collections.Counter()
    for number in range(options.start, options.start + options.programs):
        program = draw_program(options.seed, number, FORMS)
        try:
            both = readings(program)
        except NotImplementedError:  # JAX itself refuses the program
            counts["refused by JAX itself"] += 1
            continue
        counts["programs"] += 1
        counts["kernels used"] += len(both.used)
        counts["kernels carried"] += len(both.carried)
        counts["kernels found"] += len(both.found)
        counts["kernels skipped, with the reason"] += len(both.skipped)
        counts["programs that disagree"] += both.disagreement is not None
        if both.disagreement is not None:
            print(f"program {number}: {both.disagreement}\n{program.source()}", flush=True)
        if number % 50 == 49:
            jax.clear_caches()
    for name, count in counts.items():
        print(f"{count:9,}  {name}")
    sys.exit(counts["programs that disagree"] > 0)


if __name__ == "__main__":
    main()
