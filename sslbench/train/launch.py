"""Who started this process: torchrun, SLURM's srun, or neither, and then it starts the others of its machine itself."""

from __future__ import annotations

import os
from datetime import timedelta
from typing import TYPE_CHECKING, NamedTuple

from ..errors import UserError

if TYPE_CHECKING:
    from lightning_fabric import Fabric
    from lightning_fabric.plugins.environments import ClusterEnvironment

    from ..recipe import Machine

MEET_S = 30  # how long to wait for processes of which only left-over variables may speak
STEP_S = 600  # and for those that srun says it has started
RENDEZVOUS = {"MASTER_ADDR", "MASTER_PORT"}

_agreed: Machine | None = None  # the machine that `agree` has seen last


class Launch(NamedTuple):
    """What started several processes, this one among them."""

    by: str  # torchrun or srun
    devices: int  # processes a machine
    nodes: int


def launched() -> Launch | None:
    """None where this process has no others, or those that it starts.

    UserError where the variables that say it contradict each other.
    """
    env = os.environ
    if "TORCHELASTIC_RUN_ID" in env:
        name, world, nodes = "torchrun", _number("WORLD_SIZE"), _number("GROUP_WORLD_SIZE")
    elif env.get("SLURM_PROCID", "").isdecimal() and (tasks := _tasks()) > 1:  # one task is free to start others
        name, world, nodes = "srun", tasks, _number("SLURM_STEP_NUM_NODES", "SLURM_NNODES", default=1)
    else:
        return None
    if world % nodes:
        raise UserError(f"{name} started {world} processes on {nodes} machines; start as many on each")
    return Launch(name, world // nodes, nodes)


def _tasks() -> int:
    """Processes that srun has started with this one. A job's own count also stands in a shell inside it."""
    shell = "SLURM_STEP_NUM_TASKS" not in os.environ and os.environ.get("SLURM_JOB_NAME") in ("bash", "interactive")
    return 1 if shell else _number("SLURM_STEP_NUM_TASKS", "SLURM_NTASKS", default=1)


def _number(*names: str, default: int | None = None) -> int:
    """The first of these variables that is set, as a whole number from 1 on."""
    name = next((name for name in names if name in os.environ), names[-1])
    value = os.environ.get(name, "" if default is None else str(default))
    if not value.isdecimal() or int(value) < 1:
        raise UserError(
            f"the environment says {name}={value or '(nothing)'}, where torchrun or srun would write a number of "
            f"processes; if it is left over from another job, `unset {name}` and its like"
        )
    return int(value)


def first_process() -> bool:
    """Whether this is the one of a run's processes that talks.

    LOCAL_RANK and NODE_RANK are heeded where they can be meant: in a process that this suite started, and in a run for
    several devices or machines with MASTER_ADDR and MASTER_PORT beside them. A shell may have them left over.
    """
    env = os.environ
    if launch := launched():
        return env.get({"torchrun": "RANK", "srun": "SLURM_PROCID"}[launch.by], "0") == "0"
    if _is_child():
        return False
    meant = []
    if _agreed and env.keys() >= RENDEZVOUS:
        meant = ["LOCAL_RANK"] * (_agreed.devices > 1) + ["NODE_RANK"] * (_agreed.nodes > 1)
    return all(env.get(name, "0") == "0" for name in meant)


def _is_child() -> bool:
    """Whether Fabric started this process out of the first one of its machine; see `environment`."""
    return os.environ.get("SSLBENCH_PARENT") == str(os.getppid()) and os.environ.get("LOCAL_RANK", "0") != "0"


def agree(machine: Machine) -> Machine:
    """The recipe's machine, with devices and nodes from what started this process where the recipe does not state them.

    UserError where it states others, or where machines are asked for and nothing starts them.
    """
    global _agreed
    _agreed = machine
    launch = launched()
    if launch is None:
        if machine.nodes > 1 and not {"NODE_RANK", *RENDEZVOUS} <= os.environ.keys():
            raise UserError(
                f"--nodes {machine.nodes}: the command starts processes on its own machine only. Start it on every "
                f"machine by torchrun or srun, or with NODE_RANK, MASTER_ADDR and MASTER_PORT set, or give --slurm"
            )
        return machine
    if not machine.model_fields_set & {"devices", "nodes"}:
        return machine.model_copy(update={"devices": launch.devices, "nodes": launch.nodes})
    if (machine.devices, machine.nodes) != (launch.devices, launch.nodes):
        if not first_process():
            raise SystemExit(2)
        raise UserError(
            f"{launch.by} started {launch.devices} process(es) on each of {launch.nodes} machine(s), and the run is "
            f"for {machine.devices} on each of {machine.nodes}: give --devices {launch.devices} --nodes "
            f"{launch.nodes}, or neither"
        )
    return machine


def leave_to_first() -> None:
    """End the processes that were started with the first one, for what one process does."""
    if not first_process():
        raise SystemExit(0)


def refuse_several(command: str) -> None:
    """UserError where several processes were started for a command that trains more than one run, or times one."""
    if launch := launched():
        if not first_process():
            raise SystemExit(2)
        raise UserError(
            f"{launch.by} started {launch.devices * launch.nodes} processes, and `sslbench {command}` is for one: "
            f"start it by itself. `sslbench pretrain`, `eval` and `transfer` take several"
        )


def environment(machine: Machine) -> ClusterEnvironment:
    """How Fabric finds the other processes, or starts them."""
    from lightning_fabric.plugins import environments

    env = os.environ
    launch = launched()
    if launch is None:
        if not _is_child():
            env["SSLBENCH_PARENT"] = str(os.getpid())  # which the processes that Fabric starts look for
            left_over = ["LOCAL_RANK"] * (machine.devices == 1 or not env.keys() >= RENDEZVOUS)
            for name in left_over + ["NODE_RANK", "GROUP_RANK"] * (machine.nodes == 1):
                env.pop(name, None)
        return environments.LightningEnvironment()
    if launch.by == "torchrun":
        if lacking := {"RANK", "LOCAL_RANK", *RENDEZVOUS} - env.keys():
            raise UserError(
                f"torchrun would set {', '.join(sorted(lacking))}, and the environment lacks it; `unset "
                f"TORCHELASTIC_RUN_ID` if that is left over"
            )
        return environments.TorchElasticEnvironment()
    # What srun leaves out by its version and flags, or says of the job and not of the step, and Fabric asks for.
    env["SLURM_NTASKS"] = str(launch.devices * launch.nodes)
    env |= {"SLURM_NTASKS_PER_NODE": str(launch.devices), "SLURM_NNODES": str(launch.nodes)}
    nodes_named = env.get("SLURM_STEP_NODELIST") or env.get("SLURM_JOB_NODELIST") or "127.0.0.1"
    env.setdefault("SLURM_NODELIST", nodes_named)
    env.setdefault("SLURM_NODEID", str(int(env["SLURM_PROCID"]) // launch.devices))
    env.setdefault("SLURM_LOCALID", str(int(env["SLURM_PROCID"]) % launch.devices))
    return environments.SLURMEnvironment()


def meet(fabric: Fabric) -> None:
    """Wait for the processes that others were to start, where Fabric would wait for half an hour and say nothing.

    UserError where they do not come: a batch script without srun, or variables that are left over.
    """
    import torch.distributed as dist

    launch = launched()
    by_hand = launch is None and fabric.world_size > 1 and "LOCAL_RANK" in os.environ and not _is_child()
    if dist.is_initialized() or not (by_hand or (launch and launch.by == "srun")):
        return
    if launch:
        words, rank = ["SLURM_PROCID", "SLURM_NTASKS"], int(os.environ["SLURM_PROCID"])
    else:
        words, rank = ["LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT"], fabric.global_rank
    cluster: ClusterEnvironment = fabric.strategy.cluster_environment  # type: ignore[attr-defined]
    wait = timedelta(seconds=STEP_S if "SLURM_STEP_NUM_TASKS" in os.environ else MEET_S)
    try:
        store = dist.TCPStore(cluster.main_address, cluster.main_port, fabric.world_size, rank == 0, wait)
    except dist.DistError as e:
        said = ", ".join(f"{name}={os.environ[name]}" for name in words)
        raise UserError(
            f"the environment says that this is process {rank + 1} of {fabric.world_size} ({said}), and in "
            f"{wait.seconds} s the others did not come. In a batch script start the command by srun, which starts them "
            f"all; for this one process give `srun --ntasks=1`, or `unset {' '.join(words)}` "
            f"({' '.join(str(e).split())[:100]})"
        ) from None
    store.set_timeout(dist.default_pg_timeout)
    backend = "nccl" if fabric.device.type == "cuda" else "gloo"
    dist.init_process_group(backend, store=store, rank=rank, world_size=fabric.world_size)


def leave_the_others() -> bool:
    """Leave the processes that trained together, after which the first of them, True, goes on by itself.

    Where there was nothing left to train they have not met, though they may all be there.
    """
    import torch.distributed as dist

    if not (dist.is_available() and dist.is_initialized()):
        return first_process()
    rank = dist.get_rank()
    dist.destroy_process_group()
    return rank == 0
