"""How long does the command line take to answer, against `import torch`?

    python benchmarks/start.py --rounds 9

Help and a wrong call need neither torch nor pandas, so they should answer in at most half the time that `import torch` takes. Each
round starts every process once, in turn; what is printed is the median over the rounds and its ratio to that of `import torch`.
"""
import argparse, os, statistics, subprocess, sys, tempfile, time
from pathlib import Path

MAIN = "from lal.app.cli import main; main()"
CALLS = {
    "lal --help": (0, ["--help"]),
    "lal nonsense": (2, ["nonsense"]),
    "lal configs": (0, ["configs"]),
    "lal train quikstart": (2, ["train", "quikstart"]),
    "lal train quickstart --set lrr=3": (2, ["train", "quickstart", "--set", "lrr=3"]),
    "lal train my.yaml": (2, ["train", "my.yaml"]),
}


def seconds(words: list[str], folder: str, expect: int = 0) -> float:
    began = time.perf_counter()
    done = subprocess.run([sys.executable, *words], cwd=folder, capture_output=True, text=True)
    assert done.returncode == expect, (words, done.returncode, done.stderr)
    return time.perf_counter() - began


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=9)
    rounds = parser.parse_args().rounds
    jobs = {"import torch": (0, ["-c", "import torch"])}
    jobs |= {name: (code, ["-c", MAIN, *words]) for name, (code, words) in CALLS.items()}
    with tempfile.TemporaryDirectory() as folder:
        (Path(folder) / "my.yaml").write_text("train_frac: 1.5\n")
        for code, words in jobs.values(): seconds(words, folder, code)  # warm the disk's cache
        took = {name: [] for name in jobs}
        for _ in range(rounds):
            for name, (code, words) in jobs.items(): took[name].append(seconds(words, folder, code))
    base = statistics.median(took["import torch"])
    print(f"median of {rounds} rounds on {os.cpu_count()} cores, Python {sys.version.split()[0]}")
    for name, times in took.items():
        middle = statistics.median(times)
        print(f"{name:34s} {middle:6.2f} s  {middle / base:5.2f} × import torch")


if __name__ == "__main__":
    main()
