"""Who started this process: torchrun, SLURM's srun, or neither, and then it starts the others of its machine itself."""

from __future__ import annotations

import os
from typing import TYPE_CHECKING

from ..errors import UserError

if TYPE_CHECKING:
    from lightning_fabric.plugins.environments import ClusterEnvironment

    from ..recipe import Machine


def launched() -> tuple[str, int, int] | None:
    """(by what, processes a machine, machines); None where this process has no others, or those that it starts."""
    env = os.environ
    if "TORCHELASTIC_RUN_ID" in env:
        name, world, nodes = "torchrun", int(env["WORLD_SIZE"]), int(env["GROUP_WORLD_SIZE"])
    elif "SLURM_PROCID" in env and int(env.get("SLURM_NTASKS", 1)) > 1:  # one task is free to start others
        name, world, nodes = "srun", int(env["SLURM_NTASKS"]), int(env.get("SLURM_NNODES", 1))
    else:
        return None
    if world % nodes:
        raise UserError(f"{name} started {world} processes on {nodes} machines; start as many on each")
    return name, world // nodes, nodes


def first_process() -> bool:
    """Of the processes of one run, the one that talks."""
    found = launched()
    names = {"torchrun": ("RANK",), "srun": ("SLURM_PROCID",)}[found[0]] if found else ("NODE_RANK", "LOCAL_RANK")
    return all(os.environ.get(name, "0") == "0" for name in names)


def agree(machine: Machine) -> None:
    """Take devices and nodes from what started this process, where the recipe does not state them.

    UserError where it states others, or where machines are asked for and nothing starts them.
    """
    found = launched()
    if found is None:
        if machine.nodes > 1 and not {"NODE_RANK", "MASTER_ADDR", "MASTER_PORT"} <= os.environ.keys():
            raise UserError(
                f"--nodes {machine.nodes}: the command starts processes on its own machine only. Start it on every "
                f"machine by torchrun or srun, or with NODE_RANK, MASTER_ADDR and MASTER_PORT set, or give --slurm"
            )
        return
    name, devices, nodes = found
    if not machine.model_fields_set & {"devices", "nodes"}:
        machine.devices, machine.nodes = devices, nodes
    elif (machine.devices, machine.nodes) != (devices, nodes):
        if not first_process():
            raise SystemExit(2)
        raise UserError(
            f"{name} started {devices} process(es) on each of {nodes} machine(s), and the run is for {machine.devices} "
            f"on each of {machine.nodes}: give --devices {devices} --nodes {nodes}, or neither"
        )


def leave_to_first() -> None:
    """For what one process does: the others that were started with it end here."""
    if not first_process():
        raise SystemExit(0)


def refuse_several(command: str) -> None:
    """UserError where several processes were started for a command that trains more than one run, or times one."""
    if found := launched():
        if not first_process():
            raise SystemExit(2)
        raise UserError(
            f"{found[0]} started {found[1] * found[2]} processes, and `sslbench {command}` is for one: start it by "
            f"itself. `sslbench pretrain`, `eval` and `transfer` take several"
        )


def environment() -> ClusterEnvironment:
    """How Fabric finds the other processes."""
    from lightning_fabric.plugins import environments

    found = launched()
    if found is None:
        return environments.LightningEnvironment()
    name, devices, _ = found
    if name == "torchrun":
        return environments.TorchElasticEnvironment()
    env = os.environ  # what srun leaves out by its version and flags, and Fabric asks for
    env["SLURM_NTASKS_PER_NODE"] = str(devices)
    env.setdefault("SLURM_NODELIST", env.get("SLURM_JOB_NODELIST", "127.0.0.1"))
    env.setdefault("SLURM_NODEID", str(int(env["SLURM_PROCID"]) // devices))
    env.setdefault("SLURM_LOCALID", str(int(env["SLURM_PROCID"]) % devices))
    return environments.SLURMEnvironment()


def alone() -> bool:
    """Leave the processes that trained together, after which the first of them, True, goes on by itself.

    Where there was nothing left to train they have not met, though they may all be there.
    """
    import torch.distributed as dist

    if not (dist.is_available() and dist.is_initialized()):
        return first_process()
    rank = dist.get_rank()
    dist.destroy_process_group()
    return rank == 0
