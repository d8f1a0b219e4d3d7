"""What is done next about each overlay of a VM: commit, leave, remove, or keep for good, and why. Pure.

An overlay holds what the VM wrote since the switch, and is often the only place that does: it is removed only where it is
proven that the VM left it after a whole commit, or that nobody ever wrote to it. A base that changed while it had to stand
still is never committed onto: the result would be neither the one nor the other.

A VM that an I/O error has paused, as one does whose overlays have no room left, is brought back onto its disks as one that runs is:
it waits for that room, which nobody else gives.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

from vmsnapshot_operator.core.chains import Chains, DiskChain, Move, Overlaid, Ruling
from vmsnapshot_operator.core.journal import Journal, Phase


def judge(journal: Journal, seen: Overlaid) -> tuple[Ruling, ...]:
    """Return what is to be done about each overlay of this journal, in the order of their paths."""
    pairs = sorted(journal.overlays.items(), key=lambda p: p[1])
    return tuple(_one(journal, seen, volume, overlay) for volume, overlay in pairs)


def actionable(rulings: Sequence[Ruling]) -> bool:
    """Whether something can be done now: one overlay has a next step, or all have come to their end."""
    moves = {r.move for r in rulings}
    return bool(moves & {Move.COMMIT, Move.WATCH, Move.PIVOT, Move.REMOVE}) or moves <= {Move.KEEP, Move.GONE}


def may_go_on(seen: Overlaid, rulings: Sequence[Ruling]) -> bool:
    """Whether the VM stands still by an I/O error at a disk that had an overlay, and is on none of them any more.

    One that cannot write all the same is paused again, and nothing is lost. One that stays on an overlay that is kept would be, too,
    until somebody makes room there.
    """
    return seen.chains is not None and seen.chains.stalled and not any(r.target for r in rulings)


def told(rulings: Sequence[Ruling]) -> str:
    """What is under way or in the way, for people."""
    parts = []
    for ruling in rulings:
        if ruling.move in (Move.WAIT, Move.KEEP):
            parts.append(f"overlay {ruling.overlay}: {ruling.why}")
        elif ruling.total:
            parts.append(f"disk {ruling.target}: {ruling.done} of {ruling.total} bytes committed")
    return "; ".join(parts)


def stands(journal: Journal, seen: Overlaid) -> str:
    """Why the bases can not be said to have stood still since the switch; empty if they have."""
    for ruling in judge(journal, seen):
        if ruling.move is not Move.COMMIT:
            return f"overlay {ruling.overlay}: {ruling.why or ruling.move}"
        if not journal.bases.get(ruling.volume):
            return f"overlay {ruling.overlay}: what its base was like at the switch is not known"
    return "" if journal.phase is Phase.OVERLAID else "the overlays are being committed already"


_Rule = Callable[..., Ruling]


def _one(journal: Journal, seen: Overlaid, volume: str, overlay: str) -> Ruling:
    def rule(move: Move, why: str = "", target: str = "", done: int = 0, total: int = 0) -> Ruling:
        return Ruling(volume=volume, overlay=overlay, move=move, why=why, target=target, done=done, total=total)

    if seen.chains is None:
        if volume in seen.missing:
            return rule(Move.GONE)
        if volume in seen.pristine:
            return rule(Move.REMOVE, "nobody wrote to it")
        return rule(Move.KEEP, "the domain is gone, and what it wrote since the switch is in this file alone")
    disk = seen.chains.with_image(overlay)
    if disk is None:
        return _left(journal, seen, seen.chains, rule, volume)
    if not seen.chains.runs:
        why = f"the VM is {seen.chains.power}: its overlay is committed when it runs"
        return rule(Move.WAIT, why, disk.target)
    if disk.live[:1] != (overlay,):
        return rule(Move.WAIT, f"disk {disk.target} got another layer on top of it, by somebody else", disk.target)
    return _on_it(journal, seen, seen.chains, rule, volume, disk)


def _left(journal: Journal, seen: Overlaid, chains: Chains, rule: _Rule, volume: str) -> Ruling:
    """No disk has the overlay."""
    if volume in seen.missing:
        return rule(Move.GONE)
    if volume in journal.pivoted:
        return rule(Move.REMOVE, "it was committed")
    if volume in seen.pristine:
        return rule(Move.REMOVE, "nobody wrote to it")
    # That a commit was begun proves no whole one: a disk that was detached meanwhile has what was written in its overlay alone.
    if volume in journal.begun and volume in seen.on_base and _same_run(journal, chains):
        return rule(Move.REMOVE, "it was committed, and the VM went on without it")
    return rule(
        Move.KEEP,
        "the VM went on without it (it was redefined, or its disk replaced or detached): what was written to it is in this file alone",
    )


def _on_it(journal: Journal, seen: Overlaid, chains: Chains, rule: _Rule, volume: str, disk: DiskChain) -> Ruling:
    """The running VM writes to the overlay."""
    if volume not in journal.begun:  # whatever became of the other disks
        then, now = journal.bases.get(volume, ""), seen.fingerprints.get(volume, "")
        if then and not now:
            return rule(Move.WAIT, "whether its base has changed cannot be seen", disk.target)
        if then and then != now:
            return rule(Move.KEEP, f"its base has changed since the switch ({then}, now {now})", disk.target)
        if not then and not _same_run(journal, chains):
            return rule(
                Move.KEEP,
                "the VM was started anew, and what its base was like at the switch is not known",
                disk.target,
            )
    if disk.job is None:
        return rule(Move.COMMIT, target=disk.target)
    if not disk.job.commit:
        return rule(Move.WAIT, f"another block job runs on disk {disk.target}", disk.target)
    ready = Move.PIVOT if disk.job.ready else Move.WATCH
    return rule(ready, target=disk.target, done=disk.job.done_bytes, total=disk.job.total_bytes)


def _same_run(journal: Journal, chains: Chains) -> bool:
    return chains.runs and journal.run_id == chains.run_id
