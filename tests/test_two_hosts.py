"""Two hosts, one of which is lost: the job ends or goes on, and never hangs.

A host is a network namespace here: its processes reach those of the other host only through a virtual cable, which can
be pulled. Both see one file system, as on a cluster. Each runs its own torchrun with 2 of the 4 ranks; the model is
sharded over two ranks and copied on the other two (HSDP), so the cable carries a part of every step.

    host a: torchrun, store of the rendezvous, ranks 0 1  ---- cable ----  host b: torchrun, ranks 2 3
"""

import contextlib
import json
import os
import signal
import subprocess
import sys
import time

import pytest
from small_runs import HERE, assert_same, figures, final_weights, log, options, train

pytestmark = pytest.mark.slow
SETTINGS = {"train__max_steps": 30, "checkpoint__every": 4, "parallel__replicate": 2, "parallel__timeout": 8}
ADDRESS = {"a": "10.203.77.1", "b": "10.203.77.2"}  # any: the namespaces have no way out
# torchrun gives a host up that is silent for 3 x 2 s, waits 60 s for all to come, and 5 s for more than --nnodes asks.
RENDEZVOUS = "join_timeout=60,last_call_timeout=5,read_timeout=20,keep_alive_interval=2,keep_alive_max_attempt=3"
# A torchrun that writes to a store out of reach waits for as long as the kernel sends the same bytes again; no timeout
# of torch's ends that. The kernel's default, 15 times, is a quarter of an hour. 6 times: 25 s.
TCP_RETRIES = 6


def ip(*arguments):
    return subprocess.run(["ip", *arguments], check=True, capture_output=True, text=True).stdout


class Hosts:
    """Hosts "a" and "b", and what they print."""

    def __init__(self, prints):
        self.prints, self.torchruns = prints, {}
        self.space = {host: f"minisft-{os.getpid()}-{host}" for host in ADDRESS}

    def connect(self):
        for space in self.space.values():
            ip("netns", "add", space)
        ip("link", "add", "cable", "netns", self.space["a"], "type", "veth", "peer", "cable", "netns", self.space["b"])
        for host, address in ADDRESS.items():
            ip("-n", self.space[host], "address", "add", f"{address}/24", "dev", "cable")
            ip("-n", self.space[host], "link", "set", "lo", "up")
            ip("-n", self.space[host], "link", "set", "cable", "up")
            ip("netns", "exec", self.space[host], "sh", "-c", f"echo {TCP_RETRIES} > /proc/sys/net/ipv4/tcp_retries2")

    def plug(self, end):
        ip("-n", self.space["b"], "link", "set", "cable", end)

    def processes(self, host):
        return [int(pid) for pid in ip("netns", "pids", self.space[host]).split()]

    def kill(self, host):
        for pid in self.processes(host):
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)

    def close(self):
        for host, space in self.space.items():
            with contextlib.suppress(OSError, subprocess.CalledProcessError):  # not even created
                self.kill(host)
                ip("netns", "delete", space)
        for torchrun in self.torchruns.values():
            torchrun.wait()

    def start(self, argv, *, nodes="2", restarts=0):
        environment = {**os.environ, "OMP_NUM_THREADS": "1", "GLOO_SOCKET_IFNAME": "cable"}
        for host, address in ADDRESS.items():
            command = ["ip", "netns", "exec", self.space[host], sys.executable, "-m", "torch.distributed.run",
                       "--nnodes", nodes, "--nproc-per-node", "2", "--max-restarts", str(restarts), "--rdzv-id", "run",
                       "--rdzv-backend", "c10d", "--rdzv-endpoint", f"{ADDRESS['a']}:29400", "--local-addr", address,
                       "--rdzv-conf", f"is_host={host == 'a'},{RENDEZVOUS}", str(HERE.parent / "train.py"), *argv]
            with open(self.prints / host, "a") as out:
                self.torchruns[host] = subprocess.Popen(command, stdout=out, stderr=out, env=environment)

    def printed(self, host):
        return (self.prints / host).read_text(errors="replace")

    def wait(self, event, seconds):
        deadline = time.monotonic() + seconds
        while not event():
            assert time.monotonic() < deadline, f"host a: {self.printed('a')}\nhost b: {self.printed('b')}"
            time.sleep(0.02)

    def wait_for_step(self, folder, step):
        self.wait(lambda: (folder / "run/metrics.jsonl").exists() and len(log(folder)) >= step, 120)

    def wait_for_end(self, host, seconds):
        """The exit code of its torchrun, when no process is left there."""
        self.wait(lambda: self.torchruns[host].poll() is not None and not self.processes(host), seconds)
        return self.torchruns[host].returncode


@pytest.fixture
def hosts(tmp_path):
    both = Hosts(tmp_path)
    try:
        both.connect()
        yield both
    except FileNotFoundError:
        pytest.skip("two hosts need the command ip (iproute2)")
    except subprocess.CalledProcessError as error:
        pytest.skip(f"two hosts need network namespaces: {' '.join(error.cmd)}: {error.stderr}")
    finally:
        both.close()


@pytest.fixture(scope="module")
def uninterrupted(base, tmp_path_factory):
    folder = tmp_path_factory.mktemp("whole")
    return train(base, folder, ranks=4, **SETTINGS), final_weights(folder)


def test_copies_of_the_sharded_model_change_nothing(base, tmp_path, uninterrupted):
    """4 ranks that shard over two and copy on two, against 1 rank."""
    alone = train(base, tmp_path, **{**SETTINGS, "parallel__replicate": 1})
    assert [r["loss"] for r in uninterrupted[0]] == pytest.approx([r["loss"] for r in alone], rel=1e-5)


def test_cut_off_for_good_both_hosts_end_and_a_new_start_goes_on(base, tmp_path, hosts, uninterrupted):
    argv = options(base, tmp_path, **SETTINGS)
    hosts.start(argv)
    hosts.wait_for_step(tmp_path, 10)
    hosts.plug("down")
    assert hosts.wait_for_end("a", 30) != 0  # parallel.timeout, and a little
    assert hosts.wait_for_end("b", 60) != 0  # the kernel's 25 s, too
    assert "Timeout (0:00:08)" in hosts.printed("a")
    assert "Timeout (0:00:08)" in hosts.printed("b")
    assert "resuming from" not in hosts.printed("a")
    hosts.plug("up")
    hosts.start(argv)
    assert [hosts.wait_for_end("a", 180), hosts.wait_for_end("b", 30)] == [0, 0], hosts.printed("a")
    assert "resuming from" in hosts.printed("a")
    assert_same(tmp_path, uninterrupted)


def test_cut_off_for_a_while_both_hosts_restart_and_the_run_is_the_same(base, tmp_path, hosts, uninterrupted):
    hosts.start(options(base, tmp_path, **SETTINGS), restarts=3)
    hosts.wait_for_step(tmp_path, 10)
    hosts.plug("down")
    time.sleep(10)  # longer than parallel.timeout; the kernel sends again after 12.6 s, and not after 25
    hosts.plug("up")
    assert [hosts.wait_for_end("a", 180), hosts.wait_for_end("b", 30)] == [0, 0], hosts.printed("a")
    assert "resuming from" in hosts.printed("a")
    assert_same(tmp_path, uninterrupted)


def test_a_dead_host_is_done_without(base, tmp_path, hosts, uninterrupted):
    """--nnodes 1:2: two ranks go on with the global batches of four, with one copy of the model instead of two."""
    settings = {**SETTINGS, "parallel__shard": 2, "parallel__replicate": 0}
    hosts.start(options(base, tmp_path, **settings), nodes="1:2", restarts=3)
    hosts.wait_for_step(tmp_path, 10)
    hosts.kill("b")
    hosts.plug("down")
    assert hosts.wait_for_end("a", 180) == 0, hosts.printed("a")
    assert "resuming from" in hosts.printed("a")
    records, names = uninterrupted[0], ("step", "epoch", "tokens", "target_tokens", "lr")
    assert figures(log(tmp_path), *names) == figures(records, *names)
    assert [r["loss"] for r in log(tmp_path)] == pytest.approx([r["loss"] for r in records], rel=1e-4)
    assert json.loads((tmp_path / "run/status.json").read_text())["state"] == "done"
