"""The exit statuses: how a run can end, in numbers that scripts and schedulers read. Needs no torch."""

FINISHED = 0
"""Trained to the end, or had been before."""

FAILED = 1
"""An error, a lost rank, too many skipped steps, a hang. What was saved stays; the log says more."""

REFUSED = 2
"""The recipe, the data or the run folder are not as they must be; the message says how to mend it."""

PREEMPTED = 75
"""SIGUSR2 or SIGTERM asked to stop, and everything is saved: the same command goes on. EX_TEMPFAIL of sysexits.h."""

INTERRUPTED = 130
"""Ctrl-C: everything is saved at the first, nothing more at the second. 128 + SIGINT, as in a shell."""
