"""What a cluster that a search starts for itself opens to others."""

import ipaddress
import subprocess
import sys

import pytest

from attune.tools.runtime.setup import ROOT

LISTENING = """
import sys
sys.path.insert(0, {tests!r})
import conftest
conftest.load_pack()
import psutil
from attune.hunt.cluster import Cluster
cluster = Cluster("local", "module:function", {{}}, 1, 0)
cluster.ray.get(cluster.ray.remote(num_cpus=0.1)(lambda: None).remote())  # a worker is there
me = psutil.Process()
for process in [me, *me.children(recursive=True)]:
    for connection in process.net_connections("inet"):
        if connection.status == psutil.CONN_LISTEN:
            print("listens", connection.laddr.ip)
cluster.close()
"""


def test_a_cluster_of_its_own_listens_on_this_machine_only():
    pytest.importorskip("ray", reason="ray has no build for this Python")
    script = LISTENING.format(tests=str(ROOT / "tests"))
    ended = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True)
    assert ended.returncode == 0, ended.stderr
    found = [ipaddress.ip_address(line.split()[1]) for line in ended.stdout.splitlines() if line.startswith("listens")]
    found = [getattr(one, "ipv4_mapped", None) or one for one in found]
    assert len(found) > 2 and all(one.is_loopback for one in found), found
