"""What hooks cost: each hook per firing, and sets of them at their default schedules.

    python benchmarks/hooks.py [--threads 1] [--rounds 3] [--device auto] [--only quickstart] [--sets]

First part: a short run with one hook at a time, at every step and epoch. Its calls are measured one by one, and so is a plain gradient of the same
batch, in turn: a firing is given in milliseconds and in gradients. Then the same for the guard's checks, two of which go with each event at which a hook fires.

Second part: loops train the same network on the same batches, one bare, one of the package without hooks, the others watched by one set each, with the options
that hooks have by default, and the log points of the configuration. They take turns of a hundred steps; ten turns, a round, hold one burst of the Hessian hook.
Ratios are those of the seconds of a round: to the loop without hooks, which measures at the same log points, and the hooks' share in seconds of the bare loop.
Contract (design, 02-hooks): that share is at most 3 % for the observers, and 12 % for all.
"""

import argparse, statistics, tempfile, time
import torch
from loop import bare  # the script beside this one
from lal.core.config import load_config, one_per_seed, with_values
from lal.core.device import device_name, resolve_device
from lal.core.experiment import find_experiment
from lal.core.recorder import Recorder
from lal.core.run import create_run
from lal.core.state import POST_EPOCH, POST_STEP, PRE_EPOCH, train_step
from lal.core.trainer import epoch_loop
from lal.hooks.guard import fingerprint
from lal.hooks.hook import declared_options
from lal.hooks.registry import REGISTRY, SETS, create_hooks
from lal.hooks.runner import Hooks

CONFIGS = {  # name on the command line: shipped configuration, and what is changed
    "quickstart": ("quickstart", {}),
    "quickstart_every_tenth": ("quickstart", {"log_every": 10}),
    "validate_transformer": ("validate_transformer", {}),
    "validate_transformer_in_batches": ("validate_transformer", {"batch_size": 51}),  # four steps an epoch
}
TURN, TURNS = 100, 10  # steps in a turn, turns in a round: one burst of the Hessian hook


def timed(work, wait) -> float:
    "Seconds: of this process on a CPU, whoever else is busy there; by the clock on a GPU."
    clock = time.perf_counter if torch.cuda.is_initialized() else time.process_time
    wait()
    began = clock()
    work()
    wait()
    return clock() - began


def firings(config, device, steps, wait) -> None:
    "Milliseconds and gradients for one firing of each hook."
    print(f"\n{'':32s}       ms  gradients (quartiles)")
    for name, cls in REGISTRY.items():
        always = {k: 1 for k in ("every_n_steps", "every_n_epochs") if k in declared_options(cls)}
        variants = {name: always}
        if name == "hessian": variants = {f"hessian, {s}, no check": {**always, "scheme": s, "check_every": None} for s in ("forward", "central", "exact")}
        for label, options in variants.items(): one_hook(label, cls(**options), config, device, steps, wait)
    state = find_experiment(config.experiment).build(config, device)
    train_step(state, state.batches.of_epoch(), config.grad_clip)
    for label, complete in (("quick", False), ("complete", True)):
        pairs = [(timed(lambda: plain_gradient(state), wait), timed(lambda: fingerprint(state, complete), wait)) for _ in range(steps)]
        row(f"{label} fingerprint", [b for _, b in pairs], [b / a for a, b in pairs])


def plain_gradient(state):
    state.model.zero_grad()
    state.loss_fn(state.model, state.batch).backward()


def one_hook(label, hook, config, device, steps, wait) -> None:
    "All calls of one hook at one event, with a plain gradient of the same batch after each step."
    state = find_experiment(config.experiment).build(config, device)
    hooks, gradients = Hooks([hook], profile=True), []
    hooks.check(config, state)
    for _ in range(steps):
        if state.batches.at_start:
            state.epoch += 1
            hooks.fire(PRE_EPOCH, state)
        train_step(state, state.batches.of_epoch(), config.grad_clip, hooks.fire)
        hooks.fire(POST_STEP, state)
        if state.batches.at_start: hooks.fire(POST_EPOCH, state)
        gradients.append(timed(lambda: plain_gradient(state), wait))
    middle = statistics.median(gradients)
    for (_, event), found in hooks.times.seconds.items(): row(f"{label} ({event})", found, [t / middle for t in found])


def row(label, seconds, ratios) -> None:
    low, _, high = statistics.quantiles(ratios)
    print(f"{label:32s} {1e3 * statistics.median(seconds):8.3f}  {statistics.median(ratios):.3f} ({low:.3f} – {high:.3f})")


class Silent(Recorder):
    "A recorder that saves no checkpoint at the end of a turn; rows are written when it is time, as in any run."

    def save(self, file=None): pass


def loop(config, device, hooks):
    "A turn of the package's loop."
    state = find_experiment(config.experiment).build(config, device)
    folder, epochs = create_run(tempfile.mkdtemp(), config, {}), TURN // -(-state.batches.n // (config.batch_size or state.batches.n))
    if hooks is not None:
        hooks.check(config, state)
        hooks.open(folder)
    recorder = Silent(config, state, folder, hooks)

    def turn():
        recorder.config = with_values(config, until=recorder.now + epochs)
        epoch_loop(recorder, [])

    return turn


def sets(config, device, rounds, wait) -> None:
    "Overhead of each set."
    works = {"bare": bare(config, device, TURN)} | {n: loop(config, device, create_hooks(with_values(config, hooks=n))) for n in SETS}
    seconds = {label: [] for label in works}
    for _ in range(rounds):
        spent = dict.fromkeys(works, 0.0)
        for _ in range(TURNS):
            for label, work in works.items(): spent[label] += timed(work, wait)
        for label, found in spent.items(): seconds[label].append(found)
    print(f"\n{'':16s} µs per step  ratio to none (each round)      hooks' share of the bare loop (each round)")
    for label, found in seconds.items():
        ratios = [t / n for t, n in zip(found, seconds["none"])]
        shares = [(t - n) / b for t, n, b in zip(found, seconds["none"], seconds["bare"])]
        told = (", ".join(f"{x:.3f}" for x in sorted(ratios)), ", ".join(f"{x:+.1%}" for x in sorted(shares)))
        print(f"{label:16s} {1e6 * statistics.median(found) / TURN / TURNS:11.0f}  {told[0]:30s}  {told[1] if label != 'bare' else ''}")


def main() -> None:
    words = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    words.add_argument("--threads", type=int, default=1)
    words.add_argument("--rounds", type=int, default=3)
    words.add_argument("--device", default="auto")
    words.add_argument("--only", choices=CONFIGS)
    words.add_argument("--sets", action="store_true", help="the second part alone")
    chosen = words.parse_args()
    torch.set_num_threads(chosen.threads)
    device = resolve_device(chosen.device)
    wait = torch.cuda.synchronize if device.type == "cuda" else lambda: None
    for name in [chosen.only] if chosen.only else CONFIGS:
        shipped, changes = CONFIGS[name]
        config = with_values(one_per_seed(load_config(shipped))[0], **changes, epochs=10**9, checkpoint_every=10**9, hooks="none")
        print(f"\n{name}")
        if not chosen.sets: firings(config, device, 100, wait)
        sets(config, device, chosen.rounds, wait)
    print(f"\nran on {device_name(device)}, torch {torch.__version__}")


if __name__ == "__main__":
    main()
