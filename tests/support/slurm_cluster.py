"""A real Slurm of three nodes on this machine: munged, slurmctld and three slurmd, in a folder of their own."""

import contextlib
import os
import shutil
import signal
import socket
import subprocess
import time
from pathlib import Path

import pytest

NODES = ("node1", "node2", "node3")
NEEDED = ("munged", "slurmctld", "slurmd", "sbatch")
PACKAGES = ("slurm-wlm", "slurm-wlm-basic-plugins", "munge")
CONF = """
ClusterName=test
SlurmctldHost={host}(127.0.0.1)
SlurmUser=root
SlurmctldPort={ports[0]}
AuthType=auth/munge
AuthInfo=cred_expire=5,socket={folder}/munge.socket
CredType=cred/munge
StateSaveLocation={folder}/state
SlurmdSpoolDir={folder}/spool-%n
SlurmctldPidFile={folder}/slurmctld.pid
SlurmdPidFile={folder}/slurmd-%n.pid
SlurmctldLogFile={folder}/slurmctld.log
SlurmdLogFile={folder}/slurmd-%n.log
ProctrackType=proctrack/linuxproc
TaskPlugin=task/affinity
SelectType=select/cons_tres
SelectTypeParameters=CR_CPU
SwitchType=switch/none
MpiDefault=none
JobAcctGatherType=jobacct_gather/none
AccountingStorageType=accounting_storage/none
ReturnToService=2
SlurmdParameters=config_overrides
KillWait=5
GresTypes=gpu
NodeName=node1 NodeHostname={host} NodeAddr=127.0.0.1 Port={ports[1]} CPUs=4 Gres=gpu:2
NodeName=node2 NodeHostname={host} NodeAddr=127.0.0.1 Port={ports[2]} CPUs=4 Gres=gpu:2
NodeName=node3 NodeHostname={host} NodeAddr=127.0.0.1 Port={ports[3]} CPUs=4 Gres=gpu:2
PartitionName=main Nodes=node[1-3] Default=YES MaxTime=INFINITE State=UP
"""


def install() -> None:
    """Install Debian's packages; the test is skipped with the reason where that can't be."""
    if os.geteuid() != 0:
        pytest.skip("a cluster on one machine is started as root, and this is not root")
    if all(map(shutil.which, NEEDED)):
        return
    if not shutil.which("apt-get"):
        pytest.skip(f"needs {', '.join(PACKAGES)}, and there is no apt-get to install them")
    quiet = {"env": os.environ | {"DEBIAN_FRONTEND": "noninteractive"}, "capture_output": True, "text": True}
    for command in (["update"], ["install", "-y", "--no-install-recommends", *PACKAGES]):
        done = subprocess.run(["apt-get", "-q", *command], **quiet)
        if done.returncode and command[0] == "install":
            pytest.skip(f"apt-get could not install Slurm: {done.stderr.strip().splitlines()[-1:]}")


class Cluster:
    """Started by entering it; leaving it ends every process that it started."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.conf = folder, folder / "slurm.conf"
        self.environment = os.environ | {"SLURM_CONF": str(self.conf)}
        self.daemons: list[subprocess.Popen] = []

    def __enter__(self) -> "Cluster":
        sockets = [socket.socket() for _ in range(1 + len(NODES))]
        for one in sockets:
            one.bind(("127.0.0.1", 0))
        ports = [one.getsockname()[1] for one in sockets]
        for one in sockets:
            one.close()
        self.folder.chmod(0o755)
        (self.folder / "state").mkdir()
        host = socket.gethostname().split(".")[0]
        self.conf.write_text(CONF.format(folder=self.folder, host=host, ports=ports))
        # Devices that stand for two GPUs, which no training on the CPU opens.
        (self.folder / "gres.conf").write_text("NodeName=node[1-3] Name=gpu File=/dev/null,/dev/zero\n")
        key = self.folder / "munge.key"
        key.write_bytes(os.urandom(128))
        key.chmod(0o600)
        for node in NODES:
            (self.folder / f"spool-{node}").mkdir()
        try:
            self._start(
                "munged", "--foreground", "--force", f"--key-file={key}", f"--socket={self.folder}/munge.socket",
                f"--pid-file={self.folder}/munged.pid", f"--log-file={self.folder}/munged.log",
                f"--seed-file={self.folder}/munged.seed",
            )  # fmt: skip
            self._wait(lambda: (self.folder / "munge.socket").exists(), "munged")
            self._start("slurmctld", "-D")
            for node in NODES:
                self._start("slurmd", "-D", "-N", node)
            self._wait(lambda: self.command("sinfo", "-h", "-o", "%t %D").split() == ["idle", "3"], "three idle nodes")
        except BaseException:
            self.__exit__()
            raise
        return self

    def __exit__(self, *_: object) -> None:
        with contextlib.suppress(OSError, subprocess.SubprocessError):
            self.command("scancel", "--full", "--signal=KILL", "--user=root", check=False)
        for daemon in reversed(self.daemons):
            daemon.terminate()
        for daemon in self.daemons:
            try:
                daemon.wait(timeout=10)
            except subprocess.TimeoutExpired:
                daemon.kill()
                daemon.wait()
        # slurmstepd outlives slurmd; ours are those that hold our configuration.
        for entry in Path("/proc").iterdir():
            with contextlib.suppress(OSError, ValueError):
                if f"SLURM_CONF={self.conf}".encode() in (entry / "environ").read_bytes():
                    os.kill(int(entry.name), signal.SIGKILL)

    def command(self, *words: str, check: bool = True, **more) -> str:
        """What a command of Slurm prints."""
        done = subprocess.run(words, env=self.environment, capture_output=True, text=True, timeout=60, **more)
        if check and done.returncode:
            raise AssertionError(f"{words}: {done.stdout}{done.stderr}")
        return done.stdout + ("" if check else done.stderr)

    def state(self, job: str) -> str:
        """Such as RUNNING, PENDING or COMPLETED."""
        shown = self.command("scontrol", "show", "job", job, check=False)
        return next((word.partition("=")[2] for word in shown.split() if word.startswith("JobState=")), "GONE")

    def _start(self, *words: str) -> None:
        with open(self.folder / f"{words[0]}-{len(self.daemons)}.out", "w") as out:
            self.daemons.append(subprocess.Popen(words, env=self.environment, stdout=out, stderr=out))

    def _wait(self, ready, what: str, seconds: float = 40) -> None:
        until = time.monotonic() + seconds
        while True:
            with contextlib.suppress(AssertionError):
                if ready():
                    return
            if time.monotonic() > until:
                told = "\n".join(path.read_text()[-1500:] for path in self.folder.glob("*.out"))
                raise AssertionError(f"no {what} within {seconds:g} s\n{told}")
            time.sleep(0.2)
