"""Memory of a fit on a file whose rows stay in it, beside the same fit with all of them in memory: each in a process of
its own, with the peak of what was resident, and of what of that was no mapped file.

Rows of 5 to 100 words with one of two labels, a BERT of two layers and width 32, 20 steps. The ratio is the memory that
a fit takes beyond an idle process, in memory over streamed. The losses must be the same.
"""

import json
import os
import random
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path
from typing import Any

from common import Bench

HERE = Path(__file__).parent
SIDES = {"streamed": 0.0, "in memory": 1e15}


def rows(place: Path, n_bytes: int) -> int:
    """Writes a CSV file of so many bytes; how many rows it has."""
    from tiny_text import WORDS

    draw, n = random.Random(0), 0
    words = [word for topic in WORDS.values() for word in topic]
    texts = [" ".join(draw.choices(words, k=draw.randint(5, 100))) for _ in range(5000)]
    with place.open("w", encoding="utf-8") as file:
        file.write("text,label\n")
        while file.tell() < n_bytes:
            file.writelines(f"{text} {n + k},{'yes' if k % 2 else 'no'}\n" for k, text in enumerate(texts))
            n += len(texts)
    return n


def taken() -> tuple[int, int]:
    """Bytes of the process in memory: all, and those that belong to no file."""
    words = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text(encoding="ascii").splitlines())
    all_of_it, anonymous = (int(words[name].split()[0]) * 1024 for name in ("VmRSS", "RssAnon"))
    return all_of_it, anonymous


def fitted(base: str, file: str, most: float) -> dict[str, Any]:
    """A short fit; its losses, what it took."""
    import torch

    import lorakit as lk
    from lorakit.data import load_splits

    torch.set_num_threads(1)
    lk.fit(base, [{"text": f"a {k}", "label": str(k % 2)} for k in range(60)], max_steps=2, threads=1)
    idle, peaks, done = taken(), [0, 0], threading.Event()

    def look() -> None:
        while not done.wait(0.01):
            peaks[:] = map(max, peaks, taken())

    watcher = threading.Thread(target=look)
    watcher.start()
    began = time.perf_counter()
    data = load_splits(file, most_in_memory=int(most))
    read = time.perf_counter() - began
    settings: dict[str, Any] = {"max_steps": 20, "batch_size": 16, "epochs": 1, "threads": 1, "truncate": True}
    result = lk.fit(base, data, learning_rate=1e-3, prefix="off", **settings)
    done.set()
    watcher.join()
    return {
        "losses": [record["loss"] for record in result.records],
        "digest": data.train.digest(),
        "idle": idle[1],
        "anonymous": peaks[1],
        "resident": peaks[0],
        "read_s": read,
        "total_s": time.perf_counter() - began,
        "form": type(data.train).__name__,
    }


def main() -> None:
    """Both sides."""
    bench = Bench(__doc__ or "")
    size = bench.rounds(80, 25) * 10**6
    sys.path.insert(0, str(HERE.parent / "tests"))
    from tiny_text import tiny_bert

    with tempfile.TemporaryDirectory() as folder:
        place = Path(folder)
        tiny_bert(place / "base", max_length=128)
        n = rows(place / "rows.csv", size)
        n_bytes = (place / "rows.csv").stat().st_size
        bench.fact("rows", n)
        bench.fact("file MB", round(n_bytes / 1e6))
        found = {}
        paths = {"PYTHONPATH": os.pathsep.join([str(HERE), *sys.path]), "XDG_CACHE_HOME": str(place / "cache")}
        for name, most in SIDES.items():
            command = [sys.executable, "-W", "ignore", __file__, "--side", str(place / "base"), str(place / "rows.csv")]
            done = subprocess.run(
                [*command, str(most)], stdout=subprocess.PIPE, text=True, check=True, env={**os.environ, **paths}
            )
            own = found[name] = json.loads(done.stdout.splitlines()[-1])
            bench.fact(f"{name}: form of the training rows", own["form"])
            for word in ("idle", "anonymous", "resident"):
                bench.fact(f"{name}: {word} MB", round(own[word] / 1e6))
            bench.fact(f"{name}: taken for each byte of the file", round((own["anonymous"] - own["idle"]) / n_bytes, 2))
            bench.fact(f"{name}: bytes a row", round((own["anonymous"] - own["idle"]) / n))
            bench.fact(f"{name}: reading s, all s", [round(own["read_s"], 1), round(own["total_s"], 1)])
        one, other = found["streamed"], found["in memory"]
        bench.fact("same losses and digest", (one["losses"], one["digest"]) == (other["losses"], other["digest"]))
        theirs, ours = (own["anonymous"] - own["idle"] for own in (other, one))
        bench.ratio("memory beyond an idle process, in memory over streamed", [theirs / ours])
    bench.done()


if __name__ == "__main__":
    if sys.argv[1:2] == ["--side"]:
        print(json.dumps(fitted(sys.argv[2], sys.argv[3], float(sys.argv[4]))))
    else:
        main()
