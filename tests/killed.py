"""Kill training runs with SIGKILL, resume them, and compare what they end with.

    python tests/killed.py --rounds 20 --seed 0

Each round trains one random small configuration without interruption, and once more with several deaths: at a random
instant, by SIGTERM, at a random change of the disk, in the middle of writing rows, in the middle of writing a checkpoint. At the end
every table, the weights, optimizer and generators of the last checkpoint, the best weights, the text files of hooks and the
names of all files must be equal, value for value. Half of the runs are watched by the package's hooks too. Exits with 1 when they are not.
"""
import argparse, os, random, shutil, signal, sys, tempfile, time, traceback
from collections import Counter
from pathlib import Path
import pandas as pd
import torch
from torch import nn
import lal.core.files, lal.core.run, lal.core.tables, lal.modular.models
from lal.core.config import make_config
from lal.core.errors import Interrupted
from lal.core.files import digest, load_checkpoint
from lal.core.run import RunFolder, checkpoints
from lal.core.trainer import Trainer
from lal.hooks.registry import create_hooks

KINDS = ("at a random instant by SIGKILL", "at a random instant by SIGTERM", "at a change of the disk", "in the middle of writing rows", "in the middle of writing a checkpoint")


STOPPED = 4  # exit code of a run that was asked to stop


class Probe:
    "A hook with a state; rows for every step and epoch, held back until the flush as if they lay on a device."

    def __init__(self): self.mean, self.held = 0.0, []

    def fire(self, point, state):
        row = {"epoch": state.epoch, "step": state.step}
        if point == "post_step":
            self.mean = 0.9 * self.mean + 0.1 * float(state.loss)
            self.held.append(("hooks/probe", row | {"mean_loss": self.mean, **({"late": 1} if state.step > 30 else {})}))
        if point in ("pre_epoch", "post_epoch", "snapshot"):
            self.held.append((f"hooks/{point}", row | {"batches": state.batches.passes}))

    def open(self, folder): self.folder = folder

    def flush(self):
        for name, row in self.held: self.folder.table(name).append(row)
        self.held = []

    def state_dict(self): return {"mean": self.mean}

    def load_state_dict(self, saved): self.mean = saved["mean"]


class Both:
    "The probe, and the hooks that the configuration asks for."

    def __init__(self, config): self.probe, self.hooks = Probe(), create_hooks(config)

    def check(self, *a): self.hooks.check(*a)

    def fire(self, point, state):
        self.probe.fire(point, state)
        self.hooks.fire(point, state)

    def open(self, folder):
        self.probe.open(folder)
        self.hooks.open(folder)

    def flush(self):
        self.probe.flush()
        self.hooks.flush()

    def state_dict(self): return {"probe": self.probe.state_dict(), "hooks": self.hooks.state_dict()}

    def load_state_dict(self, saved):
        self.probe.load_state_dict(saved["probe"])
        self.hooks.load_state_dict(saved["hooks"])


def random_hooks(rng: random.Random) -> dict:
    "Keys for the hooks of half of the runs; bursts are short, and follow each other closely."
    if rng.random() < 0.5: return {}
    every = rng.randint(2, 9)
    hessian = {"every_n_steps": every, "burst_length": rng.randint(2, every), "scheme": rng.choice(["forward", "central", "exact"]), "check_every": rng.choice([None, 3]), "displacement": rng.random() < 0.5}
    return dict(hooks={"full": {}, "hessian": hessian}, sinks=["jsonl", "csv"], offload_hooks=rng.random() < 0.5)


def random_config(rng: random.Random):
    "A run of about a second, dropout in half of them."
    by_steps = rng.random() < 0.5
    length = rng.randint(60, 120) if by_steps else rng.randint(12, 24)
    unit = {"steps": length} if by_steps else {"epochs": length}
    every = length // 5 if by_steps else 3
    return make_config(
        name="run", p=rng.choice([11, 13]), model_type=rng.choice(["baseline", "transformer"]), hidden_dim=16, n_layers=1, n_heads=2,
        batch_size=rng.choice([16, 17, 40]), ordering=rng.choice(["random", "fixed-random", "stride", "target"]), lr=3e-3, optimizer=rng.choice(["adamw", "sgd"]),
        momentum=0.9, scheduler=rng.choice(["constant", "cosine"]), min_lr=1e-5, grad_clip=rng.choice([None, 1.0]), log_every=rng.choice([1, 2, 5]), snapshot_every=7,
        checkpoint_every=every, threads=1, device="cpu", seed=rng.randint(0, 999), **unit, **random_hooks(rng),
    )  # fmt: skip


def die() -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def count_changes(at: int | None) -> list:
    "Count what the process changes on the disk, and die at change number `at`, before or after it."
    done = [0]

    def counted(change):
        def wrapped(*a, **o):
            done[0] += 1
            if at is not None and done[0] - 1 == at // 2 and at % 2: die()
            result = change(*a, **o)
            if at is not None and done[0] - 1 == at // 2: die()
            return result
        return wrapped

    os.replace, os.fsync = counted(os.replace), counted(os.fsync)
    Path.unlink, Path.rmdir = counted(Path.unlink), counted(Path.rmdir)
    return done


def die_writing(which: str, number: int) -> None:
    "Die when half of the `number`-th file whose path contains `which` is written."
    whole, seen = lal.core.files.write_whole, [0]

    def write_whole(path, write):
        def half(draft):
            write(draft)
            if which in str(path):
                seen[0] += 1
                if seen[0] == number:
                    os.truncate(draft, draft.stat().st_size // 2)
                    die()
        whole(path, half)

    for module in (lal.core.files, lal.core.run, lal.core.tables): module.write_whole = write_whole


def in_a_child(work) -> int:
    "Run `work` in a forked process; its exit code, negative for a signal. 3 is an error in `work`."
    sys.stdout.flush()
    if not (child := os.fork()):
        try:
            work()
            os._exit(0)
        except Interrupted:
            os._exit(STOPPED)
        except BaseException:
            traceback.print_exc()
            os._exit(3)
    return child


def wait(child: int) -> int:
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


def train(config, root: Path, dropout: bool) -> None:
    lal.core.run.FLUSH_SECONDS = 0.01
    make = lal.modular.models.create_model

    def with_dropout(c):
        model = make(c)
        if dropout and c.model_type == "baseline": model.hidden.append(nn.Dropout(0.2))
        return model

    lal.modular.models.create_model = with_dropout
    run = root / config.name
    hooks = Both(config) if config.hooks else Probe()
    Trainer(config, root, hooks=hooks).fit(resume=RunFolder(run).is_run)


def differences(one: Path, two: Path) -> list[str]:
    "What two finished runs do not have in common."
    found = []
    names = [sorted(f.relative_to(run).as_posix() for f in run.rglob("*")) for run in (one, two)]
    if names[0] != names[1]: found.append(f"files: {sorted(set(names[0]) ^ set(names[1]))}")
    for name in RunFolder(two).table_names():
        rows = [RunFolder(run).table(name).read() for run in (one, two)]
        try: pd.testing.assert_frame_equal(*rows, check_exact=True)
        except AssertionError as error: found.append(f"{name}: {' '.join(str(error).split())[:200]}")
    for file in sorted(f.relative_to(two) for kind in ("jsonl", "csv") for f in two.glob(f"hooks/*.{kind}")):
        if not (one / file).exists() or (one / file).read_bytes() != (two / file).read_bytes(): found.append(f"{file}: other bytes")
    for file in ("best.pt", *(f.name for f in checkpoints(two))):
        states = [load_checkpoint(run / "checkpoints" / file) for run in (one, two)]
        for state in states: state.pop("seconds", None)
        for key in states[1]:
            if digest(states[0][key]) != digest(states[1][key]): found.append(f"{file}: {key}")
    return found


def one_round(number: int, rng: random.Random, deaths: int, counts: Counter) -> list[str]:
    place = Path(tempfile.mkdtemp())
    config, dropout = random_config(rng), rng.random() < 0.5
    changes = place / "changes"

    def straight():
        done = count_changes(None)
        train(config, place / "straight", dropout)
        changes.write_text(str(done[0]))

    began = time.monotonic()
    if wait(in_a_child(straight)): return ["the uninterrupted run failed"]
    seconds, n = time.monotonic() - began, int(changes.read_text())
    for death in range(deaths):
        kind = KINDS[(number + death) % len(KINDS)]
        at, part = rng.randrange(2 * n), rng.randint(1, 4)

        def victim():
            if kind == KINDS[2]: count_changes(at)
            if kind == KINDS[3]: die_writing(".parts", part)
            if kind == KINDS[4]: die_writing("checkpoints", part)
            train(config, place / "killed", dropout)

        child = in_a_child(victim)
        if kind in KINDS[:2]:
            time.sleep(rng.random() * seconds)
            os.kill(child, signal.SIGKILL if kind == KINDS[0] else signal.SIGTERM)
        code = wait(child)
        if code not in (0, STOPPED, -signal.SIGTERM, -signal.SIGKILL): return [f"a resumed run failed with {code}"]
        if code: counts[kind] += 1
        shutil.rmtree(place / "copy", ignore_errors=True)
        if (place / "killed/run").exists() and wait(in_a_child(lambda: readable(place / "killed/run"))): return ["a killed run could not be read"]
    if wait(in_a_child(lambda: train(config, place / "killed", dropout))): return ["the last resume failed"]

    def compare():
        found = differences(place / "killed/run", place / "straight/run")
        (place / "found").write_text("\n".join(found))

    if wait(in_a_child(compare)): return ["the comparison failed"]
    found = (place / "found").read_text().splitlines()
    if not found: shutil.rmtree(place)
    return [*found, f"(kept in {place})"] if found else []


def readable(run: Path) -> None:
    "A killed run is readable as it lies there."
    folder = RunFolder(run)
    for name in folder.table_names():
        rows = lal.core.tables.read_table(run / f"{name}.parquet")
        assert rows is None or rows.step.is_monotonic_increasing


def main() -> None:
    words = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    words.add_argument("--rounds", type=int, default=20)
    words.add_argument("--deaths", type=int, default=5, help="attempts to kill in each round")
    words.add_argument("--seed", type=int, default=0)
    chosen = words.parse_args()
    torch.set_num_threads(1)
    rng, counts, bad = random.Random(chosen.seed), Counter(), 0
    for number in range(chosen.rounds):
        if found := one_round(number, rng, chosen.deaths, counts):
            bad += 1
            print(f"round {number}: NOT EQUAL\n  " + "\n  ".join(found))
    print(f"{chosen.rounds} runs killed {sum(counts.values())} times: " + ", ".join(f"{counts[kind]} {kind}" for kind in KINDS))
    print("all equal to runs that nobody killed" if not bad else f"{bad} NOT EQUAL")
    sys.exit(bad > 0)


if __name__ == "__main__":
    main()
