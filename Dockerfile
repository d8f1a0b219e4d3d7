# The operator and its guardian. Builds with BuildKit and with buildah:
#   docker build -t vmsnapshot-operator:0.1.0 .
#
# BASE needs Debian 12 and Python 3.11 with venv: Ceph's bindings are Debian's, built for that Python, and on no package index.
ARG BASE=python:3.11-slim-bookworm

# --- everything that needs a compiler or pip --------------------------------------------------------------------------
FROM ${BASE} AS build
ENV PIP_NO_CACHE_DIR=1 PIP_DISABLE_PIP_VERSION_CHECK=1 PIP_ROOT_USER_ACTION=ignore
RUN apt-get update \
 && DEBIAN_FRONTEND=noninteractive apt-get install -y --no-install-recommends gcc libc6-dev libvirt-dev pkg-config python3-dev \
 && rm -rf /var/lib/apt/lists/*
WORKDIR /src

# Dependencies first, in a layer of their own: they change seldom. A pip.conf for another index can be given as a secret.
COPY pyproject.toml constraints.txt ./
RUN --mount=type=secret,id=pipconf,target=/etc/pip.conf \
    python3 -m venv /opt/venv \
 && python3 -c 'import tomllib; print(*tomllib.load(open("pyproject.toml", "rb"))["project"]["dependencies"], sep="\n")' > dependencies.txt \
 && /opt/venv/bin/pip install --constraint constraints.txt --requirement dependencies.txt \
 && find /opt/venv -name '*.so' -exec strip --strip-unneeded {} +

COPY README.md LICENSE ./
COPY operator ./operator
# Compiled once, here: the file system is read-only later. The files never change, so their times need not be compared.
RUN --mount=type=secret,id=pipconf,target=/etc/pip.conf \
    /opt/venv/bin/pip install --no-deps . \
 && /opt/venv/bin/pip uninstall --yes pip setuptools \
 && /opt/venv/bin/python -m compileall -q -f --invalidation-mode unchecked-hash /opt/venv/lib

# --- what runs --------------------------------------------------------------------------------------------------------
FROM ${BASE}
# Off: without the bindings of Ceph, some 90 MB less; StorageDriverClasses of the driver ceph-rbd then say so.
ARG WITH_CEPH=true
RUN apt-get update \
 && DEBIAN_FRONTEND=noninteractive apt-get install -y --no-install-recommends \
      libvirt0 $(if [ "$WITH_CEPH" = true ]; then echo python3-rados python3-rbd; fi) \
 && rm -rf /var/lib/apt/lists/* /var/cache/apt/archives /var/log/apt /var/log/dpkg.log \
      /usr/local/bin/pip* /usr/local/lib/python3.11/ensurepip /usr/local/lib/python3.11/site-packages/pip* \
      /usr/local/lib/python3.11/site-packages/setuptools* /usr/local/lib/python3.11/site-packages/wheel* \
 && echo 'vmsnapshot:x:65532:65532:vmsnapshot-operator:/tmp:/usr/sbin/nologin' >> /etc/passwd \
 && echo 'vmsnapshot:x:65532:' >> /etc/group
COPY --from=build /opt/venv /opt/venv
ENV PATH=/opt/venv/bin:$PATH PYTHONUNBUFFERED=1 PYTHONDONTWRITEBYTECODE=1 HOME=/tmp
# What would otherwise show at the first snapshot shows here: that all of it loads.
RUN python3 -c 'import libvirt, libvirt_qemu, vmsnapshot_operator.cli, vmsnapshot_operator.handlers.operator' \
 && if [ "$WITH_CEPH" = true ]; then \
      python3 -c 'from vmsnapshot_operator.drivers.ceph_cluster import binding; binding("rados"); binding("rbd")'; \
    fi
LABEL org.opencontainers.image.title="vmsnapshot-operator" \
      org.opencontainers.image.description="One consistent snapshot of a VM whose disks lie on several storage systems" \
      org.opencontainers.image.licenses="Apache-2.0"
# A number, so that Kubernetes can see that it is not root.
USER 65532:65532
EXPOSE 8080
# Both programs take SIGTERM themselves, and leave no child behind that an init would have to reap.
ENTRYPOINT ["vmsnapshot-operator"]
CMD ["--help"]
