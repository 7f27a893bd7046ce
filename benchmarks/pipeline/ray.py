"""Stages as Ray tasks on the machines of a cluster, over a folder that all of them see.

Ray says where a stage runs, and runs it again elsewhere if its machine falls; what there was to
save lies in the folder, so that a training goes on from there.
"""

import logging
import os
import socket
from collections.abc import Callable, Iterator
from concurrent.futures import Executor, Future
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path
from typing import Any

from benchmarks.pipeline.places import (
    BY_ONE,
    SideBySide,
    set_up_process,
    stage_context,
    with_threads,
)
from shared.config import InputError
from shared.generation.start import GenerationConfig
from shared.models.device import on_gpu
from shared.stages import Stage, Stages, fill_stage

RETRIES = 3  # machines that may fall under one stage
PROBE = ".seen-by"  # a file that every machine must find in the folder of stages
COPIES, LEAST = 4, 2**30  # weights, gradients, two moments; bytes of a stage without a model
INSTALL = "pip install ray"


@dataclass(frozen=True)
class Start:
    """What a process of the cluster starts with."""

    threads: int
    save_minutes: float
    generation: GenerationConfig
    root: Path


@dataclass(frozen=True)
class Machine:
    """What a machine of the cluster says of itself."""

    name: str
    context: dict[str, Any]
    gpu: bool
    sees_folder: bool


@contextmanager
def cluster(address: str, start: Start) -> Iterator["Cluster"]:
    """The cluster at `address`, all of whose machines see the folder and compute alike.

    InputError if it cannot be reached, or if they do not.
    """
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    try:
        import ray
    except ImportError as error:
        raise InputError(
            f"--ray needs Ray, which cannot be imported ({error}); {INSTALL}"
        ) from None
    try:
        require_reachable(address)
        ray.init(address=address, log_to_driver=False, logging_level=logging.ERROR)
    except (OSError, ValueError, RuntimeError) as error:
        raise InputError(
            f"--ray {address}: no cluster answers there ({error}); start one with "
            "`ray start --head`, and name the address that it prints, or `auto`"
        ) from error
    found = None
    try:
        found = Cluster(start, look_around(start))
        yield found
    except KeyboardInterrupt:
        if found is not None:
            found.cancel()
        raise
    finally:
        ray.shutdown()


def require_reachable(address: str) -> None:
    """OSError or ValueError unless somebody listens there: Ray itself tries for a minute and ends
    the process.
    """
    if address == "auto":
        return
    host, _, port = address.rpartition(":")
    if not host or not port.isdigit() or "/" in host:
        raise ValueError("an address is HOST:PORT")
    socket.create_connection((host, int(port)), timeout=10).close()


class Cluster:
    """Runs stages; `context` is that of its machines, part of every stage's address."""

    def __init__(self, start: Start, machines: list[Machine]):
        self.start, self.context = start, machines[0].context
        self.gpus = machines[0].gpu
        self.running: set[Any] = set()

    def stages(self, stages: Stages, threads: int) -> SideBySide:
        """`stages`, each a task of so many threads."""
        stages = replace(stages, context=with_threads(stages.context, threads))
        return SideBySide(stages, Tasks(self, replace(self.start, threads=threads)))

    def cancel(self) -> None:
        """End what runs."""
        import ray

        for task in list(self.running):
            ray.cancel(task, force=True)


class Tasks(Executor):
    """Of one number of threads."""

    def __init__(self, cluster: Cluster, start: Start):
        self.cluster, self.start = cluster, start

    def submit(self, fn: Callable[..., Any], /, *args: Any, **_: Any) -> Future[Any]:
        """A stage to be filled, on the next machine with room; its error is that of the work."""
        import ray

        folder, stage = args
        needs = {"num_cpus": self.start.threads, "memory": memory_of(stage)}
        if self.cluster.gpus and stage.name not in BY_ONE:
            needs["num_gpus"] = 1
        task = ray.remote(_fill).options(max_retries=RETRIES, **needs)
        running = task.remote(self.start, folder, stage)
        self.cluster.running.add(running)
        future: Future[Any] = Future()

        def done(finished: "Future[Any]") -> None:
            self.cluster.running.discard(running)
            error = finished.exception()
            if error is None:
                future.set_result(finished.result())
            else:
                future.set_exception(getattr(error, "cause", None) or error)

        running.future().add_done_callback(done)
        return future


def _fill(start: Start, folder: Path, stage: Stage) -> float:
    """On a machine of the cluster."""
    _set_up(start)
    return fill_stage(folder, stage, taken_over=True)


@cache
def _set_up(start: Start) -> None:
    set_up_process(start.threads, start.save_minutes)


def look_around(start: Start) -> list[Machine]:
    """All machines, the driver aside; InputError if they differ or do not see the folder."""
    import ray
    from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

    start.root.mkdir(parents=True, exist_ok=True)
    probe = start.root / f"{PROBE}-{socket.gethostname()}-{os.getpid()}"
    probe.touch()
    try:
        look = ray.remote(_look)
        asked = [
            look.options(
                num_cpus=0,
                scheduling_strategy=NodeAffinitySchedulingStrategy(node["NodeID"], False),
            ).remote(start, probe)
            for node in ray.nodes()
            if node["Alive"] and node["Resources"].get("CPU")
        ]
        machines: list[Machine] = ray.get(asked)
    finally:
        probe.unlink()
    if not machines:
        raise InputError("--ray: no machine of the cluster has a CPU to compute with")
    for machine in machines:
        if not machine.sees_folder:
            raise InputError(
                f"--ray: {machine.name} does not see {start.root}: runs must lie in a folder that "
                "all machines share; `--runs` names it"
            )
        require_alike(machine, machines[0])
    return machines


def require_alike(machine: Machine, first: Machine) -> None:
    """InputError where two machines would compute other digits."""
    for key in sorted({*machine.context, *first.context}):
        ours, theirs = first.context.get(key), machine.context.get(key)
        if ours != theirs:
            raise InputError(
                f"--ray: {key} is {theirs} on {machine.name} and {ours} on {first.name}: stages "
                "would differ in their digits; make the machines alike"
            )


def _look(start: Start, probe: Path) -> Machine:
    """On each machine: what it is."""
    _set_up(start)
    name = socket.gethostname()
    return Machine(name, stage_context(start.generation), on_gpu(), probe.exists())


def memory_of(stage: Stage) -> int:
    """Bytes that a stage is given room for: four times the models that it reads, 1 GiB at least."""
    folders = {path for path in _paths(stage.inputs) if path.is_dir()}
    weights = {file for folder in folders for file in folder.rglob("*.safetensors")}
    return LEAST + COPIES * sum(file.stat().st_size for file in weights)


def _paths(value: Any) -> Iterator[Path]:
    if isinstance(value, Path):
        yield value
    elif isinstance(value, dict):
        for one in value.values():
            yield from _paths(one)
    elif isinstance(value, list | tuple):
        for one in value:
            yield from _paths(one)
    elif hasattr(value, "__dict__"):
        yield from _paths(vars(value))
