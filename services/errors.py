"""Every error that decides what happens next, as one tree.

    ScopeError
    ├── BadItem             ends an item: it goes to `dead`, with the message as its reason
    │   └── WireError       bytes that are not what was sent
    ├── Unavailable         makes an item wait: a dependency is down, which is no item's fault
    ├── WorkerDied          ends a worker, which is replaced; what it held is given back
    │   └── EngineDied      its engine has lost its processes
    ├── WorkerFailed        ends a worker for good, and the run with it
    │   └── PatienceExceeded
    └── RunFailed           ends a run

Rooms derive their own kinds from these, and the `scope` command ends with the message of any. Any
other exception is a fault of the code: the item is given back with the traceback, and is given up
after `stage.max_deliveries`.
"""

from __future__ import annotations


class ScopeError(Exception):
    """Base of all; its message is one sentence for people."""


class BadItem(ScopeError, ValueError):
    """This item can never be processed; the message becomes its reason in `dead`."""


class WireError(BadItem):
    """Bytes that are not an intact message of the expected kind; the message says why."""


class Unavailable(ScopeError, RuntimeError):
    """A dependency cannot be reached or answers with errors. It says which, and what it said."""


class WorkerDied(ScopeError, RuntimeError):
    """This worker cannot go on, and another in its place can: it is replaced."""


class EngineDied(WorkerDied):
    """The engine's own processes are gone, and no patience brings them back."""


class WorkerFailed(ScopeError, RuntimeError):
    """A worker stopped for good; the message says why, and ends the run."""


class PatienceExceeded(WorkerFailed):
    """A dependency stayed unavailable for longer than the configured patience."""


class RunFailed(ScopeError, RuntimeError):
    """The run stopped; the message says what broke and how to go on."""
