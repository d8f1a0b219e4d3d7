"""Who may snapshot which domain. A refusal here reads exactly like a domain that is not there."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from fnmatch import fnmatchcase

from vmsnapshot_operator.core.planning import Refusal


@dataclass(frozen=True, slots=True, kw_only=True)
class Requirement:
    """One expression of a label selector, in Kubernetes's words."""

    key: str
    operator: str
    values: tuple[str, ...] = ()

    def holds(self, labels: Mapping[str, str]) -> bool:
        """Tell whether the labels meet it; an operator that is not known meets nothing."""
        value = labels.get(self.key)
        match self.operator:
            case "In":
                return value is not None and value in self.values
            case "NotIn":
                return value is None or value not in self.values
            case "Exists":
                return value is not None
            case "DoesNotExist":
                return value is None
            case _:
                return False


@dataclass(frozen=True, slots=True, kw_only=True)
class AccessRule:
    """Namespaces by labels, domains by glob on their names."""

    namespace: tuple[Requirement, ...]
    domains: tuple[str, ...]


def may_use(rules: Iterable[AccessRule], namespace_labels: Mapping[str, str], domain_name: str) -> bool:
    """Tell whether a namespace with these labels may use the domain of this name. No rules: nobody may."""
    return any(
        all(r.holds(namespace_labels) for r in rule.namespace)
        and any(fnmatchcase(domain_name, g) for g in rule.domains)
        for rule in rules
    )


def not_found(domain: str, hypervisor: str, namespace: str) -> Refusal:
    """Return the one answer for a domain that is not there and for one that the namespace may not use."""
    return Refusal(
        reason="DomainNotFound",
        message=(
            f'hypervisor "{hypervisor}" has no domain "{domain}" that namespace "{namespace}" may snapshot; check the name,'
            " or ask the administrator of the hypervisor for access (spec.access)"
        ),
    )
