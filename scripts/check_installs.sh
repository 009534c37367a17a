#!/usr/bin/env bash
# Every way of installing works from a clean clone: regular, editable, by way of the sdist; with CUDA kernels and without.
set -euo pipefail

usage() {
  cat <<'END'
usage: scripts/check_installs.sh

Clones HEAD and installs it three times into throw-away venvs that see the packages of $PYTHON (default: python3), which
must have torch, numpy and the build tools (scikit-build-core, pybind11, cmake, ninja): nothing is downloaded.
  regular   SPIKECORE_CUDA=AUTO, timed: what compiling everything takes
  editable  SPIKECORE_CUDA=OFF
  sdist     to wheel to install, SPIKECORE_CUDA=AUTO where no nvcc is to be found
and SPIKECORE_CUDA=ON without nvcc, which must fail with a line that says why.
END
}

case ${1-} in
  '') ;;
  -h | --help) usage && exit 0 ;;
  *) usage >&2 && exit 2 ;;
esac

repo=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
python=${PYTHON:-python3}
"$python" -c 'import torch, numpy, scikit_build_core, pybind11, cmake, ninja' || {
  echo "$python lacks something: pip install torch numpy scikit-build-core pybind11 cmake ninja" >&2
  exit 2
}
tmp=$(mktemp -d)
trap 'rm -rf "$tmp"' EXIT
trap 'exit 130' INT TERM
export TMPDIR=$tmp PIP_DISABLE_PIP_VERSION_CHECK=1
unset SPIKECORE_CUDA SPIKECORE_ISA CUDACXX
failed=0
say() { printf '== %s\n' "$*"; }
fail() { printf 'FAILED: %s\n' "$*" && failed=1; }

[[ -z $(git -C "$repo" status --porcelain) ]] || say "note: only what is committed is checked"

# A venv whose packages are its own first, then those of $python. A plain line in a .pth file: an editable spikecore
# installed there does not come along.
fresh() { # name
  "$python" -m venv --without-pip "$tmp/$1/venv"
  bin=$tmp/$1/venv/bin
  "$python" -c 'import sysconfig; print(sysconfig.get_path("purelib"))' >"$("$bin/python" -c 'import sysconfig; print(sysconfig.get_path("purelib"))')/base.pth"
  git clone -q "$repo" "$tmp/$1/clone"
}
install() { # environment... arguments of pip install; the log in $tmp/log
  env "${@:1:1}" "$python" -m pip --python "$bin/python" install -v --no-deps --no-build-isolation --no-index "${@:2}" >"$tmp/log" 2>&1
}
installed() { # name; where spikecore must come from
  (cd "$tmp" && "$bin/python" - "$1" "$2" <<'END'
import os, sys
import torch
import spikecore, spikecore.models
from spikecore.ops import lif

info = spikecore.backend_info()
here = os.path.realpath(spikecore.__file__)
assert here.startswith(os.path.realpath(sys.argv[2])), f"imported from {here}"
s, v = lif(torch.tensor([[1.0], [3.0], [0.5]]), 0.5, 0.5)
assert s.flatten().tolist() == [0.0, 1.0, 0.0] and v.item() == 0.25, (s, v)
print(f"   {sys.argv[1]}: spikecore {info['version']}, isa {info['isa']}, cuda {info['cuda_archs'] or 'not built'} ({info['cuda']})")
END
  ) || fail "$1: installed, but does not work"
  (cd "$tmp" && "$bin/spikecore" --help >/dev/null) || fail "$1: no spikecore command"
}
shown() { # text: the last log has it
  grep -oF -m 1 "$1" "$tmp/log" | sed 's/^/   /' || fail "the build did not say: $1"
}

no_cuda="so no CUDA kernels are built; on a GPU the Triton kernels run instead"
no_nvcc=CUDACXX=$tmp/nvcc-is-missing # CMake looks into the system's folders too, so PATH alone would not hide it

say "regular install, everything compiled"
fresh regular
TIMEFORMAT='   built and installed in %0R s, of processor time %0U s in programs and %0S s in the system'
if { time install SPIKECORE_CUDA=AUTO "$tmp/regular/clone"; } 2>"$tmp/time"; then
  cat "$tmp/time"
  # Written by ninja: start and end in milliseconds.
  awk '!/^#/ { printf "   %5.1f s  %s\n", ($2 - $1) / 1000, $4 }' "$tmp"/regular/clone/build/*/.ninja_log | sort -rn
  grep -oE 'spikecore: CUDA kernels for .*|spikecore: no nvcc found.*' "$tmp/log" | head -n 1 | sed 's/^/   /'
  installed regular "$tmp/regular/venv"
else
  tail -n 40 "$tmp/log" && fail "regular install"
fi
rm -rf "$tmp/regular"

say "editable install, SPIKECORE_CUDA=OFF"
fresh editable
if install SPIKECORE_CUDA=OFF -e "$tmp/editable/clone"; then
  shown "spikecore: SPIKECORE_CUDA=OFF, $no_cuda"
  installed editable "$tmp/editable/clone"
else
  tail -n 40 "$tmp/log" && fail "editable install"
fi
rm -rf "$tmp/editable"

say "sdist, wheel of the sdist, install of the wheel; no nvcc to be found"
fresh sdist
if (cd "$tmp/sdist/clone" && "$bin/python" -c "from scikit_build_core.build import build_sdist; build_sdist('$tmp/sdist/dist')") >"$tmp/log" 2>&1 &&
  env "$no_nvcc" "$python" -m pip --python "$bin/python" wheel -v --no-deps --no-build-isolation --no-index \
    -w "$tmp/sdist/dist" "$tmp"/sdist/dist/*.tar.gz >"$tmp/log" 2>&1; then
  shown "spikecore: no nvcc found, $no_cuda"
  if install X=1 "$tmp"/sdist/dist/*.whl; then
    installed sdist "$tmp/sdist/venv"
  else
    tail -n 40 "$tmp/log" && fail "install of the wheel"
  fi
else
  tail -n 40 "$tmp/log" && fail "wheel of the sdist"
fi

say "SPIKECORE_CUDA=ON without nvcc"
if env "$no_nvcc" SPIKECORE_CUDA=ON "$python" -m pip --python "$bin/python" wheel --no-deps --no-build-isolation --no-index \
  -w "$tmp/sdist/on" "$tmp/sdist/clone" >"$tmp/log" 2>&1; then
  fail "it built"
else
  shown "spikecore: SPIKECORE_CUDA=ON, but no nvcc was found"
fi

((failed)) || say "all installs work"
exit $failed
