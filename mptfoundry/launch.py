"""`mptfoundry launch`: a script or manifest that starts a run on a cluster, from a template in `clusters/`.

The config is checked for that cluster first. Nothing is submitted: the command that does it is printed.
"""

from __future__ import annotations

import re
import shlex
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml

from mptfoundry.check import check_on
from mptfoundry.config.run import TrainConfig
from mptfoundry.config.verbs import LaunchConfig
from mptfoundry.errors import ConfigError, MissingError
from mptfoundry.files import writing_into
from mptfoundry.plan.devices import GIB, cluster_device
from mptfoundry.plan.plan import make_plan

# In a checkout, and in an installed package.
FOLDERS = (Path(__file__).parent.parent / "clusters", Path(sys.prefix, "share/mptfoundry/clusters"))
SITE = "# What a site needs goes here: mptfoundry launch fills it in."
STARTS = "# What only the"
NAME_OF_KUBERNETES = re.compile(r"[^a-z0-9-]+")
NETWORK = """\
# Settings of the network that are known to matter. Most machines need none; uncomment what yours needs.
# https://docs.nvidia.com/deeplearning/nccl/user-guide/docs/env.html
#   NCCL_DEBUG=INFO            say which network is used: the line "Using network IB" or "Socket"
#   NCCL_SOCKET_IFNAME=eth0    the interface that connects the machines, where there are several
#   NCCL_IB_HCA=mlx5           the InfiniBand or RoCE ports
#   NCCL_IB_GID_INDEX=3        RoCE v2 on many clusters; `show_gids` of Mellanox OFED lists yours
#   NCCL_IB_TIMEOUT=22         on large or busy InfiniBand networks
#   NCCL_NVLS_ENABLE=0         where NVLink SHARP fails to start
# https://github.com/aws/aws-ofi-nccl (AWS with EFA)
#   FI_PROVIDER=efa
# https://cloud.google.com/compute/docs/gpus/gpudirect: Google's images set their own
"""


def launch(config: TrainConfig, words: Sequence[str], options: LaunchConfig) -> str:
    """Write the script or manifest, and return what `mptfoundry launch` prints.

    Args:
        config: The run, as it was read.
        words: The file of the config and the words that override it.
        options: The cluster and the site.

    Raises:
        ConfigError: The config can't run on that cluster, or the file exists.
        DataError: The config contradicts the data on this machine.
    """
    device = cluster_device(options.gpu, options.nodes * options.gpus_per_node, options.gpus_per_node)
    checked = check_on(config, device)
    need = make_plan(config, device).memory.total
    if device.memory is not None and need > device.memory:
        raise ConfigError(
            f"nodes: {device.count} x {device.name} can't hold the model: it needs about {need / GIB:.1f} "
            f"GiB of {device.memory / GIB:.1f}. `mptfoundry plan` proposes settings that fit."
        )
    name = config.run_name
    write = {"slurm": _slurm, "kubernetes": _kubernetes, "skypilot": _skypilot}[options.scheduler]
    text, submit = write(name, list(words), options)
    suffix = "sbatch" if options.scheduler == "slurm" else "yaml"
    target = Path(options.out or f"{name}.{suffix}")
    if target.exists() and not options.overwrite:
        raise ConfigError(f"out: {target} exists. Name another file, or set overwrite=true.")
    with writing_into(target.parent):
        target.write_text(text)
    here = [line for line in checked.text.splitlines() if line.startswith("here: ")]
    return "\n".join([*here, f"wrote {target}", "submit it with:", f"  {submit.format(file=target)}"])


def _template(name: str) -> str:
    for folder in FOLDERS:
        if (folder / name).is_file():
            return (folder / name).read_text()
    raise MissingError(f"the template {name} is not installed. Take it from clusters/ of the repository.")


def _variables(options: LaunchConfig) -> dict[str, str]:
    """The environment of each process."""
    known: dict[str, str] = {}
    if options.hf_home:
        known["HF_HOME"] = options.hf_home
    if options.offline:
        known["HF_HUB_OFFLINE"] = "1"
    scratch = options.scratch or "/tmp"
    if options.scratch:
        known["TMPDIR"] = scratch  # streamed shards are kept there, unless a stream says `local`
    known["TRITON_CACHE_DIR"] = f"{scratch}/mptfoundry-triton"
    known["TORCHINDUCTOR_CACHE_DIR"] = f"{scratch}/mptfoundry-inductor"
    return known | {name: str(value) for name, value in options.env.items()}


def _slurm(name: str, words: list[str], options: LaunchConfig) -> tuple[str, str]:
    text = _template("slurm.sbatch" if options.launcher else "slurm-direct.sbatch")
    body = text[text.index("#SBATCH") :]
    head = {
        "job-name": name,
        "nodes": str(options.nodes),
        "gpus-per-node": str(options.gpus_per_node),
        "time": options.time,
    }
    if not options.launcher:
        head["ntasks-per-node"] = str(options.gpus_per_node)
    for key, value in head.items():
        body = re.sub(
            rf"^#SBATCH --{key}=.*$", f"#SBATCH --{key}={value}".replace("\\", "\\\\"), body, flags=re.M
        )
    added = {"account": options.account, "partition": options.partition}
    extra = [f"#SBATCH --{key}={value}\n" for key, value in added.items() if value]
    extra += [f"#SBATCH {word}\n" for word in options.sbatch]
    body = body.replace("#SBATCH --nodes", "".join(extra) + "#SBATCH --nodes", 1)
    body = body.replace(SITE, _site(words, options))
    where = _container(options)
    start = body.index(STARTS)
    main = body[start:].replace("srun ", f"srun {where[0]}", 1).replace("bash -c ", f"{where[1]}bash -c ", 1)
    if options.launcher:
        logs = "--stdout 'logs/rank{rank}.log' --stderr 'logs/rank{rank}.err' "
        main = main.replace("composer --nproc", f"composer {logs.replace(chr(39), chr(34))}--nproc", 1)
    else:
        main = main.replace("srun ", "srun --output=logs/%x-%j-rank%t.log ", 1)
    health = _health_of_slurm(options, where) if options.health_check else ""
    purpose = f"# Written by mptfoundry launch slurm: {shlex.join(words)}\n"
    return f"#!/bin/bash\n{purpose}{body[:start]}mkdir -p logs\n{health}{main}", "sbatch {file}"


def _site(words: list[str], options: LaunchConfig) -> str:
    """The lines of a Slurm script that a site needs."""
    lines = [f"set -- {shlex.join(words)}"]
    if options.modules:
        # Modules of some sites read variables that are not set.
        lines += ["set +u", "module purge", f"module load {shlex.join(options.modules)}", "set -u"]
    if options.venv:
        lines.append(f"export PATH={shlex.quote(options.venv)}/bin:$PATH")
    lines += [f"export {key}={shlex.quote(value)}" for key, value in _variables(options).items()]
    # Shards, sockets and checkpoints need many open files; kernels of InfiniBand pin memory.
    lines += ['ulimit -n 65536 || ulimit -n "$(ulimit -Hn)"', "ulimit -l unlimited 2> /dev/null || true"]
    exported = re.sub(r"^#   (\w+=\S+)( +)?(\S.*)?$", _as_export, NETWORK, flags=re.M)
    return "\n".join([*lines, exported.rstrip()])


def _as_export(match: re.Match[str]) -> str:
    return f"# export {match[1]}" + (f"  # {match[3]}" if match[3] else "")


def _container(options: LaunchConfig) -> tuple[str, str]:
    """What stands after `srun`, and before `bash -c`, to run in a container."""
    if options.image is None:
        return "", ""
    if options.container == "pyxis":
        mounts = ",".join(["$PWD:$PWD", *options.mounts])
        image = f"--container-image={shlex.quote(options.image)}"
        return f'{image} --container-mounts="{mounts}" --container-workdir="$PWD" ', ""
    binds = "".join(f"--bind {shlex.quote(mount)} " for mount in options.mounts)
    return "", f"apptainer exec --nv {binds}{shlex.quote(options.image)} "


def _health_of_slurm(options: LaunchConfig, where: tuple[str, str]) -> str:
    """The health check that runs before the training, with a launcher on each machine."""
    gpus = options.gpus_per_node
    tasks = f"--ntasks-per-node=1 --ntasks={options.nodes}"
    return (
        "# Matrix products and all-reduces on each GPU: a slow one is named, and ends the job.\n"
        "# shellcheck disable=SC2016\n"
        f"srun {where[0]}{tasks} --kill-on-bad-exit=1 --cpu-bind=none \\\n"
        f"  {where[1]}bash -c 'unset WORLD_SIZE LOCAL_WORLD_SIZE\n"
        '  exec composer --nproc "$1" --world_size "$2" \\\n'
        '  --node_rank "$SLURM_NODEID" --master_addr "$MASTER_ADDR" --master_port "$MASTER_PORT" \\\n'
        f"  scripts/doctor.py cluster=true' composer {gpus} {gpus * options.nodes} || exit 1\n"
    )


def _kubernetes(name: str, words: list[str], options: LaunchConfig) -> tuple[str, str]:
    manifest = yaml.safe_load(_template("kubernetes.yaml"))
    manifest["metadata"]["name"] = NAME_OF_KUBERNETES.sub("-", name.lower()).strip("-") or "mpt"
    job = manifest["spec"]["replicatedJobs"][0]["template"]["spec"]
    job["parallelism"] = job["completions"] = options.nodes
    pod = job["template"]["spec"]
    [container] = pod["containers"]
    if options.image:
        container["image"] = options.image
    container["args"] = words
    if options.health_check:
        container["command"] = [*container["command"][:2], _with_health(container["command"][2]), "train"]
    numbers = {"NODES": str(options.nodes), "GPUS": str(options.gpus_per_node)}
    for each in container["env"]:
        each.update({"value": numbers[each["name"]]} if each["name"] in numbers else {})
    container["env"] += [{"name": key, "value": value} for key, value in _variables(options).items()]
    container["resources"]["limits"]["nvidia.com/gpu"] = str(options.gpus_per_node)
    for number, mount in enumerate(options.mounts):
        claim, _, path = mount.partition(":")
        pod["volumes"].append({"name": f"mount-{number}", "persistentVolumeClaim": {"claimName": claim}})
        container["volumeMounts"].append({"name": f"mount-{number}", "mountPath": path or f"/{claim}"})
    return _manifest("kubernetes", manifest, words), "kubectl apply -f {file}"


def _with_health(command: str) -> str:
    """The same launcher, first for the health check, then for the run."""
    launcher, _, _ = command.removeprefix("exec ").partition("scripts/train.py")
    return f"{launcher}scripts/doctor.py cluster=true || exit 1\n{command}"


def _skypilot(name: str, words: list[str], options: LaunchConfig) -> tuple[str, str]:
    task = yaml.safe_load(_template("skypilot.yaml"))
    task["name"], task["num_nodes"] = name, options.nodes
    gpu = options.gpu.upper().replace("A100-40GB", "A100")
    task["resources"]["accelerators"] = f"{gpu}:{options.gpus_per_node}"
    if options.image:
        task["resources"]["image_id"] = f"docker:{options.image}"
    task["envs"] = {"CONFIG": words[0], **_variables(options)}
    if options.mounts:
        task["file_mounts"] = {
            there: here for here, there in (mount.split(":", 1) for mount in options.mounts)
        }
    run = re.sub(
        r"scripts/train\.py .*", lambda _: f'scripts/train.py "$CONFIG" {shlex.join(words[1:])}', task["run"]
    )
    if options.health_check:
        start = run.index("composer ")
        launcher = run[start : run.index("scripts/train.py")]
        run = f"{run[:start]}{launcher}scripts/doctor.py cluster=true || exit 1\n{run[start:]}"
    task["run"] = run.rstrip(" \n") + "\n"
    return _manifest("skypilot", task, words), f"sky jobs launch -n {shlex.quote(name)} {{file}}"


class _Block(str):
    """A text that YAML writes on lines of its own."""


def _manifest(scheduler: str, content: Mapping[str, Any], words: list[str]) -> str:
    class Dumper(yaml.SafeDumper):
        pass

    Dumper.add_representer(
        _Block, lambda dumper, text: dumper.represent_scalar("tag:yaml.org,2002:str", text, style="|")
    )
    purpose = f"# Written by mptfoundry launch {scheduler}: {shlex.join(words)}\n"
    dumped = yaml.dump(_blocks(content), Dumper=Dumper, sort_keys=False, width=1000)
    return purpose + NETWORK + dumped


def _blocks(value: Any) -> Any:
    """A copy whose texts of several lines are written as blocks."""
    if isinstance(value, Mapping):
        return {key: _blocks(each) for key, each in value.items()}
    if isinstance(value, list):
        return [_blocks(each) for each in value]
    return _Block(value) if isinstance(value, str) and "\n" in value.strip() else value
