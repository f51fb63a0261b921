# Images on one base: `operator` and `trainer`, which `make images` builds (docs/install.md), and
# `reward` for each REWARD with packages of its own (docs/recipes.md). Any image with Python 3.11, its
# venv module and CA certificates can be the base; tools/base_image.sh makes one from Debian packages.
# VERSION and REVISION go into the labels.
#
# Behind a proxy that re-signs TLS, pass its CA bundle as the build secret `ca_bundle`: it is
# trusted while packages are fetched, and is in no layer of the result.
ARG BASE_IMAGE=python:3.11-slim-bookworm

FROM ${BASE_IMAGE} AS base
# A name for the user: parts of torch ask for it. HOME is a folder that pods mount writable.
RUN echo 'tempflow:x:65532:65532:tempflow:/tmp:/usr/sbin/nologin' >>/etc/passwd \
    && echo 'tempflow:x:65532:' >>/etc/group
ENV HOME=/tmp \
    PATH=/opt/tempflow/bin:/usr/local/bin:/usr/bin:/bin \
    PYTHONDONTWRITEBYTECODE=1 \
    PYTHONUNBUFFERED=1
WORKDIR /tmp
COPY tools/install_locked.sh requirements-build.lock /usr/share/tempflow/

# Our own code, installed under a prefix that is laid over the environment of either image.
FROM base AS code
RUN --mount=type=secret,id=ca_bundle \
    /usr/share/tempflow/install_locked.sh /opt/tempflow /dev/null /build
WORKDIR /src
COPY pyproject.toml README.md LICENSE ./
COPY sdk sdk
COPY operator operator
COPY trainer trainer
RUN /build/bin/python -m hatchling build --target wheel --directory /dist \
    && /build/bin/uv pip install --quiet --offline --no-deps --compile-bytecode \
        --python /opt/tempflow/bin/python --prefix /code /dist/*.whl

# Dependencies are a layer of their own, which changes only with the lock.
FROM base AS operator-dependencies
COPY requirements-operator.lock /usr/share/tempflow/
RUN --mount=type=secret,id=ca_bundle \
    cd /usr/share/tempflow && ./install_locked.sh /opt/tempflow requirements-operator.lock

FROM base AS trainer-dependencies
COPY requirements-trainer.lock /usr/share/tempflow/
RUN --mount=type=secret,id=ca_bundle \
    cd /usr/share/tempflow && ./install_locked.sh /opt/tempflow requirements-trainer.lock
# CUDA comes with torch's wheels; of the driver, which the node mounts in, this is what is needed.
# Which GPUs a container sees is the cluster's decision, so NVIDIA_VISIBLE_DEVICES is not set.
ENV NVIDIA_DRIVER_CAPABILITIES=compute,utility

FROM operator-dependencies AS operator
COPY --from=code /code /opt/tempflow
USER 65532:65532
ENTRYPOINT ["/opt/tempflow/bin/python", "-m", "tempflow_operator.main"]
ARG VERSION=unknown
ARG REVISION=unknown
LABEL org.opencontainers.image.title="tempflow-operator" \
      org.opencontainers.image.description="Runs TempFlowGRPOJob resources on Kubernetes" \
      org.opencontainers.image.licenses="Apache-2.0" \
      org.opencontainers.image.version="${VERSION}" \
      org.opencontainers.image.revision="${REVISION}"

FROM trainer-dependencies AS trainer
COPY --from=code /code /opt/tempflow
USER 65532:65532
ENTRYPOINT ["/opt/tempflow/bin/python", "-m", "tempflow_trainer.launch"]
ARG VERSION=unknown
ARG REVISION=unknown
LABEL org.opencontainers.image.title="tempflow-trainer" \
      org.opencontainers.image.description="Trains text-to-image flow models with TempFlow-GRPO" \
      org.opencontainers.image.licenses="Apache-2.0" \
      org.opencontainers.image.version="${VERSION}" \
      org.opencontainers.image.revision="${REVISION}"

# Of what our code requires only what the server of a reward imports.
FROM base AS reward-dependencies
COPY tools/reward_images /usr/share/tempflow/reward_images
ARG REWARD
RUN --mount=type=secret,id=ca_bundle \
    cd /usr/share/tempflow && ./install_locked.sh /opt/tempflow "reward_images/$REWARD.lock"
ENV NVIDIA_DRIVER_CAPABILITIES=compute,utility

FROM reward-dependencies AS reward
COPY --from=code /code /opt/tempflow
USER 65532:65532
ENTRYPOINT ["/opt/tempflow/bin/python", "-m", "tempflow_trainer.rewards.serve"]
ARG VERSION=unknown
ARG REVISION=unknown
ARG REWARD
LABEL org.opencontainers.image.title="tempflow-$REWARD" \
      org.opencontainers.image.description="Serves the reward $REWARD to TempFlow-GRPO" \
      org.opencontainers.image.licenses="Apache-2.0" \
      org.opencontainers.image.version="${VERSION}" \
      org.opencontainers.image.revision="${REVISION}"
