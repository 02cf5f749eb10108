# The commands with the libraries of the example task. For the CPU:
#   docker build -t cellmap-lightning .
# For CUDA, with any Debian or Ubuntu base (torch of PyPI has its own CUDA libraries):
#   docker build -t cellmap-lightning:cuda --build-arg BASE=nvidia/cuda:12.8.1-base-ubuntu24.04 .
# PIP_OPTIONS goes to pip, such as --extra-index-url with an index of CPU builds, which are smaller.
# Run it with the folder of the data, in which the results are written too:
#   docker run --rm --user "$(id -u):$(id -g)" --shm-size 8g -v "$PWD:/work" cellmap-lightning cellmap-train experiment=demo
ARG BASE=python:3.12-slim-bookworm
FROM ${BASE}

ARG PIP_OPTIONS=""
ARG EXTRAS=train,fast,targets,challenge,s3
ENV PIP_NO_CACHE_DIR=1 PIP_DISABLE_PIP_VERSION_CHECK=1 PYTHONUTF8=1 HOME=/tmp PATH=/opt/env/bin:$PATH

# CUDA images have no Python. Its version is that of the base.
# hadolint ignore=DL3008
RUN command -v python3 || (apt-get update \
    && apt-get install --yes --no-install-recommends python3 python3-venv \
    && rm -rf /var/lib/apt/lists/*)
RUN python3 -m venv /opt/env

WORKDIR /src
# The large libraries are a layer that changes with the constraints alone. A local version such as 2.13.0+cpu, which
# the CPU index has, is preferred to the version without one.
COPY constraints.txt ./
RUN pip install -c constraints.txt ${PIP_OPTIONS} torch
COPY pyproject.toml README.md LICENSE ./
COPY cellmap_lightning cellmap_lightning
COPY configs configs
RUN pip install -c constraints.txt ${PIP_OPTIONS} ".[${EXTRAS}]"

RUN useradd --no-create-home --uid 1001 cellmap && install --directory --owner cellmap /work
# By its number, which Kubernetes can check.
USER 1001
WORKDIR /work
CMD ["cellmap-train", "--help"]
