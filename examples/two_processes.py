"""Train one adapter in two processes with `jax.distributed`, on one machine or on several.

    python examples/two_processes.py
    python examples/two_processes.py --processes 1          # the same result from one process

The script starts its own workers, each with two CPU devices, and prints their output. On a cluster,
every host runs `work`, and `jax.distributed.initialize()` finds the other hosts.

The LoRA code is the same as for one process. Batches are sharded over the devices of all processes,
the base model and the adapter are replicated, and XLA sums the gradients. The example takes about
15 seconds on two CPU cores.
"""

import argparse
import contextlib
import os
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import IO

DEVICES = 4  # in all processes together
BATCH_SIZE, PASSAGE = 8, 16  # PASSAGE: tokens that are repeated


# --- a worker ------------------------------------------------------------------------------------


def work(steps: int, out: Path) -> list[float]:
    """Train as one of several processes, and return the losses."""
    import jax
    import jax.numpy as jnp
    import numpy as np
    import optax
    from jax.sharding import Mesh, NamedSharding, PartitionSpec

    import jax_lora as jl
    from jax_lora.bundled import model_path

    mesh = Mesh(np.array(jax.devices()), ("data",))  # the devices of all processes
    replicated, sharded = (NamedSharding(mesh, PartitionSpec(*axes)) for axes in ((), ("data",)))

    model, params = jl.models.load(model_path(), dtype="float32")
    variables = {"params": params}
    kernels = jl.find_kernels(model.apply, variables, jnp.zeros((1, 2 * PASSAGE), jnp.int32))
    # The same key gives the same adapter in every process.
    adapter = jl.lora_init(jax.random.key(0), variables, jl.LoraConfig(rank=8), kernels=kernels)
    variables, adapter = jax.device_put((variables, adapter), replicated)
    tx = optax.adam(3e-3)
    state = jax.device_put(tx.init(adapter), replicated)

    def batch(number: int) -> jax.Array:
        """Draw batch `number`, (BATCH_SIZE, tokens), and provide the part of this process."""
        passage = np.random.default_rng(number).integers(300, 4096, (BATCH_SIZE, PASSAGE), np.int32)
        rows = np.concatenate([passage, passage], axis=1)
        own = np.split(rows, jax.process_count())[jax.process_index()]
        return jax.make_array_from_process_local_data(sharded, own)

    def loss(adapter: jl.Adapter, variables: object, tokens: jax.Array) -> jax.Array:
        lora_variables = jl.combine(variables, adapter)
        logits = jl.lora_apply(model.apply)(lora_variables, tokens[:, :-1])[:, PASSAGE - 1 :]
        target = tokens[:, PASSAGE:]  # the repetition, (BATCH_SIZE, PASSAGE)
        return optax.softmax_cross_entropy_with_integer_labels(logits, target).mean()

    @jax.jit
    def step(adapter, state, variables, tokens):  # noqa: ANN001, ANN202 - pytrees
        value, gradient = jax.value_and_grad(loss)(adapter, variables, tokens)
        updates, state = tx.update(gradient, state, adapter)
        return optax.apply_updates(adapter, updates), state, value

    losses = []
    for number in range(steps):
        adapter, state, value = step(adapter, state, variables, batch(number))
        losses.append(float(value))  # of the whole batch, in every process
    said = f"process {jax.process_index()} of {jax.process_count()}"
    print(f"{said}: {len(jax.local_devices())} of {len(jax.devices())} devices", flush=True)
    print(f"{said}: loss {losses[0]:.6f} -> {losses[-1]:.6f}", flush=True)
    jl.save_adapter(
        out, adapter, base=variables
    )  # every process calls it, and the first one writes
    return losses


# --- the launcher --------------------------------------------------------------------------------


def start(
    index: int, processes: int, port: int, steps: int, out: Path, log: IO[str]
) -> subprocess.Popen[str]:
    """Start a worker."""
    share = f" --xla_force_host_platform_device_count={DEVICES // processes}"
    environment = os.environ | {"JAX_PLATFORMS": "cpu", "XLA_FLAGS": share}
    words = ["--worker", index, "--port", port, "--processes", processes]
    words += ["--steps", steps, "--out", out]
    command = [sys.executable, __file__, *map(str, words)]
    return subprocess.Popen(command, env=environment, stdout=log, stderr=log, text=True)


def run(processes: int, steps: int, out: Path, timeout: float) -> list[str]:
    """Run the workers, and return the output of each.

    If one of them fails, the others are stopped, as they would wait for it forever.
    """
    with socket.socket() as free:  # find a free port
        free.bind(("localhost", 0))
        port = free.getsockname()[1]
    with contextlib.ExitStack() as files:
        logs = [files.enter_context(tempfile.TemporaryFile("w+")) for _ in range(processes)]
        workers = [start(i, processes, port, steps, out, log) for i, log in enumerate(logs)]
        try:
            problem = wait(workers, timeout)
        finally:
            for worker in workers:
                worker.kill()
                worker.wait()
        for log in logs:
            log.seek(0)
        said = [log.read() for log in logs]
    if problem:
        sys.exit("\n".join([problem, *said]))
    return said


def wait(workers: Sequence[subprocess.Popen[str]], timeout: float) -> str:
    """Wait for all workers; return an error message, or an empty string."""
    deadline = time.monotonic() + timeout
    while any(worker.poll() != 0 for worker in workers):
        dead = [index for index, worker in enumerate(workers) if worker.poll()]
        if dead:
            time.sleep(1)  # let the others write their errors
            return f"process {dead[0]} failed; output of all processes:"
        if time.monotonic() > deadline:
            return f"not done after {timeout:.0f} s; increase --timeout"
        time.sleep(0.1)
    return ""


def main(argv: Sequence[str] | None = None) -> None:
    """Run the example, or one of its workers."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--processes", type=int, default=2, choices=(1, 2, 4))
    parser.add_argument("--out", type=Path, help="folder for the adapter")
    parser.add_argument("--timeout", type=float, default=600.0, help="seconds")
    parser.add_argument("--worker", type=int, help=argparse.SUPPRESS)
    parser.add_argument("--port", type=int, help=argparse.SUPPRESS)
    options = parser.parse_args(argv)
    if options.worker is not None:
        import jax

        if options.processes > 1:
            jax.distributed.initialize(
                f"localhost:{options.port}", options.processes, options.worker
            )
        work(options.steps, options.out)
        return
    with tempfile.TemporaryDirectory() as folder:
        out = options.out or Path(folder) / "adapter"
        for text in run(options.processes, options.steps, out, options.timeout):
            print("\n".join(line for line in text.splitlines() if line.startswith("process")))
        size = sum(file.stat().st_size for file in out.rglob("*") if file.is_file())
        print(f"saved adapter: {size / 1e6:.2f} MB")


if __name__ == "__main__":
    main()
