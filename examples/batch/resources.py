"""In: the flags and the machines of a Ray cluster. Out: the number of workers and the resources of each."""

import math
import os
import socket
from dataclasses import dataclass

from data import InputError, one_line

from .flags import BatchArguments


@dataclass
class Plan:
    """The numbers of actors and decoders, and the resources of each."""

    actors: int
    gpus: float
    actor_cpus: float
    decoders: int
    decoder_cpus: float


def plan(arguments: BatchArguments, machines: list[dict[str, float]]) -> Plan:
    """Divides machines, each with numbers of `CPU` and `GPU`, among actors and decoders.

    Raises:
        InputError: if the flags ask for more than there is: Ray would wait for it silently.
    """
    cpus = int(sum(machine.get("CPU", 0) for machine in machines))
    gpus, threads = arguments.gpus_per_actor, arguments.threads_per_actor
    if gpus is None:
        gpus = 1.0 if any(machine.get("GPU") for machine in machines) else 0.0
    if gpus < 0 or (gpus > 1 and gpus != int(gpus)):
        raise InputError(f"--gpus_per_actor must be 0, a part of one GPU or a whole number of GPUs, got {gpus:g}")
    if not cpus:
        raise InputError("there are no CPUs to decode images on")
    if gpus:  # the GPUs of an actor are on one machine; a fraction is of one GPU
        found = int(sum(machine.get("GPU", 0) for machine in machines))
        each = (lambda n: n * math.floor(1 / gpus + 1e-9)) if gpus <= 1 else (lambda n: n // gpus)
        room = int(sum(each(int(machine.get("GPU", 0))) for machine in machines))
        what = f"of --gpus_per_actor {gpus:g}; there are {found} GPUs on {len(machines)} machines"
    else:
        room = sum(int(machine.get("CPU", 0)) // threads for machine in machines)
        what = f"of --threads_per_actor {threads}; there are {cpus} CPUs on {len(machines)} machines"
    actors = arguments.num_actors or max(room, 1)
    if actors > room and not arguments.autoscaling:
        raise InputError(f"there is no room for {actors} actors {what}, with room for {room}")
    if gpus:
        return Plan(actors, gpus, 0.0, cpus, 1.0)
    # The model takes most of the time: decoders reserve a quarter of the CPUs and may use idle ones.
    actor_cpus = 0.75 * (threads if arguments.autoscaling else min(threads, cpus / actors))
    # Ray's resources above 1 are whole numbers
    return Plan(actors, 0.0, int(actor_cpus) if actor_cpus > 1 else actor_cpus, actors, 0.25)


def this_machine(arguments: BatchArguments) -> dict[str, float]:
    """Returns the resources of a local Ray.

    Raises:
        InputError: if the flags ask for more than the machine has, or for less shared memory than Ray needs.
    """
    import torch

    cpus, memory = os.cpu_count() or 1, os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") // 2**20
    if (arguments.num_cpus or 1) > cpus:
        raise InputError(f"--num_cpus {arguments.num_cpus} is more than the {cpus} CPUs of this machine")
    if not 75 <= arguments.object_store_mb <= memory:
        raise InputError(
            f"--object_store_mb must be between 75, which Ray needs, and the {memory} of this machine, got "
            f"{arguments.object_store_mb}"
        )
    return {"CPU": arguments.num_cpus or cpus, "GPU": torch.cuda.device_count()}


def check_address(address: str) -> None:
    """Tests a cluster's address: Ray itself would wait for minutes and then end the process.

    Raises:
        InputError: if nothing answers at the address.
    """
    if address == "auto":
        return
    host, _, port = address.removeprefix("ray://").rpartition(":")
    try:
        socket.create_connection((host.strip("[]"), int(port)), timeout=10).close()
    except (OSError, ValueError, OverflowError) as error:
        raise InputError(
            f"--address {address} does not answer ({one_line(error)}); host:port of a Ray cluster, or auto, was expected"
        ) from error


def start_ray(arguments: BatchArguments) -> Plan:
    """Starts Ray or joins a cluster.

    Raises:
        InputError: if Ray cannot be started or joined, or the flags ask for more than there is.
    """
    import ray

    local = {}
    if arguments.address is None:
        machine = this_machine(arguments)
        plan(arguments, [machine])
        local = {"num_cpus": arguments.num_cpus, "num_gpus": machine["GPU"], "include_dashboard": False}
        local["object_store_memory"] = arguments.object_store_mb * 2**20
    else:
        check_address(arguments.address)
    try:
        ray.init(address=arguments.address or "local", log_to_driver=False, logging_level="critical", **local)
    except Exception as error:  # Ray raises many kinds
        where = f"--address {arguments.address}" if arguments.address else "Ray on this machine"
        raise InputError(f"{where} cannot be used: {one_line(error)}") from error
    return plan(arguments, [node["Resources"] for node in ray.nodes() if node["Alive"]])
