"""`python tests/pull_at_full_size.py DIR`: a 7B pulled from a stand-in hub, killed ten times.

Some minutes, and 25 GB of disk in DIR: random weights of the 7B's shapes in three files of up to 5
GB, made the first time, are served on loopback, and `mlx-cerebrum pull` fetches them as if the disk
had no room for two. Linux. Prints one JSON object: bytes fetched twice, the most disk and memory
held, seconds. Remove DIR afterwards.
"""

import json
import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np
from conftest import byte_tokenizer
from hub_stand_in import REPO, serving

from bench.random_model import GEOMETRIES, RandomCheckpoint
from mlx_cerebrum.weights.safetensors_file import header_bytes

SHARD = 5_000_000_000
KILLS = 10
# As `mlx-cerebrum pull` where the disk is tight: the next file waits for the one before.
PULL = """
import sys
from convert import arriving
from convert.pull import main
arriving._SLACK = 1 << 60
sys.exit(main(sys.argv[1:]))
"""


def write(directory: Path) -> list[Path]:
    """The repository; its weight files."""
    directory.mkdir()
    raw = GEOMETRIES["cerebrum-7b"]
    source = RandomCheckpoint(directory, raw)
    shards: list[list[str]] = [[]]
    held = 0
    for name, shape in source.shapes.items():
        nbytes = 2 * int(np.prod(shape))
        if held + nbytes > SHARD:
            shards.append([])
            held = 0
        shards[-1].append(name)
        held += nbytes
    files: list[Path] = []
    weight_map: dict[str, str] = {}
    for number, names in enumerate(shards, 1):
        path = directory / f"model-{number:05d}-of-{len(shards):05d}.safetensors"
        tensors = {name: ("BF16", source.shapes[name]) for name in names}
        with path.open("wb") as file:
            file.write(header_bytes(tensors, {"format": "pt"}))
            for name in names:
                array = source.read(name.removesuffix(".weight"))["weight"]
                file.write(np.asarray(array.view(mx.uint16)).tobytes())
        weight_map |= dict.fromkeys(names, path.name)
        files.append(path)
    index = {"metadata": {}, "weight_map": weight_map}
    (directory / "model.safetensors.index.json").write_text(json.dumps(index))
    (directory / "config.json").write_text(json.dumps(raw))
    byte_tokenizer(directory)
    return files


class Watch:
    """The most bytes a folder's files take on the disk, looked at all the time."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.most = folder, 0
        threading.Thread(target=self._run, daemon=True).start()

    def _run(self) -> None:
        while True:
            self.most = max(self.most, self.now())
            time.sleep(0.02)

    def now(self) -> int:
        sizes = {}
        for path in self.folder.rglob("*"):
            try:
                stat = path.lstat()
            except OSError:  # just removed
                continue
            sizes[stat.st_ino] = 512 * stat.st_blocks
        return sum(sizes.values())


def held_by(pid: int) -> int:
    """The most memory a process has held, in bytes; 0 where it is gone."""
    try:
        text = Path(f"/proc/{pid}/status").read_text()
    except OSError:
        return 0
    lines = (line.split() for line in text.splitlines())
    return next((1024 * int(words[1]) for words in lines if words[0] == "VmHWM:"), 0)


def main(where: Path) -> dict[str, Any]:
    where.mkdir(exist_ok=True)
    files = sorted((where / "repo").glob("*.safetensors")) or write(where / "repo")
    whole = sum(file.stat().st_size for file in files)
    models = where / f"models-{os.getpid()}"
    models.mkdir()
    watch, started, kills, memory = Watch(models), time.perf_counter(), 0, 0
    with serving(where / "repo", REPO) as hub:
        for file in files:
            hub.hashes(file)
        env = os.environ | {"HF_ENDPOINT": hub.address, "HF_HOME": str(where / "hf")}
        env["MLX_CEREBRUM_MODELS"] = str(models)
        command = [sys.executable, "-c", PULL, "cerebrum-12.25b", "--bits", "4", "--yes"]
        started = time.perf_counter()
        while True:
            until = hub.sent.total() + whole // (KILLS + 1)
            with subprocess.Popen(command, env=env, cwd=Path(__file__).parents[1]) as pulling:
                while pulling.poll() is None and (kills == KILLS or hub.sent.total() < until):
                    memory = max(memory, held_by(pulling.pid))
                    time.sleep(0.005)
                if pulling.poll() is None:
                    pulling.send_signal(signal.SIGKILL)
                    kills += 1
            if pulling.returncode not in (0, -signal.SIGKILL):
                raise SystemExit(pulling.returncode)
            if pulling.returncode == 0:
                break
        twice = sum(hub.sent[file.name] for file in files) - whole
    result = watch.now()
    largest = max(file.stat().st_size for file in files)
    return {
        "source_bytes": whole,
        "result_bytes": result,
        "kills": kills,
        "fetched_twice_bytes": twice,
        "fetched_twice_bytes_a_kill": twice // max(1, kills),
        "most_disk_bytes": watch.most,
        "most_disk_beyond_result_and_largest_file": watch.most - result - largest,
        "most_memory_bytes": memory,
        "seconds": round(time.perf_counter() - started, 1),
    }


if __name__ == "__main__":
    print(json.dumps(main(Path(sys.argv[1])), indent=2))
