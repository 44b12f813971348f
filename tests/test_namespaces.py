"""Shaped networks: a benchmark that leaves namespaces behind, or shapes nothing, would be worse than none."""

import json
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from launching import wait_until
from test_bench_comm import SMALL, check_result, command, running, started

from cyclebnn_dist.bench import namespaces
from cyclebnn_dist.bench.namespaces import SEARCHED, shaped_networks
from cyclebnn_dist.config import RecipeError

ROOT = Path(__file__).parents[1]
TOOLS = [shutil.which(name, path=SEARCHED) for name in ("ip", "tc")]


def usable():
    """Whether this process may make a namespace with a shaped link, and why not."""
    if os.geteuid() != 0:
        return "needs root"
    if None in TOOLS:
        return "needs ip and tc (iproute2)"
    try:
        with shaped_networks(2, "1gbit"):
            return ""
    except RecipeError as error:
        return error.problem


WHY_NOT = usable()
pytestmark = pytest.mark.skipif(bool(WHY_NOT), reason=f"shaped networks: {WHY_NOT}")


def ours(pid=None):
    listed = subprocess.run([TOOLS[0], "netns", "list"], capture_output=True, text=True, check=True).stdout
    return sorted(
        line.split()[0] for line in listed.splitlines() if line.startswith(f"cyclebnn-{pid or os.getpid()}-")
    )


def shown(namespace, device):
    done = subprocess.run(
        [TOOLS[1], "-n", namespace, "qdisc", "show", "dev", device],
        capture_output=True,
        text=True,
        check=True,
    )
    return done.stdout


def test_every_rank_has_a_link_of_this_rate_in_both_directions():
    with shaped_networks(3, "100mbit") as network:
        assert len(ours()) == 4
        for rank, namespace in enumerate(network.namespaces):
            assert "tbf" in shown(namespace, "eth0")
            assert "rate 100Mbit" in shown(namespace, "eth0")
            assert "rate 100Mbit" in shown(f"cyclebnn-{os.getpid()}-switch", f"port{rank}")
        code = "import socket, sys; s = socket.create_server((sys.argv[1], 7000)); print('ready', flush=True); s.accept()"
        server = subprocess.Popen(
            [*network.inside(2), sys.executable, "-c", code, network.addresses[2]],
            stdout=subprocess.PIPE,
            text=True,
        )
        assert server.stdout.readline() == "ready\n"
        client = "import socket, sys; socket.create_connection((sys.argv[1], 7000), timeout=10)"
        subprocess.run(
            [*network.inside(0), sys.executable, "-c", client, network.addresses[2]], check=True, timeout=30
        )
        assert server.wait(timeout=10) == 0
    assert ours() == []


@pytest.fixture
def a_stranger():
    """A namespace that is not ours; its name begins alike."""
    name = f"cyclebnn-{os.getpid()}1-0"
    subprocess.run([TOOLS[0], "netns", "add", name], check=True)
    yield name
    subprocess.run([TOOLS[0], "netns", "del", name], check=True)


def test_nothing_is_left_after_a_failure_and_nothing_else_is_touched(a_stranger):
    def fail_inside():
        with shaped_networks(2, "1gbit"):
            assert len(ours()) == 3
            _ = 1 / 0

    with pytest.raises(ZeroDivisionError):
        fail_inside()
    assert ours() == []
    assert Path("/run/netns", a_stranger).exists()


def test_nothing_is_left_of_half_a_network(monkeypatch):
    built = []

    def fail(namespace, device, bits):
        built.append(ours())
        raise RecipeError("--rate", "no such qdisc")

    monkeypatch.setattr(namespaces, "_shape", fail)
    with pytest.raises(RecipeError, match="no such qdisc"), shaped_networks(2, "1gbit"):
        pass
    assert len(built[0]) == 2
    assert ours() == []


@pytest.mark.parametrize(("number", "status"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_nothing_is_left_after_a_signal(number, status, tmp_path):
    arguments = ("--ranks", "2", "--rate", "100mbit", "--numel", "5000000")
    with started(tmp_path, *arguments) as (process, ranks):
        assert len(ours(process.pid)) == 3
        process.send_signal(number)
        assert process.wait(timeout=60) == status
        assert ours(process.pid) == []
        assert wait_until(lambda: not any(running(each) for each in ranks), seconds=10)
        assert list(tmp_path.iterdir()) == []


def test_bytes_on_the_interface_are_those_the_ranks_count():
    arguments = ["--ranks", "2", "--rate", "1gbit", *SMALL, "--numel", "1000000", "--launches", "1", "--json"]
    done = subprocess.run(
        command(*arguments), cwd=ROOT, capture_output=True, text=True, check=True, timeout=120
    )
    result = json.loads(done.stdout)
    check_result(result, ranks=2)
    assert result["network"] == "a link of 1gbit each"
    for row in result["variants"]:
        assert 1.0 < row["nic_bytes"] / row["sent_bytes"] < 1.25, row["variant"]
    assert result["link_bits_per_second"] < 1.1e9
