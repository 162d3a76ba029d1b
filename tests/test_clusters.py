"""What ships for clusters: run here with stand-ins for the schedulers, and linted where a linter is.

Each script or manifest has to start the processes of one run with the right numbers, to be started again
after exit code 143 and only then, and to leave the processes the time that they need to save.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
import yaml

from mptfoundry.cli import main

# Rows of docs/internals/reliability.md: the fault; how it is made, and how often; what the run does.
FAULTS = [
    (
        "a job exits, or its shell gets SIGTERM",
        "stand-in for `srun`, 6",
        "queued again only after 143, and not after `scancel`",
    ),
]

ROOT = Path(__file__).parent.parent
CLUSTERS = ROOT / "clusters"
SCRIPTS = sorted(CLUSTERS.glob("*.sbatch"))
MANIFESTS = sorted(CLUSTERS.glob("*.yaml"))
STAND_INS = {
    # Starts what it is given once for each task, one after another, as two machines of two devices would.
    "srun": """
        while [[ $1 == --* ]]; do shift; done
        worst=0
        for ((rank = 0; rank < SLURM_NTASKS; rank++)); do
          local_rank=$((rank % SLURM_NTASKS_PER_NODE)) node=$((rank / SLURM_NTASKS_PER_NODE))
          SLURM_PROCID=$rank SLURM_LOCALID=$local_rank SLURM_NODEID=$node "$@"
          code=$?
          worst=$((code > worst ? code : worst))
        done
        exit $worst
    """,
    "scontrol": """
        if [ "$1" = requeue ]; then echo "$2" >> "$NOTES/requeued"; else printf 'node-a\\nnode-b\\n'; fi
    """,
    "squeue": 'echo "${JOB_STATE:-RUNNING}"',
    "composer": 'note_command composer "$@"',
    "python": 'note_command python "$@"',
}
NOTE = f"""
    note_command() {{
      {sys.executable} -c 'import json, os, sys; print(json.dumps([dict(os.environ), sys.argv[1:]]))' "$@" \\
        >> "$NOTES/commands"
      return "${{EXIT_CODE:-0}}"
    }}
"""


@pytest.fixture
def stand_ins(tmp_path: Path) -> Path:
    """A folder whose `bin` has the schedulers' commands; notes of what they were told lie in it."""
    (tmp_path / "bin").mkdir()
    for name, text in STAND_INS.items():
        (tmp_path / "bin" / name).write_text(f"#!/bin/bash\n{NOTE}{text}\n")
        (tmp_path / "bin" / name).chmod(0o755)
    return tmp_path


def run(
    stand_ins: Path, *words: str, **environment: str
) -> tuple[int, list[tuple[dict[str, str], list[str]]]]:
    """The exit code, and the environment and the words of each command that was started."""
    path = f"{stand_ins}/bin{os.pathsep}{os.environ['PATH']}"
    plain = {"PATH": path, "VENV": str(stand_ins), "NOTES": str(stand_ins), "HOME": str(stand_ins)}
    done = subprocess.run(words, env={**plain, **environment}, cwd=ROOT, timeout=600)
    notes = stand_ins / "commands"
    return done.returncode, [tuple(json.loads(line)) for line in notes.read_text().splitlines()]


def submit(script: Path, stand_ins: Path, *words: str, **environment: str) -> Any:
    """Run a script as Slurm does on the first of two machines with two devices each."""
    tasks_per_node = 2 if "direct" in script.name else 1
    slurm = {"SLURM_JOB_ID": "41234", "SLURM_JOB_NODELIST": "node-[a-b]", "SLURM_NNODES": "2"}
    slurm |= {"SLURM_GPUS_ON_NODE": "2", "SLURM_NTASKS": str(2 * tasks_per_node)}
    slurm |= {"SLURM_NTASKS_PER_NODE": str(tasks_per_node)}
    return run(stand_ins, "bash", str(script), *words, **slurm, **environment)


def options_of(words: list[str]) -> dict[str, str]:
    """`--name value` pairs of the launcher, before the script."""
    before = words[1 : words.index("scripts/train.py")]
    return dict(zip(before[::2], before[1::2], strict=True))


def words_after(words: list[str]) -> list[str]:
    return words[words.index("scripts/train.py") + 1 :]


def pod_template() -> dict[str, Any]:
    return job_spec()["template"]["spec"]


def job_spec() -> dict[str, Any]:
    manifest = yaml.safe_load((CLUSTERS / "kubernetes.yaml").read_text())
    return manifest["spec"]["replicatedJobs"][0]["template"]["spec"]


def seconds_of_the_launcher() -> int:
    """How long the launcher waits before it kills, read in its source."""
    spec = find_spec("composer")
    assert spec is not None and spec.submodule_search_locations is not None
    source = (Path(spec.submodule_search_locations[0]) / "cli/launcher.py").read_text()
    found = re.search(r"CLEANUP_TIMEOUT = datetime.timedelta\(seconds=(\d+)\)", source)
    assert found is not None
    return int(found[1])


@pytest.mark.parametrize("path", [*SCRIPTS, *MANIFESTS], ids=lambda path: path.name)
def test_what_it_names_exists(path: Path) -> None:
    named = re.findall(r"(?<![\w/.-])((?:configs|scripts|clusters|docker)/[\w.-]*\w)", path.read_text())
    assert named
    for name in named:
        assert (ROOT / name).exists(), name


def test_slurm_starts_a_launcher_on_each_machine(stand_ins: Path) -> None:
    said = ["configs/mpt-tiny.yaml", "save_folder=/shared/{run_name}", "run_name=a b"]
    code, commands = submit(CLUSTERS / "slurm.sbatch", stand_ins, *said)
    assert code == 0
    for node, (_, words) in enumerate(commands):
        assert words_after(words) == said
        assert options_of(words) == {
            "--nproc": "2",
            "--world_size": "4",
            "--node_rank": str(node),
            "--master_addr": "node-a",
            "--master_port": "21234",
        }
    assert len(commands) == 2


def test_slurm_starts_each_process_where_there_is_no_launcher(stand_ins: Path) -> None:
    said = ["configs/mpt-tiny.yaml", "run_name=a b"]
    code, commands = submit(CLUSTERS / "slurm-direct.sbatch", stand_ins, *said)
    assert code == 0
    for rank, (environment, words) in enumerate(commands):
        assert words == ["python", "scripts/train.py", *said]
        numbers = {"RANK": rank, "LOCAL_RANK": rank % 2, "NODE_RANK": rank // 2}
        numbers |= {"WORLD_SIZE": 4, "LOCAL_WORLD_SIZE": 2, "MASTER_PORT": 21234}
        assert {name: int(environment[name]) for name in numbers} == numbers
        assert environment["MASTER_ADDR"] == "node-a"
    assert len(commands) == 4


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda path: path.name)
@pytest.mark.parametrize(
    ("code", "state", "is_queued_again"),
    [
        (0, "RUNNING", False),
        (1, "RUNNING", False),
        (2, "RUNNING", False),
        (143, "RUNNING", True),
        (143, "COMPLETING", False),
    ],
)
def test_slurm_queues_again_what_was_stopped_and_nothing_else(
    script: Path, code: int, state: str, is_queued_again: bool, stand_ins: Path
) -> None:
    found, _ = submit(script, stand_ins, "configs/mpt-tiny.yaml", EXIT_CODE=str(code), JOB_STATE=state)
    assert found == code
    requeued = stand_ins / "requeued"
    assert (requeued.read_text() if requeued.exists() else "") == ("41234\n" if is_queued_again else "")


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda path: path.name)
def test_a_signal_to_slurms_shell_does_not_keep_it_from_queueing_again(script: Path, stand_ins: Path) -> None:
    (stand_ins / "bin" / "srun").write_text(f"#!/bin/bash\nkill -TERM $PPID\nsleep 0.2\n{STAND_INS['srun']}")
    code, _ = submit(script, stand_ins, "configs/mpt-tiny.yaml", EXIT_CODE="143")
    assert code == 143
    assert (stand_ins / "requeued").read_text() == "41234\n"


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda path: path.name)
def test_slurm_leaves_the_time_to_save(script: Path) -> None:
    options = dict(re.findall(r"^#SBATCH --([\w-]+)(?:=(\S+))?", script.read_text(), re.MULTILINE))
    signal, _, seconds = options["signal"].partition("@")
    assert signal == "TERM"
    assert int(seconds) >= 2 * seconds_of_the_launcher()
    assert "requeue" in options and options["open-mode"] == "append"


def test_kubernetes_starts_a_launcher_in_each_pod(stand_ins: Path) -> None:
    container = pod_template()["containers"][0]
    given = {each["name"]: each["value"] for each in container["env"] if "value" in each}
    assert set(given) == {"NODES", "GPUS"}
    known = {**given, "JOBSET_NAME": "mpt", "JOB_COMPLETION_INDEX": "1"}
    code, [(_, words)] = run(stand_ins, *container["command"], *container["args"], **known)
    assert code == 0 and words_after(words) == container["args"]
    devices, machines = int(given["GPUS"]), int(given["NODES"])
    assert options_of(words) == {
        "--nproc": str(devices),
        "--world_size": str(devices * machines),
        "--node_rank": "1",
        "--master_addr": "mpt-node-0-0.mpt",
        "--master_port": str(container["ports"][0]["containerPort"]),
    }
    assert int(container["resources"]["limits"]["nvidia.com/gpu"]) == devices
    assert job_spec()["parallelism"] == job_spec()["completions"] == machines


def test_kubernetes_starts_all_pods_again_unless_the_config_is_wrong() -> None:
    manifest, job = yaml.safe_load((CLUSTERS / "kubernetes.yaml").read_text()), job_spec()
    [rule] = job["podFailurePolicy"]["rules"]
    assert rule["action"] == "FailJob"
    assert rule["onExitCodes"]["operator"] == "In" and rule["onExitCodes"]["values"] == [2]
    assert rule["onExitCodes"]["containerName"] == pod_template()["containers"][0]["name"]
    assert job["backoffLimit"] == 0 and pod_template()["restartPolicy"] == "Never"
    policy = manifest["spec"]["failurePolicy"]
    assert policy["maxRestarts"] >= 100
    assert [(each["action"], each["onJobFailureReasons"]) for each in policy["rules"]] == [
        ("FailJobSet", ["PodFailurePolicy"])
    ]


def test_kubernetes_pods_have_time_shared_memory_and_the_images_user() -> None:
    pod = pod_template()
    assert pod["terminationGracePeriodSeconds"] >= 2 * seconds_of_the_launcher()
    mounts = {each["mountPath"]: each["name"] for each in pod["containers"][0]["volumeMounts"]}
    volumes = {each["name"]: each for each in pod["volumes"]}
    assert set(mounts.values()) == set(volumes)
    assert volumes[mounts["/dev/shm"]]["emptyDir"]["medium"] == "Memory"
    assert f"USER {pod['securityContext']['runAsUser']}\n" in (ROOT / "docker/Dockerfile").read_text()


def test_skypilot_starts_a_launcher_on_each_machine_and_recovers_what_was_stopped(stand_ins: Path) -> None:
    task = yaml.safe_load((CLUSTERS / "skypilot.yaml").read_text())
    known = {"SKYPILOT_NUM_GPUS_PER_NODE": "2", "SKYPILOT_NUM_NODES": "2", "SKYPILOT_NODE_RANK": "1"}
    known |= {"SKYPILOT_NODE_IPS": "10.0.0.1\n10.0.0.2", **task["envs"]}
    text = task["run"].replace("$PWD/.venv", "$VENV")
    code, [(_, words)] = run(stand_ins, "bash", "-c", text, **known)
    assert code == 0
    assert words_after(words) == [task["envs"]["CONFIG"], f"save_folder={task['envs']['RUNS']}/{{run_name}}"]
    assert options_of(words) == {
        "--nproc": "2",
        "--world_size": "4",
        "--node_rank": "1",
        "--master_addr": "10.0.0.1",
        "--master_port": "29500",
    }
    assert task["resources"]["job_recovery"]["recover_on_exit_codes"] == [143]


def commands() -> list[list[str]]:
    """The config and the words that each script or manifest trains with, or says that it may."""
    task = yaml.safe_load((CLUSTERS / "skypilot.yaml").read_text())
    found = [
        pod_template()["containers"][0]["args"],
        [task["envs"]["CONFIG"], "save_folder=s3://b/{run_name}"],
    ]
    for script in SCRIPTS:
        [said] = re.findall(r"^#   sbatch .*\.sbatch (.*)$", script.read_text(), re.MULTILINE)
        found.append(said.split())
    return found


@pytest.mark.parametrize("words", commands(), ids=lambda words: words[0])
def test_every_command_describes_a_run(words: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["check", str(ROOT / words[0]), *words[1:]]) == 0


def linter(name: str) -> str:
    """The path of a linter; the test is left out where it is not installed."""
    found = shutil.which(name) or shutil.which(name, path=str(Path(sys.executable).parent))
    if found is None:
        pytest.skip(f"{name} is not installed")
    return found


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda path: path.name)
def test_shellcheck_has_nothing_to_say(script: Path) -> None:
    subprocess.run([linter("shellcheck"), "--severity=style", script], check=True)


@pytest.mark.parametrize("manifest", MANIFESTS, ids=lambda path: path.name)
def test_yamllint_has_nothing_to_say(manifest: Path) -> None:
    rules = "document-start: disable, line-length: {max: 110}, comments: {min-spaces-from-content: 1}"
    subprocess.run(
        [linter("yamllint"), "--strict", "-d", f"{{extends: default, rules: {{{rules}}}}}", manifest],
        check=True,
    )


def test_kubernetes_knows_every_field_of_the_job(tmp_path: Path) -> None:
    validate = linter("kubernetes-validate")
    job = {"apiVersion": "batch/v1", "kind": "Job", "metadata": {"name": "node"}, "spec": job_spec()}
    (tmp_path / "job.yaml").write_text(yaml.safe_dump(job))
    subprocess.run([validate, "--strict", tmp_path / "job.yaml"], check=True)


def test_skypilot_reads_the_task(tmp_path: Path) -> None:
    python = Path(linter("sky")).parent / "python"
    read = "import sys, sky; task = sky.Task.from_yaml(sys.argv[1]); print(task.num_nodes)"
    environment = {
        **os.environ,
        "HOME": str(tmp_path),
        "PYTHONPATH": "",
        "SKYPILOT_DISABLE_USAGE_COLLECTION": "1",
    }
    done = subprocess.run(
        [python, "-c", read, CLUSTERS / "skypilot.yaml"],
        env=environment,
        cwd=ROOT,
        check=True,
        capture_output=True,
        text=True,
    )
    assert done.stdout.split()[-1] == "2"


def launched(
    capsys: pytest.CaptureFixture[str], folder: Path, scheduler: str, *words: str, code: int = 0
) -> tuple[str, str]:
    """The file that `mptfoundry launch` writes, and what it prints."""
    out = folder / f"run.{scheduler}"
    config = str(ROOT / "configs/mpt-7b.yaml")
    cluster = ["nodes=2", "gpu=h100", "gpus_per_node=2", f"out={out}", "global_train_batch_size=64"]
    assert main(["launch", scheduler, config, *cluster, *words]) == code
    printed = capsys.readouterr()
    return (out.read_text() if code == 0 else ""), printed.out + printed.err


SAID = ["global_train_batch_size=64", "run_name=a b", "fsdp_config.activation_checkpointing=true"]


@pytest.mark.parametrize("launcher", ["true", "false"])
def test_launch_writes_a_script_that_checks_the_machines_and_then_trains(
    launcher: str, stand_ins: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    text, printed = launched(capsys, tmp_path, "slurm", *SAID[1:], f"launcher={launcher}", "account=me")
    assert f"sbatch {tmp_path}/run.slurm" in printed and "#SBATCH --account=me\n" in text
    assert "#SBATCH --nodes=2\n" in text and "#SBATCH --job-name=a b\n" in text
    script = tmp_path / ("direct.sbatch" if launcher == "false" else "with.sbatch")
    script.write_text(text.replace("mkdir -p logs", ""))
    code, started = submit(script, stand_ins)
    assert code == 0
    of_health = [words for _, words in started if words[-2:] == ["scripts/doctor.py", "cluster=true"]]
    of_training = [(known, words) for known, words in started if "scripts/train.py" in words]
    assert (
        of_health and started[0][1] == of_health[0] and len(of_training) == (2 if launcher == "true" else 4)
    )
    assert options_of([*of_health[0][:-2], "scripts/train.py"])["--world_size"] == "4"
    for known, words in of_training:
        assert words_after(words) == [str(ROOT / "configs/mpt-7b.yaml"), *SAID]
        assert known["TRITON_CACHE_DIR"] == "/tmp/mptfoundry-triton"


def test_launch_writes_what_a_site_needs(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    site = [
        "partition=gpu",
        "modules=cuda/13.0,nccl",
        "image=/i/mpt.sqsh",
        "mounts=/data:/data",
        "offline=true",
    ]
    site += ["hf_home=/hf", "scratch=/local", "env.NCCL_IB_TIMEOUT=22", "sbatch=--qos=high", "time=01:00:00"]
    text, _ = launched(capsys, tmp_path, "slurm", *site)
    lines = text.splitlines()
    for line in (
        "#SBATCH --partition=gpu",
        "#SBATCH --qos=high",
        "#SBATCH --time=01:00:00",
        "module load cuda/13.0 nccl",
        "export HF_HOME=/hf",
        "export HF_HUB_OFFLINE=1",
        "export TMPDIR=/local",
        "export NCCL_IB_TIMEOUT=22",
        "# export NCCL_IB_HCA=mlx5  # the InfiniBand or RoCE ports",
    ):
        assert line in lines
    container = '--container-image=/i/mpt.sqsh --container-mounts="$PWD:$PWD,/data:/data"'
    assert text.count(container) == 2 and 'composer --stdout "logs/rank{rank}.log"' in text
    text, _ = launched(capsys, tmp_path, "slurm", *site, "container=apptainer", "overwrite=true")
    assert text.count("apptainer exec --nv --bind /data:/data /i/mpt.sqsh bash -c") == 2


def test_launch_writes_a_manifest_for_kubernetes(
    stand_ins: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    text, printed = launched(
        capsys, tmp_path, "kubernetes", *SAID[1:], "image=reg/mpt:1", "mounts=claim:/more"
    )
    assert f"kubectl apply -f {tmp_path}/run.kubernetes" in printed
    manifest = yaml.safe_load(text)
    job = manifest["spec"]["replicatedJobs"][0]["template"]["spec"]
    pod = job["template"]["spec"]
    [container] = pod["containers"]
    assert manifest["metadata"]["name"] == "a-b" and job["parallelism"] == job["completions"] == 2
    assert container["image"] == "reg/mpt:1" and container["resources"]["limits"]["nvidia.com/gpu"] == "2"
    assert {"name": "mount-0", "mountPath": "/more"} in container["volumeMounts"]
    given = {each["name"]: each["value"] for each in container["env"] if "value" in each}
    known = {**given, "JOBSET_NAME": "mpt", "JOB_COMPLETION_INDEX": "1"}
    code, [(_, health), (_, train)] = run(stand_ins, *container["command"], *container["args"], **known)
    assert code == 0 and health[-2:] == ["scripts/doctor.py", "cluster=true"]
    assert words_after(train) == [str(ROOT / "configs/mpt-7b.yaml"), *SAID]
    assert options_of(train)["--world_size"] == "4"
    job_alone = {"apiVersion": "batch/v1", "kind": "Job", "metadata": {"name": "node"}, "spec": job}
    (tmp_path / "job.yaml").write_text(yaml.safe_dump(job_alone))
    subprocess.run([linter("kubernetes-validate"), "--strict", tmp_path / "job.yaml"], check=True)


def test_launch_writes_a_task_for_skypilot(
    stand_ins: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    text, printed = launched(capsys, tmp_path, "skypilot", *SAID[1:])
    assert "sky jobs launch -n 'a b'" in printed
    task = yaml.safe_load(text)
    assert task["num_nodes"] == 2 and task["resources"]["accelerators"] == "H100:2"
    known = {"SKYPILOT_NUM_GPUS_PER_NODE": "2", "SKYPILOT_NUM_NODES": "2", "SKYPILOT_NODE_RANK": "1"}
    known |= {"SKYPILOT_NODE_IPS": "10.0.0.1\n10.0.0.2", **task["envs"]}
    code, [(_, health), (_, train)] = run(
        stand_ins, "bash", "-c", task["run"].replace("$PWD/.venv", "$VENV"), **known
    )
    assert code == 0 and health[-2:] == ["scripts/doctor.py", "cluster=true"]
    assert words_after(train) == [str(ROOT / "configs/mpt-7b.yaml"), *SAID]


@pytest.mark.parametrize(
    ("scheduler", "words", "said"),
    [
        ("slurm", ["gpus_per_node=3"], "does not split over 6 devices"),
        ("slurm", ["gpu=l4"], "can't hold the model"),
        ("slurm", ["mounts=/data"], "does not say where it is mounted"),
        ("slurm", ["model.d_modle=3"], "unknown key. Did you mean d_model?"),
        ("kubernetes", ["account=me"], "only applies to slurm"),
        ("nomad", [], "nomad"),
    ],
)
def test_launch_refuses_what_can_not_run(
    scheduler: str, words: list[str], said: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert said in launched(capsys, tmp_path, scheduler, *words, code=2)[1]


def test_launch_keeps_a_file_that_exists(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    launched(capsys, tmp_path, "slurm")
    assert "exists. Name another file" in launched(capsys, tmp_path, "slurm", code=2)[1]


@pytest.mark.parametrize("launcher", ["true", "false"])
def test_shellcheck_has_nothing_to_say_of_what_launch_writes(
    launcher: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    linter("shellcheck")
    launched(capsys, tmp_path, "slurm", f"launcher={launcher}", "modules=cuda")
    subprocess.run([linter("shellcheck"), "--severity=style", tmp_path / "run.slurm"], check=True)
