#!/usr/bin/env bash
# Build the TensorRT engines of this export with trtexec (TensorRT 11 or newer), on the machine that will run them.
#   ./build_engines.sh [--device N] [--skip-gpu-check] [NAME...]
# What to build is in engines.json; build_engines.py reads it, makes trtexec's arguments and writes the sidecars.
# --device is the GPU's number in nvidia-smi; without it the first of CUDA_VISIBLE_DEVICES is taken, or 0.
# Engines are built, not run. TRTEXEC and PYTHON may name the two programs.
set -euo pipefail

here="$(cd -- "$(dirname -- "${BASH_SOURCE[0]}")" && pwd)"
script="$here/build_engines.py"
trtexec="${TRTEXEC:-trtexec}"
python="${PYTHON:-python3}"

stop() {
  printf 'error: %s\n' "$1" >&2
  exit 1
}

device="${CUDA_VISIBLE_DEVICES:-0}"
device="${device%%,*}"
checks=()
names=()
while (($#)); do
  case "$1" in
    --device)
      (($# > 1)) || stop "--device needs the number of a GPU"
      device="$2"
      shift
      ;;
    --skip-gpu-check) checks+=(--skip-gpu-check) ;;
    -*) stop "unknown option $1; see the head of ${BASH_SOURCE[0]}" ;;
    *) names+=("$1") ;;
  esac
  shift
done

command -v -- "$python" >/dev/null || stop "$python is not on PATH; set PYTHON"
command -v -- "$trtexec" >/dev/null || stop "$trtexec is not on PATH; it comes with TensorRT, in its bin folder"

# trtexec's first line is "&&&& RUNNING TensorRT.trtexec [TensorRT v110400] [b106] # ...".
banner="$("$trtexec" --help 2>&1 || true)"
[[ "$banner" =~ \[TensorRT\ v([0-9]+)\]\ \[b([0-9]+)\] ]] || stop "$trtexec --help does not say its TensorRT version"
number="${BASH_REMATCH[1]}"
version="$((10#$number / 10000)).$((10#$number / 100 % 100)).$((10#$number % 100)).${BASH_REMATCH[2]}"

"$python" "$script" --check --library-version "$version" --device "$device" "${checks[@]}"

# trtexec then counts as nvidia-smi does, and sees the one GPU.
export CUDA_DEVICE_ORDER=PCI_BUS_ID CUDA_VISIBLE_DEVICES="$device"

if ((${#names[@]} == 0)); then
  "$python" "$script" --names >/dev/null
  mapfile -d '' -t names < <("$python" "$script" --names)
fi

for name in "${names[@]}"; do
  "$python" "$script" --trtexec-arguments "$name" >/dev/null
  mapfile -d '' -t arguments < <("$python" "$script" --trtexec-arguments "$name")
  printf '%s: trtexec\n' "$name"
  "$trtexec" "${arguments[@]}"
  "$python" "$script" --sidecar-only "$name" --library-version "$version"
  printf '%s: built, not run\n' "$name"
done
