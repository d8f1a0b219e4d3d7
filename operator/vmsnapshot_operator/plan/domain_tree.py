"""A domain's definition as a tree that can be changed and written again, everything else in it left as it was.

Prefixes of namespaces stay as they are spelled, so that what others keep in the metadata remains theirs. Not what is changed
(`definition`, `new_definition`).
"""

from __future__ import annotations

import xml.etree.ElementTree as ET
from collections.abc import Iterator
from xml.parsers import expat

from vmsnapshot_operator.errors import RefusedError

LIMIT = 4 * 1024 * 1024
"""Characters: libvirt itself sends no longer definition."""

DEPTH = 256
"""Elements within elements: a chain of disks nests one for each layer, and nothing else comes near."""


def refusal(message: str) -> RefusedError:
    """Return the error for a definition that cannot be worked with."""
    return RefusedError(message, reason="DefinitionUnusable")


def parse(text: str) -> ET.Element:
    """Return the root of a domain's definition; raises RefusedError for anything else, a document type included."""
    if len(text) > LIMIT:
        raise refusal(f"the VM's definition has {len(text)} characters; libvirt sends {LIMIT} at most")
    builder = ET.TreeBuilder()
    depth = 0

    def start(tag: str, attributes: dict[str, str]) -> None:
        nonlocal depth
        depth += 1
        if depth > DEPTH:
            raise refusal(f"the VM's definition has more than {DEPTH} elements within each other")
        builder.start(tag, attributes)

    def end(tag: str) -> None:
        nonlocal depth
        depth -= 1
        builder.end(tag)

    # Without a namespace separator expat leaves prefixes alone.
    parser = expat.ParserCreate()
    parser.StartElementHandler = start
    parser.EndElementHandler = end
    parser.CharacterDataHandler = builder.data
    parser.StartDoctypeDeclHandler = _no_doctype
    try:
        parser.Parse(text, True)
        root = builder.close()
    except (expat.ExpatError, UnicodeError) as error:
        raise refusal(f"the VM's definition cannot be read: {error}") from error
    if root.tag != "domain":
        raise refusal(f"this is no VM's definition: its root is <{root.tag[:64]}>")
    return root


def _no_doctype(*_: object) -> None:
    raise refusal("the VM's definition has a document type, which libvirt never writes: it is not used")


def text_of(root: ET.Element) -> str:
    """Return a tree as text."""
    return ET.tostring(root, encoding="unicode")


def copy_of(element: ET.Element) -> ET.Element:
    """Return a copy that shares nothing, without the text after its end."""
    made = ET.Element(element.tag, dict(element.attrib))
    made.text = element.text
    for child in element:
        inner = copy_of(child)
        inner.tail = child.tail
        made.append(inner)
    return made


def required(root: ET.Element, path: str) -> ET.Element:
    """Return the one element at a path; raises RefusedError if there is none, or more than one."""
    found = root.findall(path)
    if len(found) != 1:
        raise refusal(f"the VM's definition has {len(found)} elements {path}: one was expected")
    return found[0]


def devices(root: ET.Element) -> ET.Element:
    """Return the devices; raises RefusedError."""
    return required(root, "devices")


def disks(root: ET.Element) -> dict[str, ET.Element]:
    """Return all disks by target; raises RefusedError for one without a target, or two of the same."""
    found: dict[str, ET.Element] = {}
    for disk in devices(root).findall("disk"):
        target = required(disk, "target").get("dev", "")
        if not target or target in found:
            raise refusal(f"the VM's definition has two disks, or none, of the target {target!r}")
        found[target] = disk
    return found


def replace(parent: ET.Element, old: ET.Element, new: ET.Element) -> None:
    """Put one child in the place of another."""
    new.tail = old.tail
    parent[list(parent).index(old)] = new


def discard(parent: ET.Element, *tags: str) -> None:
    """Take the children of these names out."""
    for child in [c for c in parent if c.tag in tags]:
        parent.remove(child)


def set_child(parent: ET.Element, tag: str, text: str) -> None:
    """Give a child this text; it is made if there is none."""
    child = parent.find(tag)
    if child is None:
        child = ET.SubElement(parent, tag)
    child.text = text


# --- metadata ------------------------------------------------------------------------------------------------------------


def own(root: ET.Element, namespace: str) -> list[ET.Element]:
    """Return the elements of the metadata that are of this namespace."""
    return [element for found, element in _of_namespaces(root) if found == namespace]


def drop_own(root: ET.Element, *namespaces: str) -> None:
    """Take the elements of these namespaces out of the metadata, and the metadata if nothing is left in it."""
    metadata = root.find("metadata")
    if metadata is None:
        return
    for namespace, element in list(_of_namespaces(root)):
        if namespace in namespaces:
            metadata.remove(element)
    if not len(metadata):
        root.remove(metadata)


def add_own(root: ET.Element, element: ET.Element) -> None:
    """Put an element that declares its own namespace into the metadata."""
    metadata = root.find("metadata")
    if metadata is None:
        metadata = ET.Element("metadata")
        # libvirt takes it anywhere and writes it behind the names.
        root.insert(1 if len(root) else 0, metadata)
    metadata.append(element)


def _of_namespaces(root: ET.Element) -> Iterator[tuple[str, ET.Element]]:
    for metadata in root.findall("metadata"):
        for element in metadata:
            prefix, colon, _ = element.tag.partition(":")
            key = f"xmlns:{prefix}" if colon else "xmlns"
            for scope in (element, metadata, root):
                if key in scope.attrib:
                    yield scope.attrib[key], element
                    break
