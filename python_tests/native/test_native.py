"""The CPU kernels without torch: against plain loops, under sanitizers, and on an emulated 64-bit ARM."""

import re
import shutil
import subprocess

import pytest
from native import kernels

import spikecore

pytestmark = pytest.mark.slow

SANITIZERS = ["-O1", "-g", "-fno-omit-frame-pointer", "-fsanitize=address,undefined", "-fno-sanitize-recover=all"]
ARM = "aarch64-linux-gnu-g++"
QUICK = {  # random problems, where every instruction is slow
    "lif": "196",
    "bn_lif": "60",
    "qk_attention": "60",
    "selective_scan": "40",
    "selective_scan_2d": "40",
    "codebook_lookup": "120",
    "spiking_self_attention": "60",
}
NEEDS = {"bn_lif": ["lif"]}  # whose row loops it calls
EACH = pytest.mark.parametrize("op", QUICK)


@EACH
def test_kernels_agree_with_plain_loops(op, tmp_path, tmp_path_factory):
    program = kernels.link_check(op, tmp_path, kernels.release_objects(tmp_path_factory), kernels.require("g++", "g++"))
    assert "0 failures" in kernels.run([program])


@EACH
def test_kernels_under_asan_and_ubsan(op, tmp_path):
    compiler = kernels.require("g++", "g++")
    objects = kernels.compile_isas(tmp_path, kernels.isas(), compiler, SANITIZERS, ops=[op, *NEEDS.get(op, [])])
    program = kernels.link_check(op, tmp_path, objects, compiler, SANITIZERS)
    assert "0 failures" in kernels.run([program, QUICK[op]])


# Without its teeth the check above would pass for ever: each of these is a mistake it must see.
@pytest.mark.parametrize(
    ("op", "right", "wrong", "complaint"),
    [
        ("lif", "= hi >= c.fire_at", "= hi > c.fire_at", r": s\["),
        ("lif", "out[i] = value;", "out[i] = values ? values[0] : value;", "channels="),
        ("lif", "g_x[i] = gain[i] * gi;", "g_x[i] = gain[i] * sg;", r": g_x\["),
        ("lif", "i < n; ++i) d[i] += s[i];", "i < n + 1; ++i) d[i] += s[i];", "AddressSanitizer"),
        ("bn_lif", "(x - mean) * scale + bias", "(x + mean) * scale + bias", r": s\["),
        ("bn_lif", "(t + r) * p.r_step + first", "t * p.r_step + first", r"residual=1 .*: (s|y|g_residual)\["),
        ("bn_lif", "(p.g_bias)[c]) / count", "(p.g_bias)[c])", r"batch=1 .*: g_x\["),
        ("bn_lif", "int(length - j < step() ? length - j : step())", "int(step())", "AddressSanitizer"),
        ("bn_lif", "part < parts; ++part) total", "part < parts - 1; ++part) total", r": (var|g_weight)\["),
        ("qk_attention", "least(s.L, l0 + kQkTile)", "l0 + kQkTile", "AddressSanitizer"),
        ("qk_attention", "(p.decay_h)[h * p.decay_step]", "(p.decay_h)[0]", r": (out|g_s)\["),
        ("qk_attention", "surrogate<K, A>(h[i] - threshold", "surrogate<K, A>(threshold - h[i]", ": g_"),
        ("qk_attention", "r < r0 + 255", "r < r0 + 600", r"packed .*: out\["),
        ("selective_scan", "x * Bs[r][l + j]", "x * Cs[r][l + j]", ": g_"),
        ("selective_scan", "block == first, n);", "true, n);", r": g_B\["),
        ("selective_scan", "i < m ? states[i", "i < m + 1 ? states[i", "AddressSanitizer"),
        ("selective_scan", "j < p.parts; ++j)", "j < p.parts - 1; ++j)", r": g_A\["),
        ("selective_scan_2d", "if (++s == S) s = 0, ++j;", "if (++s == S) s = 0;", r": g_C\["),
        ("selective_scan_2d", "const bool back = code == 2 ||", "const bool back =", r": y\["),
        ("selective_scan_2d", "step = back ? -1 : 1;", "step = back ? -2 : 1;", "AddressSanitizer"),
        ("codebook_lookup", "if (s > best &&", "if (s >= best &&", r": index\["),
        ("codebook_lookup", "e.a[r] * c.weight", "-e.a[r] * c.weight", r": index\["),
        ("codebook_lookup", "float(-0.5 * got.norm", "float(-0.4 * got.norm", r": index\["),
        ("codebook_lookup", "if (row.count == kKept) settle", "if (row.count > kKept) settle", "runtime error"),
        ("codebook_lookup", "p.order[i] * p.g_step + d", "i * p.g_step + d", r": sum\["),
        ("spiking_self_attention", "= hi >= c.fire_at", "= hi > c.fire_at", r": out\["),
        ("spiking_self_attention", "a[r * row + k * column] * in", "a[r * row + k * (column / 2)] * in", r": out\["),
        ("spiking_self_attention", "g_v[i + j] = decay * gi;", "g_v[i + j] = decay * from[j];", r": g_q\["),
        ("spiking_self_attention", "load_row(d, s, int(n));", "load_row(d, s, int(n) + 1);", "AddressSanitizer"),
        ("spiking_self_attention avx512", "t, 0xff00, t,", "t, 0xfe00, t,", r": g_k\["),
        ("spiking_self_attention avx512", "w * 32 < n; ++w", "w * 32 + 32 < n; ++w", r": g_q\["),
        ("spiking_self_attention avx512", "add ? _mm512_load_ps(d) + count : count", "add ? count : count", r": out\["),
        (
            "spiking_self_attention avx512",
            "_mm512_maskz_loadu_ps(within(n - i), from);\n      fired",
            "_mm512_loadu_ps(from);\n      fired",
            "AddressSanitizer",
        ),
        (
            "spiking_self_attention avx512",
            "_mm512_mask_cmp_ps_mask(within(n - i), hi",
            "_mm512_cmp_ps_mask(hi",
            r": (out|g_q)\[",
        ),
        (
            "spiking_self_attention avx512",
            "w + 1 < W ? kAll : within(n - 16 * w)",
            "n > 0 ? kAll : within(n - 16 * w)",
            r": g_(k|v)\[|AddressSanitizer",
        ),
        (
            "spiking_self_attention avx512",
            "r + kRowsAtOnce <= D; r += kRowsAtOnce) other",
            "r + kRowsAtOnce < D; r += 2 * kRowsAtOnce) other",
            r": (out|g_q)\[",
        ),
        ("qk_attention", "n < W ? k * W : n - W", "n < W ? k * W : k * W", "AddressSanitizer"),
        ("qk_attention", "Vec<A>(a * where.load(y + at(k))) : a", "a : a", r": (out|g_s)\["),
        ("qk_attention", "? A(1) : A(0)) * yi;", "? A(1) : A(0));", r": g_s\["),
    ],
)
def test_check_finds_mistakes(op, tmp_path, monkeypatch, right, wrong, complaint):
    compiler = kernels.require("g++", "g++")
    op, _, isa = op.partition(" ")
    isa = isa or kernels.isas()[0]
    if isa not in spikecore._C.isas():
        pytest.skip(f"{isa} does not run here")
    sources = shutil.copytree(kernels.CSRC, tmp_path / "csrc")
    texts = {path: path.read_text() for path in (sources / op).glob("*") if path.suffix in (".h", ".cpp")}
    changed = {path: text.replace(right, wrong) for path, text in texts.items() if right in text}
    assert changed, "the kernel has changed: plant another mistake"
    for path, text in changed.items():
        path.write_text(text)
    monkeypatch.setattr(kernels, "CSRC", sources)
    flags = [*SANITIZERS, "-O0"]
    objects = kernels.compile_isas(tmp_path, [isa], compiler, flags, dispatch=False, ops=[op, *NEEDS.get(op, [])])
    program = kernels.link_check(op, tmp_path, objects, compiler, [*flags, f"-DSPK_CHECK_ONLY={isa}"])
    done = subprocess.run([program, "56"], capture_output=True, text=True)
    assert done.returncode != 0
    assert re.search(complaint, done.stdout + done.stderr)


@EACH
def test_aarch64_compiles_without_warning_and_runs(op, tmp_path):
    compiler = kernels.require(ARM, "g++-aarch64-linux-gnu")
    objects = kernels.compile_isas(tmp_path, kernels.isas("aarch64"), compiler, ops=[op, *NEEDS.get(op, [])])
    program = kernels.link_check(op, tmp_path, objects, compiler, ["-static"])
    emulator = shutil.which("qemu-aarch64") or shutil.which("qemu-aarch64-static")
    if not emulator:
        pytest.skip("compiled for aarch64 without warnings, but not run: no qemu-aarch64 (Debian: qemu-user)")
    assert "neon: 0 failures" in kernels.run([emulator, program, QUICK[op]])
