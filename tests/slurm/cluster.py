"""A whole Slurm cluster on this machine, for as long as a test session: real daemons, no cgroups.

Every node is a slurmd of its own in its own UTS namespace, so that it has its own host name and can
be switched off alone. GPUs are declared, and are /dev/null. Needs root, and Debian's packages
slurm-wlm and munge.
"""

import contextlib
import fcntl
import os
import shutil
import signal
import socket
import subprocess
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

NODES = 4
CPUS = 8
GPUS = 8
PREFIX = "asvrnode"
HOSTS = Path("/etc/hosts")
MARK = f"# asvr test cluster of process {os.getpid()}"
DAEMON_PORTS = range(20100, 21300, 20)
LIMIT_S = 120.0
JOB_IDS = 1340  # and up: ports of jobs (from 10 times the id) beyond those of daemons

CONF = """
ClusterName=asvrtest
SlurmctldHost={host}(127.0.0.1)
SlurmctldPort={port}
FirstJobId={first_job}
SlurmUser=root
SlurmdUser=root
AuthType=auth/munge
CredType=cred/munge
AuthInfo=socket={folder}/munge.socket,cred_expire=5
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
JobAcctGatherType=jobacct_gather/none
SlurmdParameters=config_overrides
SelectType=select/cons_tres
SelectTypeParameters=CR_CPU
GresTypes=gpu
MpiDefault=none
SwitchType=switch/none
ReturnToService=2
SlurmctldTimeout=30
SlurmdTimeout=15
InactiveLimit=0
KillWait=5
MinJobAge=600
MessageTimeout=30
SchedulerType=sched/backfill
SchedulerParameters=bf_interval=2,sched_interval=2,requeue_setup_env_fail
JobRequeue=1
PreemptType=preempt/partition_prio
PreemptMode=REQUEUE
SlurmctldParameters=preempt_send_user_signal
PriorityType=priority/basic
JobCompType=jobcomp/none
AccountingStorageType=accounting_storage/none
StateSaveLocation={folder}/state
SlurmdSpoolDir={folder}/spool/%n
SlurmctldPidFile={folder}/slurmctld.pid
SlurmdPidFile={folder}/slurmd.%n.pid
SlurmctldLogFile={folder}/slurmctld.log
SlurmdLogFile={folder}/slurmd.%n.log
NodeName=DEFAULT CPUs={cpus} Boards=1 SocketsPerBoard=1 CoresPerSocket={cpus} ThreadsPerCore=1 \
RealMemory=64000 Gres=gpu:{gpus} State=UNKNOWN
NodeName={prefix}[1-{nodes}] NodeHostname={host} NodeAddr=127.0.0.1 Port=[{first}-{last}]
PartitionName=batch Nodes=ALL Default=YES MaxTime=INFINITE State=UP PriorityTier=10 \
PreemptMode=REQUEUE GraceTime=60
PartitionName=urgent Nodes=ALL MaxTime=INFINITE State=UP PriorityTier=100 PreemptMode=OFF
"""
CGROUP = "CgroupPlugin=cgroup/v1\nCgroupAutomount=no\nConstrainCores=no\nConstrainRAMSpace=no\n"


class Cluster:
    """Daemons of one cluster; ``with Cluster(folder):`` starts and stops them.

    Args:
        folder: for keys, states and logs; short, since a socket's path has few letters.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.conf = folder / "slurm.conf"
        self._daemons: dict[str, subprocess.Popen[bytes]] = {}
        self._namespaces: dict[str, set[Path]] = {}

    @property
    def nodes(self) -> list[str]:
        """Names of all nodes."""
        return [f"{PREFIX}{number + 1}" for number in range(NODES)]

    def __enter__(self) -> "Cluster":
        try:
            self._start()
        except BaseException:
            self.__exit__()
            raise
        return self

    def __exit__(self, *_: object) -> None:
        if "slurmctld" in self._daemons:
            with contextlib.suppress(subprocess.SubprocessError):
                self.run("scancel", "--user=root", "--full", check=False)
        for node in self.nodes:
            self._kill(node)
        for name in reversed(list(self._daemons)):
            self._end(name)
        _hosts(lambda lines: [line for line in lines if MARK not in line])

    def run(self, *command: str, check: bool = True) -> str:
        """What one of Slurm's commands prints."""
        done = subprocess.run(
            command, env=self.env(), capture_output=True, text=True, timeout=60, check=False
        )
        assert not check or done.returncode == 0, f"{command}: {done.stderr}"
        return done.stdout

    def env(self) -> dict[str, str]:
        """Variables by which Slurm's commands find this cluster."""
        return {**os.environ, "SLURM_CONF": str(self.conf)}

    def power_off(self, node: str) -> None:
        """End everything that runs on a node, at once."""
        self._kill(node)
        if node in self._daemons:
            self._daemons.pop(node).wait()

    def kill_daemon(self, node: str) -> None:
        """End the node's slurmd alone; steps that it started live on."""
        self._members(node)  # whose namespace is known from the daemon
        daemon = self._daemons.pop(node)
        daemon.kill()
        daemon.wait()

    def restore(self) -> None:
        """End all jobs; bring all nodes back, empty."""
        self.run("scancel", "--user=root", "--full", check=False)
        for node in self.nodes:
            if node not in self._daemons:
                self.power_off(node)  # what lives on without a daemon
                self.power_on(node)
        deadline = time.monotonic() + LIMIT_S
        while set(self.run("sinfo", "-hN", "-p", "batch", "-o%T").split()) != {"idle"}:
            assert time.monotonic() < deadline, self.run("sinfo", "-N", "-l")
            self.run("scontrol", "update", "NodeName=ALL", "State=RESUME", check=False)
            time.sleep(0.5)

    def power_on(self, node: str) -> None:
        """Start a node."""
        (self.folder / "spool" / node).mkdir(parents=True, exist_ok=True)
        script = f"hostname {node}; exec slurmd -D -N {node}"
        self._daemon(node, ["unshare", "--uts", "sh", "-c", script])

    def _start(self) -> None:
        for name in ("state", "spool"):
            (self.folder / name).mkdir(parents=True)
        self.folder.chmod(0o755)  # munge wants its socket to be within everybody's reach
        _hosts(lambda lines: [*lines, *(f"127.0.0.1 {n} {MARK}\n" for n in self.nodes)])
        key = self.folder / "munge.key"
        key.touch(0o600)
        key.write_bytes(os.urandom(1024))
        options = {"key-file": key, "socket": self.folder / "munge.socket"}
        options |= {f"{n}-file": self.folder / f"munge.{n}" for n in ("pid", "log", "seed")}
        self._daemon("munged", ["munged", "-F", *(f"--{k}={v}" for k, v in options.items())])
        self._until(lambda: (self.folder / "munge.socket").exists())
        self._configure()
        self._daemon("slurmctld", ["slurmctld", "-D", "-c", "-i"])
        self._until(lambda: "UP" in self.run("scontrol", "ping", check=False))
        for node in self.nodes:
            self.power_on(node)
        self._until(
            lambda: self.run("sinfo", "-hN", "-p", "batch", "-o%T").split() == ["idle"] * NODES
        )

    def _configure(self) -> None:
        port = _free_ports(1 + NODES)
        text = CONF.format(
            host=socket.gethostname().partition(".")[0],
            port=port,
            first_job=JOB_IDS + os.getpid() % 50 * 20,
            first=port + 1,
            last=port + NODES,
            folder=self.folder,
            cpus=CPUS,
            gpus=GPUS,
            prefix=PREFIX,
            nodes=NODES,
        )
        self.conf.write_text(text)
        (self.folder / "cgroup.conf").write_text(CGROUP)
        for number in range(GPUS):  # a GPU needs a device file whose name ends in its number
            (self.folder / f"nvidia{number}").symlink_to("/dev/null")
        gres = f"AutoDetect=off\nName=gpu File={self.folder}/nvidia[0-{GPUS - 1}]\n"
        (self.folder / "gres.conf").write_text(gres)

    def _daemon(self, name: str, command: Sequence[str]) -> None:
        with (self.folder / f"{name}.out").open("ab") as out:
            self._daemons[name] = subprocess.Popen(
                command, env=self.env(), stdin=subprocess.DEVNULL, stdout=out, stderr=out
            )

    def _end(self, name: str) -> None:
        daemon = self._daemons.pop(name)
        daemon.terminate()
        try:
            daemon.wait(10)
        except subprocess.TimeoutExpired:
            daemon.kill()
            daemon.wait()

    def _kill(self, node: str) -> None:
        for pid in self._members(node):
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        self._namespaces.pop(node)  # the kernel gives its number to the next one

    def _members(self, node: str) -> list[int]:
        """Processes on a node, which are those with its host name, also without its daemon."""
        known = self._namespaces.setdefault(node, set())
        if node in self._daemons:
            with contextlib.suppress(OSError):  # it ended by itself
                known.add(Path(f"/proc/{self._daemons[node].pid}/ns/uts").readlink())
        known.discard(Path("/proc/self/ns/uts").readlink())  # of a daemon that is just starting
        found = []
        for process in Path("/proc").glob("[0-9]*"):
            with contextlib.suppress(OSError):
                if (process / "ns/uts").readlink() in known:
                    found.append(int(process.name))
        return found

    def _until(self, condition: Callable[[], bool]) -> None:
        deadline = time.monotonic() + LIMIT_S
        while not condition():
            dead = [name for name, daemon in self._daemons.items() if daemon.poll() is not None]
            assert not dead, f"{dead} ended; logs are in {self.folder}"
            assert time.monotonic() < deadline, f"the cluster does not start; see {self.folder}"
            time.sleep(0.1)


def missing() -> str | None:
    """Why there can be no cluster on this machine, or None."""
    lacking = [name for name in ("slurmctld", "slurmd", "munged") if shutil.which(name) is None]
    if lacking:
        return f"{', '.join(lacking)} not found: apt-get install slurm-wlm munge"
    if os.geteuid():
        return "Slurm's daemons need root here"
    made = subprocess.run(["unshare", "--uts", "true"], capture_output=True, check=False)
    return None if made.returncode == 0 else "nodes need UTS namespaces, which are forbidden here"


@contextlib.contextmanager
def started(folder: Path) -> Iterator[Cluster]:
    """A running cluster, found by Slurm's commands in this process and its children."""
    with Cluster(folder) as made:
        before = os.environ.get("SLURM_CONF")
        os.environ["SLURM_CONF"] = str(made.conf)
        try:
            yield made
        finally:
            os.environ.pop("SLURM_CONF")
            if before is not None:
                os.environ["SLURM_CONF"] = before


def _hosts(change: Callable[[list[str]], list[str]]) -> None:
    """Change the lines of /etc/hosts; clusters of other processes may do so at the same time."""
    with HOSTS.open("r+", encoding="utf-8") as stream:
        fcntl.flock(stream, fcntl.LOCK_EX)
        lines = change(stream.readlines())
        stream.seek(0)
        stream.writelines(lines)
        stream.truncate()


def _free_ports(number: int) -> int:
    """The first of so many ports in a row that nobody listens on; processes look elsewhere."""
    places = list(DAEMON_PORTS)
    turn = os.getpid() % len(places)
    for first in places[turn:] + places[:turn]:
        with contextlib.ExitStack() as stack:
            try:
                for port in range(first, first + number):
                    taken = stack.enter_context(socket.socket())
                    taken.bind(("127.0.0.1", port))
            except OSError:
                continue
        return first
    raise AssertionError("no free ports")
