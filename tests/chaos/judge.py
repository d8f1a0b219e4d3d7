from __future__ import annotations

from dataclasses import dataclass

from tests import proof
from tests.lab import LabError


@dataclass(frozen=True)
class Finding:
    kind: str
    subject: str
    what: str


def judge_now(lab, stack, guests):
    found = []
    for g in guests:
        try:
            if g.freeze_status() != "thawed":
                found.append(Finding("frozen", g.name, "frozen"))
        except LabError as e:
            found.append(Finding("frozen", g.name, str(e)))
    contents = {x["metadata"]["name"] for x in stack.all("vmsnapshotcontents.vmsnapshot.io")}
    if not contents:
        found += [Finding("leaked", x, x) for x in proof.leftovers(lab) if not x.startswith("object vmsnapshot.")]
    else:
        found += [Finding("leaked", x, x) for x in proof.leftovers(lab) if "journal" in x or "overlay" in x]
    return found


def judge_snapshot(lab, stack, name, namespace):
    body = stack.get(name, namespace)
    status = body.get("status") or {}
    if status.get("phase") != "Ready":
        return []
    content = stack.lab.kubectl(
        "get", "vmsnapshotcontents.vmsnapshot.io", f"vmsnapcontent-{body['metadata']['uid']}", "-o", "json"
    )
    import json

    into = lab.state / "judge"
    t = proof.read(lab, json.loads(content), into)
    if status.get("consistency") == "Filesystem" and not (t.one_instant and t.clean):
        return [Finding("lied", name, str(t))]
    if status.get("consistency") == "Crash" and not t.in_order:
        return [Finding("lied", name, str(t))]
    return []
