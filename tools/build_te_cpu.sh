#!/usr/bin/env bash
# Transformer Engine's PyTorch extension, compiled on a machine that has no GPU.
#
#   tools/build_te_cpu.sh [FOLDER]
#
# FOLDER (default: ~/.cache/megatron_asvr/te-VERSION) becomes a virtual environment with the CUDA
# build of torch, the compiled extension and what this package needs to be tested with them. Nothing
# in it computes without a GPU; its layers can be constructed on the meta device. All of it comes
# from the package index: 9 GB, and as long as 33 C++ files take. A second call finds it done.
#
# TE, TORCH and PYTHON choose versions and interpreter; MAX_JOBS how many compilers run at once.
set -euo pipefail
cd "$(dirname "$0")/.."

TE=${TE:-2.20.2}
TORCH=${TORCH:-2.13.0}
PYTHON=${PYTHON:-python3}
export MAX_JOBS=${MAX_JOBS:-$(nproc)}
folder=${1:-$HOME/.cache/megatron_asvr/te-$TE}
wanted="transformer-engine $TE, torch $TORCH, $("$PYTHON" --version)"

if [[ "$(cat "$folder/.built" 2>/dev/null)" == "$wanted" ]]; then
  echo "already built: $folder ($wanted)"
  exit 0
fi
echo "building in $folder: $wanted, $MAX_JOBS compilers at once"
rm -f "$folder/.built"
"$PYTHON" -m venv "$folder"
bin=$folder/bin
pip() { "$bin/python" -m pip install --quiet --disable-pip-version-check "$@"; }

# "===" refuses a build of torch for the CPU, which has a suffix in its version.
pip "torch===$TORCH" "setuptools>=77,<81" wheel ninja packaging
pip --editable ".[dev]"
pip --no-deps "transformer-engine==$TE" "transformer-engine-cu13==$TE"
pip onnxscript onnx pydantic nvdlfw-inspect "nvidia-cudnn-frontend>=1.29.0"
pip "cuda-toolkit[crt,cccl]"  # at the version that torch has brought: headers that it does not need

# The headers and libraries of CUDA, cuDNN and NCCL are those that torch brought along.
packages=$("$bin/python" -c 'import sysconfig; print(sysconfig.get_paths()["purelib"])')
for part in "$packages"/nvidia/*/; do
  if [[ -d $part/include ]]; then export CPATH=$part/include${CPATH:+:$CPATH}; fi
  if [[ -d $part/lib ]]; then export LIBRARY_PATH=$part/lib${LIBRARY_PATH:+:$LIBRARY_PATH}; fi
done

# Nothing runs fast here, so nothing is optimised: the last -O counts. All files begin with the same
# headers of torch, most of the work: they are compiled once, by the first call that brings the flags.
cat >"$folder/cxx" <<'CXX'
#!/usr/bin/env bash
headers=$(dirname "$0")/headers.h
case " $* " in *" -c "*.cpp*) ;; *) exec g++ "$@" -O0 -g0 -w ;; esac
exec 9>"$headers.lock"
flock 9
if [[ ! -e $headers.gch ]]; then
  flags=()
  for ((i = 1; i <= $#; i++)); do
    case "${!i}" in
      -c) ;;
      -o | -MF) ((i++)) ;;
      -MMD | -MD | *.cpp) ;;
      *) flags+=("${!i}") ;;
    esac
  done
  echo '#include "extensions.h"' >"$headers"
  g++ "${flags[@]}" -O0 -g0 -w -x c++-header "$headers" -o "$headers.gch"
fi
flock -u 9
exec g++ -include "$headers" "$@" -O0 -g0 -w
CXX
chmod +x "$folder/cxx"
rm -f "$folder"/headers.h*
export CXX=$folder/cxx CC=$folder/cxx
export NVTE_FRAMEWORK=pytorch NVTE_PYTORCH_FORCE_BUILD=TRUE NVTE_BUILD_USE_NVIDIA_WHEELS=1
pip --no-deps --no-build-isolation --no-binary transformer-engine-torch "transformer-engine-torch==$TE"
rm -f "$folder"/headers.h*

"$bin/python" -c 'import torch, transformer_engine.pytorch as te; print("imported", te.__file__)'
echo "$wanted" >"$folder/.built"
echo "built in $((SECONDS / 60)) min: $folder"
