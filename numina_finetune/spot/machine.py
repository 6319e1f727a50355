"""The life of a supervised run as one table: in this state, at this event, do this, and be in that state.

The same table stands in docs/spot.md; a test compares them.
"""

from __future__ import annotations

from enum import StrEnum


class State(StrEnum):
    ABSENT = "ABSENT"
    """No machine; the next is asked for when its time has come."""
    REQUESTED = "REQUESTED"
    PROVISIONING = "PROVISIONING"
    ACTIVE = "ACTIVE"
    """Given; its nodes are starting."""
    SETUP = "SETUP"
    RUNNING = "RUNNING"
    STOPPING = "STOPPING"
    """The training was asked to save and end."""
    REFUSED = "REFUSED"
    """This and the following: the machine is being deleted, and why."""
    PREEMPTED = "PREEMPTED"
    CRASHED = "CRASHED"
    STALLED = "STALLED"
    DONE = "DONE"
    FAILED = "FAILED"
    STOPPED = "STOPPED"
    ENDED = "ENDED"
    """Nothing is left in the cloud."""


class Event(StrEnum):
    DUE = "due"
    STOP = "stop"
    """The user asked for it."""
    LIMIT = "limit"
    """``--max-hours`` or ``--max-cost`` is reached."""
    REFUSED = "refused"
    """No stock, no quota, not offered there, or too long in the queue."""
    FORBIDDEN = "forbidden"
    """No target is left that this account may use."""
    PROVISIONING = "provisioning"
    ACTIVE = "active"
    READY = "ready"
    """Every node can be used."""
    LOST = "lost"
    """The machine, or one of its nodes, is gone, going, or not sound."""
    SET_UP = "set up"
    FINISHED = "finished"
    PREEMPTED = "preempted"
    CRASHED = "crashed"
    """For the first time on this machine."""
    CRASHED_AGAIN = "crashed again"
    STALLED = "stalled"
    HOPELESS = "hopeless"
    """A configuration error, the same step crashed twice, or a budget is spent."""
    SILENT = "silent"
    """After the request to stop: every worker has ended, or its time is over."""
    GONE = "gone"


class Action(StrEnum):
    """Side effects. Each may be repeated without harm: a supervisor that died may have carried it out or not."""

    NONE = "-"
    REQUEST = "request"
    """Delete what else carries the run's prefix, then create."""
    SHIP = "ship"
    """Clear leftovers, copy code, start the set-up."""
    START = "start"
    """Start the training on every worker."""
    INTERRUPT = "interrupt"
    """Ask the training to save and end."""
    DELETE = "delete"
    SWEEP = "sweep"
    """Delete whatever carries the run's prefix, in every zone."""


Row = tuple[State, Event, Action, State]

_S, _E, _A = State, Event, Action
_HELD = (_S.REQUESTED, _S.PROVISIONING, _S.ACTIVE, _S.SETUP)
_AGAIN = (_S.REFUSED, _S.PREEMPTED, _S.CRASHED, _S.STALLED)
_FINAL = (_S.DONE, _S.FAILED, _S.STOPPED)

ROWS: tuple[Row, ...] = (
    (_S.ABSENT, _E.DUE, _A.REQUEST, _S.REQUESTED),
    (_S.REQUESTED, _E.PROVISIONING, _A.NONE, _S.PROVISIONING),
    (_S.REQUESTED, _E.ACTIVE, _A.NONE, _S.ACTIVE),
    (_S.PROVISIONING, _E.ACTIVE, _A.NONE, _S.ACTIVE),
    (_S.ACTIVE, _E.READY, _A.SHIP, _S.SETUP),
    (_S.SETUP, _E.SET_UP, _A.START, _S.RUNNING),
    (_S.RUNNING, _E.FINISHED, _A.DELETE, _S.DONE),
    (_S.RUNNING, _E.PREEMPTED, _A.DELETE, _S.PREEMPTED),
    (_S.RUNNING, _E.STALLED, _A.DELETE, _S.STALLED),
    *((state, _E.CRASHED, _A.SHIP, _S.SETUP) for state in (_S.SETUP, _S.RUNNING)),
    *((state, _E.CRASHED_AGAIN, _A.DELETE, _S.CRASHED) for state in (_S.SETUP, _S.RUNNING)),
    *((state, _E.HOPELESS, _A.DELETE, _S.FAILED) for state in (_S.SETUP, _S.RUNNING)),
    *((state, _E.REFUSED, _A.DELETE, _S.REFUSED) for state in (_S.REQUESTED, _S.PROVISIONING)),
    *((state, _E.FORBIDDEN, _A.DELETE, _S.FAILED) for state in (_S.REQUESTED, _S.PROVISIONING)),
    *((state, _E.LOST, _A.DELETE, _S.PREEMPTED) for state in (*_HELD, _S.RUNNING)),
    *((state, _E.STOP, _A.DELETE, _S.STOPPED) for state in _HELD),
    *((state, _E.LIMIT, _A.DELETE, _S.STOPPED) for state in _HELD),
    *((_S.RUNNING, event, _A.INTERRUPT, _S.STOPPING) for event in (_E.STOP, _E.LIMIT)),
    (_S.RUNNING, _E.SILENT, _A.DELETE, _S.STOPPED),
    (_S.STOPPING, _E.FINISHED, _A.DELETE, _S.DONE),
    (_S.STOPPING, _E.SILENT, _A.DELETE, _S.STOPPED),
    (_S.STOPPING, _E.LOST, _A.DELETE, _S.STOPPED),
    *((state, event, _A.NONE, _S.STOPPED) for state in (_S.ABSENT, *_AGAIN) for event in (_E.STOP, _E.LIMIT)),
    *((state, _E.GONE, _A.NONE, _S.ABSENT) for state in _AGAIN),
    *((state, _E.GONE, _A.SWEEP, _S.ENDED) for state in _FINAL),
)

TABLE: dict[tuple[State, Event], tuple[Action, State]] = {
    (state, event): (action, following) for state, event, action, following in ROWS
}


def as_markdown() -> str:
    """The table as docs/spot.md holds it, states with the same answer to an event in one line."""
    merged: dict[tuple[Event, Action, State], list[State]] = {}
    for state, event, action, following in ROWS:
        merged.setdefault((event, action, following), []).append(state)
    lines = [
        f"| {', '.join(states)} | {event} | {action} | {following} |"
        for (event, action, following), states in merged.items()
    ]
    return "\n".join(["| state | event | action | next state |", "|---|---|---|---|", *lines])
