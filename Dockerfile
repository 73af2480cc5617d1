# hvdloss with Horovod, PyTorch and TensorFlow: docs/howto/docker.md says how to build, run and change it.
#
#   docker build -t hvdloss:cpu .
#   docker run --rm hvdloss:cpu                           # hvdloss doctor
#   docker compose run --rm --use-aliases host1           # two containers train as two hosts
#
# Needs BuildKit (Docker 23 or newer) or buildah. Both stages' bases must bring the same Python, 3.11 to 3.13.

ARG BASE=debian:12-slim
# What Horovod is compiled on. Another one than BASE only where the compilers come with it: CUDA's.
ARG BUILD_BASE=${BASE}

# 1. Frameworks and hvdloss in /opt/venv, and Horovod compiled for them. `--target build` keeps the compilers.
FROM ${BUILD_BASE} AS build

# hadolint ignore=DL3008
RUN apt-get update && \
    DEBIAN_FRONTEND=noninteractive apt-get install -y --no-install-recommends \
        ca-certificates cmake g++ libopenmpi-dev make openmpi-bin openssh-client python3-dev python3-venv && \
    rm -rf /var/lib/apt/lists/* && \
    python3 -m venv /opt/venv
ENV PATH=/opt/venv/bin:$PATH \
    PIP_DISABLE_PIP_VERSION_CHECK=1 \
    PIP_ROOT_USER_ACTION=ignore

# What pip calls the frameworks; versions are those of constraints.txt.
ARG FRAMEWORKS="torch tensorflow-cpu"
# PyTorch's own index: PyPI's torch brings 2 GB of CUDA. Empty: only what pip is set up with.
ARG TORCH_INDEX=https://download.pytorch.org/whl/cpu
# More options of `hvdloss install`; --nccl for GPUs.
ARG HOROVOD_OPTIONS=""
COPY constraints.txt /src/
RUN --mount=type=cache,target=/root/.cache/pip,sharing=locked \
    pip install --constraint /src/constraints.txt ${TORCH_INDEX:+--extra-index-url "$TORCH_INDEX"} $FRAMEWORKS && \
    case "$FRAMEWORKS/$HOROVOD_OPTIONS" in \
        */*--nccl*) ;; \
        *torch*) python -c 'import sys, torch; \
                            sys.exit(torch.version.cuda and f"torch {torch.__version__} is a CUDA build: set TORCH_INDEX")' ;; \
    esac

# Extras of pyproject.toml. Horovod's wheel stays in the cache between builds, its proof runs in each. Not in
# /root/.cache/hvdloss: buildah 1.28 (Debian 12) empties the image where its own storage is under the path that a
# cache has in it, and `make test-docker` keeps its storage there.
ARG EXTRAS=horovod,examples
COPY pyproject.toml README.md LICENSE /src/
COPY hvdloss /src/hvdloss
COPY adapters /src/adapters
COPY benchmarks /src/benchmarks
RUN --mount=type=cache,target=/root/.cache/pip,sharing=locked \
    --mount=type=cache,target=/var/cache/hvdloss,sharing=locked \
    pip install --constraint /src/constraints.txt "/src[$EXTRAS]" && \
    hvdloss install --cache-dir /var/cache/hvdloss $HOROVOD_OPTIONS && \
    pip check

# 2. What only compiling against the frameworks needs, and their own test programs, are left behind.
FROM build AS pruned
RUN site=$(python -c 'import sysconfig; print(sysconfig.get_path("platlib"))') && \
    rm -rf "$site/tensorflow/include" "$site/torch/include" "$site/torch/share/cmake" "$site/torch/test" \
        "$site/clang/native/libclang.so" && \
    find "$site/torch" -path "*/torch/bin/*" ! -name torch_shm_manager -delete

# 3. The image.
FROM ${BASE} AS final

# The package makes host keys: they must not be the same in every container, so they go. Nothing here needs to
# become another user, so no program may.
# hadolint ignore=DL3008
RUN apt-get update && \
    DEBIAN_FRONTEND=noninteractive apt-get install -y --no-install-recommends \
        openmpi-bin openssh-client openssh-server python3 tini && \
    rm -rf /var/lib/apt/lists/* /var/cache/apt/* /var/log/* /etc/ssh/ssh_host_* && \
    find / -xdev -perm /6000 -type f -exec chmod a-s {} +

# Not a number that bases use already (Ubuntu's has 1000). Build with your own to write into folders of yours.
# /run and /work for all: a tmpfs that is mounted there is root's, and takes this mode over.
ARG UID=10001
RUN groupadd --gid "$UID" hvdloss && \
    useradd --uid "$UID" --gid "$UID" --no-log-init --no-create-home --home-dir /work --shell /bin/bash hvdloss && \
    install -d -o "$UID" -g "$UID" -m 1777 /work && \
    chmod 1777 /run && \
    install -d -o "$UID" -g "$UID" -m 700 /ssh /run/hvdloss

COPY --from=pruned /opt/venv /opt/venv
COPY examples /opt/hvdloss/examples
COPY scripts/docker/sshd_config /etc/hvdloss/
COPY scripts/docker/ssh_config /etc/ssh/ssh_config.d/hvdloss.conf
COPY --chmod=755 scripts/docker/hvdloss-entrypoint scripts/docker/hvdloss-health scripts/docker/hvdloss-ssh-keys \
     /usr/local/bin/

# OMPI_MCA_...: containers are not allowed to read each other's memory, which Open MPI's default would try.
# HOROVOD_SSH_...: horovodrun refuses hosts whose keys it does not know.
ENV PATH=/opt/venv/bin:$PATH \
    PYTHONUNBUFFERED=1 \
    MPLCONFIGDIR=/tmp/matplotlib \
    OMPI_MCA_btl_vader_single_copy_mechanism=none \
    HOROVOD_SSH_HOST_KEY_CHECKING=yes \
    HVDLOSS_SSH=/ssh
# By number, so that whoever runs it can see that it is not root (Kubernetes: runAsNonRoot).
USER ${UID}
WORKDIR /work
HEALTHCHECK --interval=10s --timeout=20s --start-period=10s --retries=3 CMD ["hvdloss-health"]
ENTRYPOINT ["tini", "--", "hvdloss-entrypoint"]
CMD ["hvdloss", "doctor"]
