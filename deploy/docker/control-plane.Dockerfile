# Control plane and ingest, without torch. From the repository's root:
#   docker build -f deploy/docker/control-plane.Dockerfile -t sapo/control-plane .
# Nothing here needs BuildKit; docker, buildah and podman build it.
ARG PYTHON_IMAGE=python:3.11-slim-bookworm

FROM ${PYTHON_IMAGE} AS build
WORKDIR /build
# What changes seldom comes first: the libraries, then the project. Neither venv has a pip of its own.
COPY deploy/docker/locks/build.txt deploy/docker/locks/control-plane.txt ./
RUN python3 -m venv --without-pip /opt/sapo \
    && python3 -m venv --without-pip /opt/build \
    && python3 -m pip --python /opt/build/bin/python install --no-cache-dir --require-hashes -r build.txt \
    && python3 -m pip --python /opt/sapo/bin/python install --no-cache-dir --no-deps --only-binary :all: \
        --require-hashes -r control-plane.txt
COPY . .
# Without its dependencies: the wheel names torch, too.
RUN python3 -m pip --python /opt/build/bin/python wheel --no-deps --no-build-isolation --wheel-dir dist . \
    && python3 -m pip --python /opt/sapo/bin/python install --no-cache-dir --no-deps dist/*.whl

FROM ${PYTHON_IMAGE}
# tini: PID 1 must reap what dying processes leave, and pass signals on. It is taken as the base's release has it.
# hadolint ignore=DL3008
RUN apt-get update \
    && apt-get install --yes --no-install-recommends tini \
    && rm -rf /var/lib/apt/lists/* \
    && useradd --uid 10001 --user-group --no-create-home --home-dir /tmp sapo \
    && mkdir /runs /cache /secrets /secrets/worker /secrets/grafana \
    && chown sapo:sapo /runs /cache /secrets /secrets/worker /secrets/grafana
COPY --from=build /opt/sapo /opt/sapo
# The root file system may be read-only: what is written goes to /runs (run.dir is relative to /) and to /tmp, or to what
# TMPDIR and XDG_CACHE_HOME name.
ENV PATH=/opt/sapo/bin:$PATH \
    PYTHONUNBUFFERED=1 \
    HOME=/tmp \
    SAPO_HEALTH_ADDRESS=http://127.0.0.1:9100
ARG VERSION=0.1.0
ARG REVISION=unknown
ARG SOURCE=unknown
LABEL org.opencontainers.image.title="sapo control plane and ingest" \
    org.opencontainers.image.version="${VERSION}" \
    org.opencontainers.image.revision="${REVISION}" \
    org.opencontainers.image.source="${SOURCE}" \
    org.opencontainers.image.licenses="Apache-2.0"
WORKDIR /
USER 10001:10001
STOPSIGNAL SIGTERM
# The control plane's address is another one: set SAPO_HEALTH_ADDRESS.
HEALTHCHECK --interval=30s --timeout=10s --start-period=120s CMD ["sapo", "health"]
ENTRYPOINT ["/usr/bin/tini", "--"]
CMD ["sapo", "--help"]
