#!/usr/bin/env bash
# The compiled core under AddressSanitizer and UndefinedBehaviorSanitizer, driven by Python tests.
set -euo pipefail

usage() {
  cat <<'END'
usage: scripts/sanitize.sh [pytest arguments...]     (default: the quick ones of python_tests/ops/test_lif.py)

Builds the CPU part of the extension with g++'s sanitizers into a throw-away venv that sees the packages of $PYTHON
(default: python3; it must have torch, pytest, scikit-build-core, pybind11, cmake and ninja), and runs the tests there.
CUDA sources are left out. Leaks are not looked for: torch itself leaves thousands of blocks behind.
END
}

case ${1-} in -h | --help) usage && exit 0 ;; esac
(($#)) || set -- python_tests/ops/test_lif.py -m "not slow" # Inductor does not start under a preloaded sanitizer

repo=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
python=${PYTHON:-python3}
"$python" -c 'import torch, pytest, scikit_build_core, pybind11, cmake, ninja' || {
  echo "$python lacks something: pip install torch pytest scikit-build-core pybind11 cmake ninja" >&2
  exit 2
}
tmp=$(mktemp -d)
trap 'rm -rf "$tmp"' EXIT
trap 'exit 130' INT TERM
say() { printf '== %s\n' "$*"; }

# A plain line in a .pth file: an editable spikecore of $python does not come along.
purelib='import sysconfig; print(sysconfig.get_path("purelib"))'
"$python" -m venv --without-pip "$tmp/venv"
"$python" -c "$purelib" >"$("$tmp/venv/bin/python" -c "$purelib")/base.pth"

say "building with -fsanitize=address,undefined"
flags="-g -fno-omit-frame-pointer -fsanitize=address,undefined -fno-sanitize-recover=undefined"
if ! CC=gcc CXX=g++ TMPDIR=$tmp "$python" -m pip --python "$tmp/venv/bin/python" install --no-deps --no-build-isolation --no-index \
  -C cmake.define.SPIKECORE_CUDA=OFF -C "cmake.define.CMAKE_CXX_FLAGS=$flags" -C build-dir="$tmp/build" -C install.strip=false \
  "$repo" >"$tmp/log" 2>&1; then
  tail -n 60 "$tmp/log"
  exit 1
fi

say "pytest $*"
# libstdc++ too: the sanitizer must find the functions that throw before torch brings them.
# Not -m pytest: spikecore must not come from the folder here.
cat >"$tmp/run.py" <<'END'
import os, sys, pytest, spikecore
assert os.path.realpath(spikecore.__file__).startswith(os.path.realpath(sys.prefix)), spikecore.__file__
sys.exit(pytest.main())
END
cd "$repo"
LD_PRELOAD="$(g++ -print-file-name=libasan.so) $(g++ -print-file-name=libstdc++.so)" \
  ASAN_OPTIONS=detect_leaks=0 UBSAN_OPTIONS=print_stacktrace=1 PYTHONMALLOC=malloc \
  "$tmp/venv/bin/python" "$tmp/run.py" -q -p no:cacheprovider "$@"
