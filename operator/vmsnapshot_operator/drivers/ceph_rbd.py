"""Driver `ceph-rbd`: snapshots of RBD images; several images by one group snapshot, a single one by a plain snapshot.

Facts it rests on, seen on Ceph 16.2 (docs/decisions/0003-ceph-groups.md has the measurements):

- An image can be a member of one group only. Membership is needed while the group snapshot is made, not afterwards: an
  image taken out of the group keeps its part, and rollback and removal of the group snapshot still work, in any order.
  Hence one group per request, filled by `prepare` and emptied by `wait_ready`: snapshots of different sets of images,
  with images in common, stand side by side.
- A group snapshot is one instant because the snapshotting client takes the exclusive lock of every image. Without that
  feature it is not, and is refused. A client that dies in the middle holds the locks until the watch timeout of the OSDs
  (30 s by default), and the guest's writes wait: `delete` fences such a client off.
- A plain snapshot of an image that a guest uses is made by the guest's own client on request, without taking its lock: two
  thirds of the time. It may thus still appear after the process that asked for it was killed: `delete` waits for it.
- Whoever takes a lock whose owner is not seen by the OSDs puts the owner on the blocklist, and a VM that only was out of
  reach for a while has lost its disk. Hence cuts are made by a client that may not, and fail instead.

Held under a request name N: the group `N` with the group snapshot `N`, or on one image the plain snapshot `N`; and groups
without members that are nothing but records, so that `list` and `delete` need not open every image of the pool: `N.i-<image
id>` (a plain snapshot of that image) and `N.c-<address in hex>` (the client that may die while it holds locks).

A handle is `<pool>/[<namespace>/]<image>@N`: the plain snapshot N of that image, or else the image's part of the group
snapshot N of the group N, to be opened by its id (`ceph_snapshots.snapshot_id`): it is known without asking the cluster while
a guest is frozen. The group's handle is `<pool>/[<namespace>/]N@N`.
"""

from __future__ import annotations

import contextlib
import errno
import threading
import time
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

from pydantic import BaseModel, ConfigDict, Field, SecretStr, field_validator
from pydantic.alias_generators import to_camel

from vmsnapshot_operator.core import names
from vmsnapshot_operator.core.driver import Capabilities, CutKind, CutResult, Fit, Progress, SnapshotRequest
from vmsnapshot_operator.core.volumes import Handle, Layer, SourceKind, Volume, VolumeId
from vmsnapshot_operator.drivers import ceph_cluster, ceph_restore, ceph_snapshots, probes
from vmsnapshot_operator.drivers.ceph_cluster import told
from vmsnapshot_operator.errors import DriverError, DriverUnavailableError

STALE_SECONDS = 20.0
"""So long the owner of a lock may be out of the OSDs' sight before a deletion takes its lock: one that only lost its
connection is back within a second."""


_DENIED = frozenset({errno.EPERM, errno.EACCES, errno.EROFS})
"""What librbd answers where it would have to shut another client out and may not; EROFS is its word for "not my lock"."""


class CephRbdParameters(BaseModel):
    """Where the images are. Durations in seconds."""

    model_config = ConfigDict(frozen=True, alias_generator=to_camel, validate_by_name=True, validate_by_alias=True)

    mon_hosts: str = Field(min_length=1, description="addresses of the monitors, separated by commas")
    pool: str = Field(min_length=1, pattern=r"^[^/@]+$")
    namespace: str = Field(default="", pattern=r"^[^/@]*$")
    client_name: str = Field(default="admin", pattern=r"^[A-Za-z0-9_.-]+$", description="cephx user, without `client.`")
    connect_timeout_seconds: int = Field(default=5, ge=1, le=120)
    operation_timeout_seconds: int = Field(default=30, ge=1, le=600)
    allow_disks_without_hosts: bool = Field(
        default=False,
        description="serve disks that name no monitor: their hypervisor's own file decides on the cluster",
    )

    @field_validator("mon_hosts")
    @classmethod
    def _readable(cls, value: str) -> str:
        if not ceph_cluster.addresses(value):
            raise ValueError("has no address of a monitor in it")
        return value

    @field_validator("client_name")
    @classmethod
    def _bare(cls, value: str) -> str:
        return value.removeprefix("client.")


class CephRbdCredentials(BaseModel):
    """The cephx key of `clientName`."""

    model_config = ConfigDict(frozen=True)

    key: SecretStr


class CephRbdDriver:
    """See the module. Connects on first use; one connection for the life of the process."""

    Parameters = CephRbdParameters
    Credentials = CephRbdCredentials

    def __init__(self, parameters: CephRbdParameters, credentials: CephRbdCredentials) -> None:
        self._parameters = parameters
        self._key = credentials.key
        self._lock = threading.Lock()
        self._connected: dict[bool, tuple[Any, Any]] = {}
        self._warm: dict[str, Any] = {}
        self._work: ceph_restore.Work | None = None
        self._locked_out: dict[str, float] = {}

    # ---------------------------------------------------------------- the contract

    def capabilities(self) -> Capabilities:
        """Take, roll back to and remove a group snapshot of a tiny image of our own: versions promise more than permissions give."""
        name = probes.new_name()
        with self._pool() as (rbd, io), told(f"probing the pool {self._place} with an image and a group {name}"):
            features = rbd.RBD_FEATURE_LAYERING | rbd.RBD_FEATURE_EXCLUSIVE_LOCK
            self._sweep_probes(rbd, io)
            rbd.RBD().create(io, name, 4 << 20, features=features, old_format=False)
            try:
                ceph_snapshots.prepare_group(rbd, io, name, [name], self._address)
                ceph_snapshots.cut_group(rbd, io, name, [name])
                rbd.Group(io, name).rollback_to_snap(name)
            finally:
                self._remove_probe(rbd, io, name)
        return Capabilities(cut=CutKind.INSTANT, atomic=True, revert=True, clone=True)

    def can_handle(self, volumes: Sequence[Volume]) -> Fit:
        """Look whether each image is in our pool and cluster, has the exclusive lock, and is in nobody else's group."""
        for volume in volumes:
            refusal = self._misplaced(volume)
            if refusal is not None:
                return refusal
        with self._pool() as (rbd, io):
            for volume in volumes:
                image = _image_of(volume.writable.source)
                with told(f"looking at the image {self._place}/{image}"):
                    refusal = _unfit(rbd, io, image)
                if refusal is not None:
                    return refusal
        return Fit(ok=True, reason="Fits", message=f"RBD images in {self._place}")

    def prepare(self, request: SnapshotRequest) -> None:
        """Open the single image, or make the group and fill it."""
        self.rest()
        images = [_image_of(v.writable.source) for v in request.volumes]
        with self._pool() as (rbd, io), told(f"preparing {request.name} of {', '.join(images)}"):
            if len(images) > 1:
                ceph_snapshots.prepare_group(rbd, io, request.name, images, self._address)
                self._warm[request.name] = None
                return
            image = rbd.Image(io, images[0])
            self._warm[request.name] = image
            ceph_snapshots.prepare_single(rbd, io, request.name, image, self._address)

    def cut(self, request: SnapshotRequest) -> CutResult:
        """Make the snapshot. What `prepare` opened in this process is used."""
        if request.name not in self._warm:
            self.prepare(request)
        images = [_image_of(v.writable.source) for v in request.volumes]
        group = None
        with self._pool() as (rbd, io), _taking_locks(f"snapshot {request.name} of {', '.join(images)}"):
            try:
                if len(images) > 1:
                    ceph_snapshots.cut_group(rbd, io, request.name, images)
                    group = Handle(f"{self._place}/{request.name}@{request.name}")
                else:
                    ceph_snapshots.cut_single(rbd, request.name, self._warm[request.name])
            except Exception:
                # `delete` puts whom it finds recorded on the blocklist: this process must not go on under that address, perhaps
                # with another VM's snapshot.
                self._disconnect()
                raise
        handles = {
            v.id: Handle(f"{self._place}/{i}@{request.name}") for v, i in zip(request.volumes, images, strict=True)
        }
        return CutResult(handles=handles, atomic=True, group=group)

    def wait_ready(self, request: SnapshotRequest, cut: CutResult) -> None:
        """See that every image has its snapshot, and let the images go from the group: others may need them."""
        with self._pool() as (rbd, io):
            for handle in cut.handles.values():
                with told(f"looking for the snapshot {handle}"), ceph_restore.opened_at(rbd, io, _source(handle)):
                    pass
            with told(f"completing {request.name}"):
                ceph_snapshots.finish(rbd, io, request.name, is_group=cut.group is not None)

    def check_revert(self, cut: CutResult, onto: Sequence[Volume]) -> Sequence[Fit]:
        """Say for each image whether it is there, unused, of the old size, and has its snapshot."""
        with self._pool() as (rbd, io), told("looking at images and snapshots"):
            return [self._revertible(rbd, io, cut, volume) for volume in onto]

    def revert(self, cut: CutResult, onto: Sequence[Volume]) -> None:
        """Roll the images back; refused while a client has one open, since Ceph itself would not refuse."""
        # A user may go away again, as who mapped the image to look at it; the other reasons stay.
        refused = sorted((f for f in self.check_revert(cut, onto) if not f.ok), key=lambda f: f.reason == "InUse")
        if refused:
            raise DriverError(refused[0].message, reason=refused[0].reason, retryable=refused[0].reason == "InUse")
        sources = [_source(cut.handles[v.id]) for v in onto]
        is_whole = {v.id for v in onto} == set(cut.handles)
        doing = told(f"rolling back to {', '.join(cut.handles[v.id] for v in onto)}")
        with self._pool() as (rbd, io), doing, self._at_work(sources[0].name) as (work, fence):
            for source in sources:
                with rbd.Image(io, source.image, read_only=True) as image:
                    fence(image)
            is_group = cut.group is not None
            ceph_restore.roll_back(rbd, io, sources, is_group=is_group, is_whole=is_whole, work=work)

    def clone(self, cut: CutResult, name: str) -> Mapping[VolumeId, Layer]:
        """Make a new image `<name>-<member>` of each snapshot. Repeatable: an image has that name only when it is whole."""
        hosts = tuple(f"{h}:{p}" if p else h for h, p in ceph_cluster.addresses(self._parameters.mon_hosts))
        targets = {v: f"{name}-{names.member(v)}" for v in cut.handles}
        sources = {target: _source(cut.handles[v]) for v, target in targets.items()}
        with self._pool() as (rbd, io), told(f"cloning {', '.join(cut.handles.values())} to {name}"):
            ceph_restore.begin_clone(rbd, io, name, list(sources))
            with self._at_work(name) as (work, fence):
                ceph_restore.clone(rbd, io, sources, fence, work)
        return {
            volume: Layer(
                kind=SourceKind.NETWORK,
                protocol="rbd",
                source=f"{self._place}/{target}",
                format="raw",
                pool=self._parameters.pool,
                hosts=hosts,
            )
            for volume, target in targets.items()
        }

    def keep(self, name: str) -> None:
        """Take away what leads from a clone's name to its images."""
        with self._pool() as (rbd, io), told(f"handing over {name}"):
            ceph_restore.keep(rbd, io, name)

    def progress(self) -> Progress | None:
        """Say how many bytes are copied. None while nothing new is: also in a rollback, of which Ceph says nothing."""
        work = self._work
        if work is None or not work.total or work.done == work.told:
            return None
        work.told = work.done
        return Progress(done_bytes=min(work.done, work.total), total_bytes=work.total)

    def delete(self, name: str) -> None:
        """Remove everything under a name, also what was left half made."""
        self.rest()
        since = self._locked_out.get(name, time.monotonic())
        stale = time.monotonic() - since >= STALE_SECONDS
        try:
            with self._pool() as (rbd, io), _taking_locks(f"deleting {name}"):
                ceph_restore.delete_clones(rbd, io, name, self._taking_from_dead(rbd, io, name))
                ceph_snapshots.delete(rbd, io, name, self._fence, stale=stale)
        except DriverError as error:
            if _is_denied(error):
                self._locked_out[name] = since
            raise
        self._locked_out.pop(name, None)

    def _fence(self, clients: Collection[str]) -> tuple[Any, Collection[str]]:
        dead = set(clients) - self._addresses
        if not dead:
            return None, ()
        cluster, io = self._connect(breaks=True)
        try:
            for client in dead:
                cluster.blocklist_add(client, ceph_snapshots.FENCE_SECONDS)
        except ceph_cluster.binding("rados").PermissionDeniedError:
            return None, ()  # a guest waits for the watch timeout
        return io, dead

    def _taking_from_dead(self, rbd: Any, io: Any, name: str) -> Callable[[Any], None]:
        """What takes an open image, which no VM uses, from clients of ours that were killed at this request, and from those out of sight."""
        ours = ceph_snapshots.recorded(rbd, io, name)
        return lambda image: ceph_snapshots.take_from_dead(rbd, image, ours, self._fence, stale=True)

    def list(self, prefix: str) -> Sequence[str]:
        """Name the requests by their groups and records."""
        with self._pool() as (rbd, io), told(f"listing the groups of {self._place}"):
            return [n for n in ceph_snapshots.held(rbd, io, prefix) if not probes.is_probe(n)]

    def missing(self, cuts: Sequence[CutResult]) -> Sequence[Handle]:
        """Look for each snapshot at its image: the record of a request stays when somebody removes the snapshot alone."""
        asked: dict[str, list[Handle]] = {}
        for handle in (h for cut in cuts for h in cut.handles.values()):
            asked.setdefault(_source(handle).image, []).append(handle)
        gone: list[Handle] = []
        with self._pool() as (rbd, io), told(f"looking for snapshots of {self._place}"):
            for image, handles in asked.items():
                there = ceph_snapshots.requests_of(rbd, io, image)
                gone += [h for h in handles if _source(h).name not in there]
        return gone

    def rest(self) -> None:
        """Close what `prepare` opened: with a watcher on it, nobody can remove an image or roll it back."""
        for opened in self._warm.values():
            if opened is not None:
                with contextlib.suppress(Exception):  # its connection may be gone, and the watcher with it
                    opened.close()
        self._warm.clear()

    # ---------------------------------------------------------------- what an image must be

    def _misplaced(self, volume: Volume) -> Fit | None:
        layer, given = volume.writable, self._parameters
        if layer.kind is not SourceKind.NETWORK or layer.protocol != "rbd":
            return Fit(ok=False, reason="NotRbd", message=f"{layer.source} is not an RBD image")
        place, _, image = layer.source.rpartition("/")
        if place != self._place or not image:
            return Fit(ok=False, reason="OtherPool", message=f"{layer.source} is not in {self._place}")
        if not layer.hosts:
            if given.allow_disks_without_hosts:
                return None
            text = f"{layer.source} names no monitor in its domain, so its cluster is unknown (allowDisksWithoutHosts)"
            return Fit(ok=False, reason="UnknownCluster", message=text)
        disk = [a for h in layer.hosts for a in ceph_cluster.addresses(h)]
        if ceph_cluster.same_monitor(disk, ceph_cluster.addresses(given.mon_hosts)):
            return None
        with told("asking the cluster for its monitors"):
            known = ceph_cluster.monitors_of(self._connect()[0])
        if ceph_cluster.same_monitor(disk, known):
            return None
        text = f"{layer.source} is on the monitors {', '.join(layer.hosts)}, this class on {given.mon_hosts}"
        return Fit(ok=False, reason="OtherCluster", message=text)

    def _revertible(self, rbd: Any, io: Any, cut: CutResult, volume: Volume) -> Fit:
        handle = cut.handles.get(volume.id)
        if handle is None or volume.writable.source != handle.rpartition("@")[0]:
            text = f"{volume.writable.source} is not what was cut ({handle or 'nothing'})"
            return Fit(ok=False, reason="OtherVolume", message=text)
        source = _source(handle)
        ours = frozenset(ceph_snapshots.recorded(rbd, io, source.name) | self._addresses)
        refusal = ceph_restore.refusal(rbd, io, source, ours)
        if refusal is not None:
            return Fit(ok=False, reason=refusal[0], message=refusal[1])
        return Fit(ok=True, reason="Fits")

    @contextmanager
    def _at_work(self, name: str) -> Iterator[tuple[ceph_restore.Work, Callable[[Any], None]]]:
        """Record this client for a request while it has images open; give what fences earlier ones that were killed."""
        io = self._connect()[1]
        rbd = ceph_cluster.binding("rbd")
        with told(f"recording who works on {name}"):
            fence = self._taking_from_dead(rbd, io, name)
            ceph_snapshots.record_client(rbd, io, name, self._address)
        self._work = ceph_restore.Work()
        try:
            yield self._work, fence
        finally:
            self._work = None
        with told(f"completing {name}"):
            ceph_snapshots.forget_clients(rbd, io, name)

    # ---------------------------------------------------------------- the connection

    @property
    def _place(self) -> str:
        parameters = self._parameters
        return f"{parameters.pool}/{parameters.namespace}" if parameters.namespace else parameters.pool

    @property
    def _address(self) -> str:
        return str(self._connect()[0].get_addrs()).partition(",")[0]

    @property
    def _addresses(self) -> set[str]:
        return {a for cluster, _ in self._connected.values() for a in str(cluster.get_addrs()).split(",")}

    @contextmanager
    def _pool(self) -> Iterator[tuple[Any, Any]]:
        """Give the module `rbd` and the pool; a connection that the cluster fenced off is not used again."""
        io = self._connect()[1]
        try:
            yield ceph_cluster.binding("rbd"), io
        except DriverUnavailableError as error:
            if ceph_cluster.number_of(error.__cause__ or error) in ceph_cluster.FENCED:
                self._disconnect()
                self._warm.clear()
            raise

    def _disconnect(self) -> None:
        """Have the next use connect anew, under another address."""
        self._connected.clear()

    def _connect(self, *, breaks: bool = False) -> tuple[Any, Any]:
        """`breaks`: a connection for nothing but breaking locks of clients that were put on the blocklist before."""
        with self._lock:
            if breaks not in self._connected:
                given = self._parameters
                settings = {
                    "mon_host": given.mon_hosts,
                    "client_mount_timeout": str(given.connect_timeout_seconds),
                    "rados_mon_op_timeout": str(given.operation_timeout_seconds),
                    "rados_osd_op_timeout": str(given.operation_timeout_seconds),
                    "rbd_default_clone_format": "2",  # else a snapshot must be protected, and cannot go before its clones
                    "log_file": "",  # else librados tries to write below /var/log
                    "rbd_blocklist_on_break_lock": "false" if breaks else "true",
                }
                cluster = ceph_cluster.connect(given.client_name, settings, self._key.get_secret_value())
                try:
                    with told(f"opening the pool {given.pool}"):
                        io = cluster.open_ioctx(given.pool)
                        io.set_namespace(given.namespace)
                except BaseException:
                    cluster.shutdown()
                    raise
                self._connected[breaks] = (cluster, io)
            return self._connected[breaks]

    def _sweep_probes(self, rbd: Any, io: Any) -> None:
        for image in rbd.RBD().list(io):
            if probes.is_stale(image):
                self._remove_probe(rbd, io, image)

    def _remove_probe(self, rbd: Any, io: Any, name: str) -> None:
        ceph_snapshots.delete(
            rbd, io, name, lambda _: (None, ()), stale=False
        )  # nobody has a lock on a probe's image for long
        with contextlib.suppress(rbd.ImageNotFound):
            rbd.RBD().remove(io, name)


@contextmanager
def _taking_locks(doing: str) -> Iterator[None]:
    """Like `told`, where an image's lock may be needed that its owner does not give."""
    try:
        with told(doing):
            yield
    except DriverError as error:
        if not _is_denied(error):
            raise
        text = (
            f"{doing}: Ceph denies it: the client that holds the image's lock is out of the OSDs' sight, and is not shut out of its "
            "disk while it may come back (or the cephx user lacks `profile rbd` for the pool)"
        )
        raise DriverError(text, reason="LockNotGiven", retryable=True) from error.__cause__


def _is_denied(error: DriverError) -> bool:
    return ceph_cluster.number_of(error.__cause__ or error) in _DENIED


def _unfit(rbd: Any, io: Any, image: str) -> Fit | None:
    try:
        with rbd.Image(io, image, read_only=True) as opened:
            exclusive = opened.features() & rbd.RBD_FEATURE_EXCLUSIVE_LOCK
            holder = ceph_snapshots.holder_of(opened, io)
    except rbd.ImageNotFound:
        return Fit(ok=False, reason="ImageNotFound", message=f"there is no image {image}")
    if not exclusive:
        text = f"{image} lacks the feature exclusive-lock, without which a snapshot is not one instant"
        return Fit(ok=False, reason="NoExclusiveLock", message=text)
    # Groups of ours are emptied as soon as the cut is ready; `prepare` takes the image over, or says why not.
    if holder is not None and names.attempt_of(holder) is None:
        text = f'{image} is in the group "{holder}"; an image can be in one group only'
        return Fit(ok=False, reason="InGroup", message=text)
    return None


def _image_of(source: str) -> str:
    return source.rpartition("/")[2]


def _source(handle: str) -> ceph_restore.Source:
    """Return the image (or group) and the snapshot's name in a handle."""
    source, _, name = handle.rpartition("@")
    return ceph_restore.Source(_image_of(source), name)
