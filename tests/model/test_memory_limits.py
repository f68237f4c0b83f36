"""What the system allows, MLX's limits put back, what would fit, and runs under a real limit."""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np
import pytest
from conftest import MakeCheckpoint, config_of, resting, slow, tensors

from bench import memory_limit
from bench.random_model import GEOMETRIES
from mlx_cerebrum import device, load
from mlx_cerebrum.decoding.decode import prefill_step
from mlx_cerebrum.errors import MemoryBudgetError, RequestError
from mlx_cerebrum.model import memory
from mlx_cerebrum.model.config import ModelConfig
from mlx_cerebrum.model.limits import PROC, cgroups, first_evaluation, host_bytes, limits, sizes
from mlx_cerebrum.model.memory import Weights, Workload, available_bytes, require
from mlx_cerebrum.weights.loading import load_model
from mlx_cerebrum.weights.opening import open_checkpoint
from mlx_cerebrum.weights.quantize import Packing
from mlx_cerebrum.weights.storage import choose_storage, smaller_weights

FULL = ModelConfig.from_dict(GEOMETRIES["cerebrum-7b"])
NONE = "9223372036854771712"  # what cgroup v1 says where there is no limit


@pytest.fixture
def proc(tmp_path: Path) -> Path:
    """A /proc of a machine with 1 GB free and no limits."""
    own = tmp_path / "proc" / "self"
    own.mkdir(parents=True)
    (own.parent / "meminfo").write_text("MemTotal:  2000000 kB\nMemAvailable:  1000000 kB\n")
    (own / "cgroup").write_text("")
    (own / "mountinfo").write_text("24 1 8:1 / / rw - ext4 /dev/sda rw\n")
    (own / "status").write_text("Name:\tpython\nVmSize:\t  50000 kB\nVmData:\t  10000 kB\n")
    (own / "limits").write_text("Max data size             unlimited            unlimited bytes\n")
    return own.parent


def group(folder: Path, **files: str) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    for name, text in files.items():
        (folder / f"memory.{name}").write_text(text)


def mounted(proc: Path, mount: Path, kind: str, own: str, root: str = "/") -> None:
    number, options = ("0::", "rw") if kind == "cgroup2" else ("4:memory:", "rw,memory")
    line = f"30 24 0:26 {root} {mount} rw shared:9 - {kind} cgroup {options}\n"
    (proc / "self/mountinfo").write_text((proc / "self/mountinfo").read_text() + line)
    (proc / "self/cgroup").write_text(f"{number}{own}\n")


def test_without_limits_what_is_free_counts(proc: Path) -> None:
    assert host_bytes(proc) == 1_024_000_000
    assert host_bytes(proc.parent / "nowhere") > 0  # not Linux: all the memory there is


@pytest.mark.parametrize("where", ["a", "a/b"])
def test_limits_of_every_group_count_v2(proc: Path, tmp_path: Path, where: str) -> None:
    mount = tmp_path / "cgroup"
    mounted(proc, mount, "cgroup2", "/a/b")
    stat = "anon 5\ninactive_file 1000\n"
    for folder in ("a", "a/b"):
        group(mount / folder, max="max", high="max", current="5000", stat=stat)
    assert host_bytes(proc) == 1_024_000_000
    group(mount / where, max="100000")
    assert host_bytes(proc) == 100_000 - 5_000 + 1_000
    group(mount / where, high="50000")  # beyond it a process is slowed to a crawl
    assert host_bytes(proc) == 50_000 - 5_000 + 1_000


@pytest.mark.parametrize("where", ["", "a", "a/b"])
def test_limits_of_every_group_count_v1(proc: Path, tmp_path: Path, where: str) -> None:
    mount = tmp_path / "cgroup" / "memory"
    mounted(proc, mount, "cgroup", "/a/b")
    stat = "inactive_file 7\ntotal_inactive_file 2000\n"
    for folder in ("", "a", "a/b"):
        group(mount / folder, limit_in_bytes=NONE, usage_in_bytes="5000", stat=stat)
    assert host_bytes(proc) == 1_024_000_000
    group(mount / where, limit_in_bytes="100000\n")
    assert host_bytes(proc) == 100_000 - 5_000 + 2_000


def test_a_container_sees_its_own_group_only(proc: Path, tmp_path: Path) -> None:
    """The mount's root is the container's group, as is the process's path."""
    mount = tmp_path / "cgroup"
    mounted(proc, mount, "cgroup", "/docker/abc", root="/docker/abc")
    group(mount, limit_in_bytes="90000", usage_in_bytes="5000", stat="total_inactive_file 0\n")
    assert host_bytes(proc) == 85_000


def test_a_full_group_leaves_nothing(proc: Path, tmp_path: Path) -> None:
    mounted(proc, tmp_path / "cgroup", "cgroup2", "/")
    group(tmp_path / "cgroup", max="1000", current="5000", stat="")
    assert host_bytes(proc) == 0


@pytest.mark.parametrize(
    ("line", "left"),
    [
        ("Max data size             500000000            unlimited            bytes", 489_760_000),
        ("Max address space         500000000            unlimited            bytes", 448_800_000),
        ("Max address space         unlimited            unlimited            bytes", None),
        ("Max resident set          500000000            unlimited            bytes", None),
    ],
)
def test_ulimit_counts(
    proc: Path, monkeypatch: pytest.MonkeyPatch, line: str, left: int | None
) -> None:
    monkeypatch.setattr(mx, "get_active_memory", lambda: 1)
    (proc / "self/limits").write_text(f"Limit  Soft Limit  Hard Limit  Units\n{line}\n")
    assert host_bytes(proc) == (1_024_000_000 if left is None else left)


@pytest.mark.parametrize(("openblas", "left"), [(False, 298_800_000), (True, 234_582_272)])
def test_addresses_of_the_first_thread_are_left_room_for(
    proc: Path, monkeypatch: pytest.MonkeyPatch, openblas: bool, left: int
) -> None:
    monkeypatch.setattr(device, "has_openblas", lambda: openblas)
    (proc / "self/limits").write_text("Max address space   500000000   500000000   bytes\n")
    monkeypatch.setattr(mx, "get_active_memory", lambda: 0)
    assert host_bytes(proc) == left


@pytest.mark.skipif(not PROC.exists(), reason="ulimit -v is enforced on Linux only")
def test_a_real_ulimit_is_seen() -> None:
    code = "from mlx_cerebrum.model.limits import host_bytes; print(host_bytes())"
    command = f'ulimit -v 1000000 && exec "{sys.executable}" -c "{code}"'
    done = subprocess.run(["/bin/sh", "-c", command], capture_output=True, text=True, check=True)
    assert 0 < int(done.stdout) < 1_024_000_000


def set_now() -> tuple[int, int]:
    """MLX's limits as they are: of memory, and of its buffer cache."""
    cache = mx.set_cache_limit(0)
    mx.set_cache_limit(cache)
    return mx.get_memory_limit(), cache


def test_limits_are_put_back(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(memory, "host_bytes", lambda: 10**12)
    monkeypatch.setattr(device, "backend", lambda: "cpu")
    before, free = set_now(), available_bytes()
    active = mx.get_active_memory()

    def fail() -> None:
        with limits(memory=10**9, cache=12_345_678):
            assert set_now() == (10**9, 12_345_678)
            assert available_bytes() == 10**9 - active
            with limits(memory=10**8):
                assert set_now() == (10**8, 12_345_678)
                assert available_bytes() == 10**8 - active
            assert set_now() == (10**9, 12_345_678)
            assert available_bytes() == 10**9 - active
            raise KeyError

    with pytest.raises(KeyError):
        fail()
    assert set_now() == before
    assert available_bytes() == free


def test_without_a_limit_none_is_set() -> None:
    before = set_now()
    with limits():
        assert set_now()[0] == before[0]
        assert mx.sum(mx.ones(3)).item() == 3
    assert set_now() == before


def test_a_limit_that_leaves_nothing_is_refused() -> None:
    before = set_now()
    with pytest.raises(RequestError, match="above zero"), limits(memory=0):
        pass
    assert set_now() == before


def test_what_would_exceed_the_limit_is_refused() -> None:
    with limits(memory=10**6 + mx.get_active_memory()):
        require(900_000, "this")
        with pytest.raises(MemoryBudgetError, match=r"needs 2\.0 MB and 1\.0 MB are free$"):
            require(2_000_000, "this")
        with pytest.raises(MemoryBudgetError, match=r"1\.0 MB are free \(5% of it kept back\)"):
            require(990_000, "this")


@pytest.fixture
def room(monkeypatch: pytest.MonkeyPatch) -> Any:
    def give(nbytes: float) -> None:
        monkeypatch.setattr(memory, "available_bytes", lambda: int(nbytes))

    return give


def refusal(needed: float, *settings: tuple[str, float]) -> str:
    with pytest.raises(MemoryBudgetError) as caught:
        require(int(needed), "it", "buy memory", [(flags, int(size)) for flags, size in settings])
    return str(caught.value)


def test_the_message_names_what_fits(room: Any) -> None:
    room(10e9)
    choices = [("--a", 9.6e9), ("--b", 9e9), ("--c", 8e9), ("--d", 7e9), ("--e", 1e9)]
    said = refusal(20e9, *choices)
    assert said.endswith("--b (9.00 GB) or --c (8.00 GB) or --d (7.00 GB) would fit")
    assert "20.00 GB and 10.00 GB are free" in said
    room(0.5e9)
    said = refusal(20e9, *choices)
    assert said.endswith("none of its settings would fit, even --e needs 1.00 GB; buy memory")
    assert refusal(20e9).endswith("; buy memory")
    require(int(0.4e9), "it", "buy memory", [("--a", 1)])


FORMS = [Weights("", 14_480_000_000, 0, 2), Weights("--q-bits 8", 7_690_000_000, 0, 2)]
FORMS += [Weights("--q-bits 4", 4_070_000_000, 0, 2)]


def offers(
    prompt: int, config: ModelConfig = FULL, kv_bits: int | None = None
) -> list[tuple[str, int]]:
    return Workload(config, 2, prompt, 100, 512, kv_bits).smaller(FORMS)


def test_for_each_form_the_change_that_loses_least(room: Any) -> None:
    room(16e9)
    for length in (4000, 8000):
        (first, size), *others = offers(length)
        assert first == "--kv-bits 8"
        needed = Workload(FULL, 2, length, 100, 512, kv_bits=8).bytes
        assert size == 14_480_000_000 + needed
        assert [flags for flags, _ in others] == ["--q-bits 8", "--q-bits 4"]
    room(4.9e9)  # the second does not fit, and is the smallest it can be
    assert [flags for flags, _ in offers(4000)][1:] == [
        "--q-bits 8 --kv-bits 4 --window 1024",
        "--q-bits 4 --kv-bits 8",
    ]
    assert offers(4000, kv_bits=4)[2][0] == "--q-bits 4"
    room(1e9)
    assert min(offers(4000), key=lambda offer: offer[1])[0] == (
        "--q-bits 4 --kv-bits 4 --window 1024"
    )


def test_nothing_is_offered_that_the_model_can_not(room: Any) -> None:
    room(1e9)
    raw = GEOMETRIES["cerebrum-7b"] | {"head_dim": 80, "sliding_window": 512}
    narrow = ModelConfig.from_dict(raw)  # heads of 80 can't be packed; 512 is small already
    needs = Workload(narrow, 2, 4000, 100, 512).bytes
    assert offers(4000, narrow) == [(flags, held + needs) for flags, held, _, _ in FORMS[1:]]


@pytest.fixture
def packed(checkpoint: MakeCheckpoint) -> Path:
    """A checkpoint in 4 bits, with scales in float16."""
    path = checkpoint(hidden_size=256, intermediate_size=1024, vocab_size=6000, dtype=np.float16)
    arrays: dict[str, mx.array] = {}
    for name, array in tensors(path).items():
        module = name.removesuffix(".weight")
        parts = Packing(4, 64).quantize(array) if array.ndim == 2 else {"weight": array}
        arrays |= {f"{module}.{part}": value for part, value in parts.items()}
    mx.save_safetensors(str(path / "model.safetensors"), arrays, {"format": "pt"})
    raw = config_of(path) | {"quantization": {"bits": 4, "group_size": 64}}
    (path / "config.json").write_text(json.dumps(raw))
    return path


def test_loading_packed_weights_takes_one_part_more(packed: Path) -> None:
    """As they are stored: a block's 4-bit arrays, not what they would be unpacked."""
    source = open_checkpoint(packed)
    storage = choose_storage(source, None, "float16")
    assert storage.transient <= 0.6 * max(source.config.block_parameters, 6000 * 256)
    mx.clear_cache()
    mx.synchronize()
    before = resting()
    model = load_model(source, source.config, storage)
    assert mx.get_peak_memory() - before <= 1.01 * storage.nbytes + storage.transient
    del model


def test_loading_names_the_bits_that_fit(checkpoint: MakeCheckpoint, room: Any) -> None:
    source = open_checkpoint(checkpoint(dtype=np.float16, hidden_size=256, vocab_size=6000))
    found = smaller_weights(source, None, "float16")
    assert [flag for flag, _ in found] == ["--q-bits 8", "--q-bits 4"]
    assert found[1][1].nbytes < found[0][1].nbytes < choose_storage(source, None, "float16").nbytes
    assert [flag for flag, _ in smaller_weights(source, Packing(8, 32), "float16")] == [
        "--q-bits 4"
    ]
    assert smaller_weights(source, Packing(4, 32), "float16") == []
    room(1.06 * (found[1][1].nbytes + found[1][1].transient))
    with pytest.raises(MemoryBudgetError) as caught:
        load(source.path, q_bits=8, dtype="float16")
    assert "--q-bits 4 (" in str(caught.value)
    assert str(caught.value).endswith("would fit")


def test_packed_weights_can_not_be_packed_again(packed: Path) -> None:
    assert smaller_weights(open_checkpoint(packed), None, "auto") == []


# Under a real limit: the trained demo model, packed as stored.

_ASK = ["mlx_cerebrum.generate", "--model", "demo", "--raw", "--prompt", "Once", "--json"]
_ASK += ["--max-tokens", "2", "--dtype", "float32", "--prefill-step-size", "64"]


@pytest.fixture(scope="module")
def predicted() -> int:
    from mlx_cerebrum.weights.hub import demo_path

    checkpoint = open_checkpoint(demo_path())
    storage = choose_storage(checkpoint, None, "float32")
    request = Workload(checkpoint.config, storage.dtype.size, 3, 2, prefill_step())
    return storage.nbytes + max(request.bytes, storage.transient)


@pytest.fixture(scope="module")
def started() -> dict[str, int]:
    """What the process has taken by the time it asks for memory, by the name the kernel gives."""
    code = (
        "import json, mlx_cerebrum.generate;"
        "from mlx_cerebrum.weights.opening import ModelSpec, open_model;"
        "opened = open_model(ModelSpec('demo'));"
        "opened.tokenizer.encode('Once');"  # its tables are made when they are first asked for
        "from mlx_cerebrum.model.limits import PROC, sizes;"
        "print(json.dumps(sizes(PROC / 'self/status')))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    found: dict[str, int] = json.loads(done.stdout)
    return found


@pytest.fixture(params=["cgroup", "ulimit"])
def kind(request: pytest.FixtureRequest, demo: Path) -> str:
    if not PROC.exists():
        pytest.skip("limits are set and read as Linux does")
    with memory_limit.cgroup(10**9) as folder:
        if request.param == "cgroup" and folder is None:
            pytest.skip("no memory cgroup can be made here")
    return str(request.param)


def taken(kind: str, started: dict[str, int]) -> int:
    """What counts towards the limit besides what is predicted: freed buffers MLX keeps, too."""
    own = started["VmRSS"] if kind == "cgroup" else started["VmSize"] + first_evaluation()["VmSize"]
    return own + set_now()[1]


@slow
def test_it_runs_in_what_was_predicted(kind: str, predicted: int, started: dict[str, int]) -> None:
    limit = taken(kind, started) + int(1.1 * predicted)
    outcome = memory_limit.run(_ASK, limit, kind)
    assert outcome.code == 0, outcome
    assert (outcome.kind, outcome.tokens) == (kind, 2)
    assert predicted / 2 < outcome.peak <= 1.05 * (predicted + started["VmRSS"])


@slow
def test_it_is_refused_below_that(kind: str, predicted: int, started: dict[str, int]) -> None:
    limit = taken(kind, started) + predicted // 2
    outcome = memory_limit.run(_ASK, limit, kind)
    assert outcome.code == 2, outcome
    assert outcome.said.startswith("error: the model")
    assert "are free" in outcome.said
    assert outcome.peak < started["VmRSS"] + predicted / 2  # no weights were read


def test_what_goes_beyond_a_cgroup_is_killed(kind: str) -> None:
    """The limit is real: a process that asks for nothing first dies, or is refused memory."""
    outcome = memory_limit.run(["timeit", "-n1", "-r1", "b'x' * 10**9"], 3 * 10**8, kind)
    assert outcome.code == (-9 if kind == "cgroup" else 1)
    assert outcome.peak <= 3.1 * 10**8
    assert not [group for group in cgroups() if (group / f"mlx-cerebrum-{os.getpid()}").exists()]


def test_the_arithmetic_of_an_8_gb_mac(capsys: pytest.CaptureFixture[str]) -> None:
    assert memory_limit.main([]) == 0
    said = capsys.readouterr().out
    rows = [line.split("|")[1:-1] for line in said.splitlines() if line.startswith("| ")][2:]
    found = {(int(r[0]), int(r[1])): [float(cell) for cell in r[2:6]] for r in rows}
    assert set(found) == {(c, b) for c in memory_limit.CONTEXTS for b in (16, 8, 4)}
    for weights, caches, computing, total in found.values():
        assert weights == 4.07
        assert total == pytest.approx(weights + caches + computing, abs=0.02)
        assert total < 0.95 * memory_limit.MAC_8GB / 1e9
    # 224 KiB a token in 16 bits: 0.875 GiB in a full window, and room to grow.
    assert found[4096, 16][1] == pytest.approx(4096 * 229_376 / 1e9, rel=0.07)
    assert found[4096, 8][1] / found[4096, 16][1] == pytest.approx(8.5 / 16, abs=0.01)
    assert found[4096, 4][1] / found[4096, 16][1] == pytest.approx(4.5 / 16, abs=0.01)


def test_the_command_says_how_it_went(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    asked: list[Any] = []

    def run(arguments: list[str], limit: int, kind: str | None) -> memory_limit.Outcome:
        asked.append((arguments, limit, kind))
        return memory_limit.Outcome("cgroup", limit, -9, 10**9, 1.5, 0, "")

    monkeypatch.setattr(memory_limit, "run", run)
    code = memory_limit.main(["--model", "x", "--limit-gb", "1.5", "--", "--kv-bits", "8"])
    assert code == 1
    arguments, limit, kind = asked[0]
    assert arguments[-2:] == ["--kv-bits", "8"]
    assert (limit, kind) == (1_500_000_000, None)
    assert "cgroup of 1.50 GB: ended with -9" in capsys.readouterr().out


def test_sizes_are_read_in_bytes(tmp_path: Path) -> None:
    (tmp_path / "status").write_text("Name:\tx\nVmHWM:\t     12 kB\nThreads:\t3\n")
    assert sizes(tmp_path / "status") == {"VmHWM": 12 * 1024}


KEPT = """
from pathlib import Path
import mlx.core as mx
from mlx_cerebrum.model.limits import release

def held():
    return int(Path("/proc/self/statm").read_text().split()[1]) * 4096

def array(megabytes):
    made = mx.zeros(megabytes * 2**20 // 4) + 1
    mx.eval(made)
    return made

mx.set_cache_limit(0)
array(20)  # freed at once: smaller ones are taken from malloc's heap from now on
arrays, last = [array(1) for _ in range(400)], array(1)
del arrays
kept = held()
release()
print(kept, held())
"""


@pytest.mark.skipif(sys.platform != "linux", reason="only glibc's malloc is asked")
def test_release_gives_back_what_malloc_keeps() -> None:
    done = subprocess.run([sys.executable, "-c", KEPT], capture_output=True, text=True)
    kept, held = map(int, done.stdout.split())
    assert kept > 400e6 > 200e6 > held
