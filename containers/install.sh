#!/usr/bin/env bash
# Everything that is in the image, in the order in which it has to come. Both recipes call it.
# Usage: install.sh SOURCE, the checkout of this project.
set -euo pipefail
source=$1

# NVIDIA's apex, which has no release on the package index (the `apex` there is another project).
APEX_COMMIT=10417aceddd7d5d05d7cbf7b0fc2daad1105f8b4
# Compute capabilities that are compiled for: A100, L40S, H100 and H200, B200.
export TORCH_CUDA_ARCH_LIST="8.0;8.9;9.0;10.0"
export NVTE_CUDA_ARCHS="80;89;90;100"
export MAX_JOBS=${MAX_JOBS:-8} # of the compilers; each takes up to 8 GB

dnf install -y --setopt=install_weak_deps=False \
  gcc-c++ git python3.11-devel python3.11-pip
dnf clean all

python3.11 -m venv /opt/asvr
export PATH=/opt/asvr/bin:$PATH PIP_NO_CACHE_DIR=1 PIP_DISABLE_PIP_VERSION_CHECK=1
install() { pip install --constraint "$source/megatron_asvr/platforms/constraints.txt" "$@"; }

# torch first: what is compiled below is compiled against it.
install torch numpy packaging setuptools wheel cmake==4.4.4 ninja==1.13.2 pybind11==3.1.0

# Transformer Engine's part for torch is compiled here; a binary from elsewhere is for other versions.
export NVTE_FRAMEWORK=pytorch NVTE_PYTORCH_FORCE_BUILD=TRUE
install --no-build-isolation "${source}[gpu,mpi]"

apex=$(mktemp -d)
git -C "$apex" init --quiet
git -C "$apex" fetch --quiet --depth 1 https://github.com/NVIDIA/apex "$APEX_COMMIT"
git -C "$apex" checkout --quiet FETCH_HEAD
APEX_CPP_EXT=1 APEX_CUDA_EXT=1 install --no-build-isolation --no-deps "$apex"
rm -rf "$apex"

pip freeze >/opt/asvr/packages.txt
asvr env
