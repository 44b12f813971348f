"""Without these, a run that hangs would hold its nodes until the time limit, and nobody would learn where it hung."""

from __future__ import annotations

import subprocess
import sys
import time

import pytest
from launching import ROOT

HANG = """
import ctypes, logging, time
logging.basicConfig()
from cyclebnn_dist.guards import watchdog
watchdog.GRACE_SECONDS = 1.0
dog = watchdog.Watchdog(1.0)
dog.saw("step 3")
def where_it_hangs():
    {hang}
where_it_hangs()
"""


@pytest.mark.parametrize(
    ("hang", "said"),
    [
        ("time.sleep(60)", "nothing was finished for 1 s (run.progress_timeout_seconds) since step 3"),
        ("ctypes.PyDLL(None).sleep(60)", "Timeout"),
    ],
    ids=["a wait", "a wait that lets no other thread run"],
)
def test_a_process_that_hangs_ends_and_says_where(hang, said):
    begun = time.monotonic()
    ended = subprocess.run(
        [sys.executable, "-c", HANG.format(hang=hang)], cwd=ROOT, capture_output=True, text=True, timeout=50
    )
    assert time.monotonic() - begun < 45
    assert ended.returncode == 1
    assert said in ended.stderr
    assert "in where_it_hangs" in ended.stderr


LIVE = """
import time
from cyclebnn_dist.guards.watchdog import Watchdog
dog, idle = Watchdog(1.0), Watchdog(0.0)
idle.saw("nothing")
for _ in dog.over(range(8), what="batch"):
    time.sleep(0.25)
dog.close()
time.sleep(1.5)
"""


def test_progress_and_the_end_of_the_watch_let_a_process_live():
    assert subprocess.run([sys.executable, "-c", LIVE], cwd=ROOT, timeout=50).returncode == 0
