"""What hooks cost: each hook per firing, and sets at their default schedules against the bare loop.

    python benchmarks/hooks.py [--threads 1] [--rounds 20] [--device auto]

First part: the state stands still after some epochs of training, and every hook is called at its points, in turn with one plain gradient of
the same batch, so that a firing is given in milliseconds and in gradients. Then the same for the guard's own checks.

Second part: several loops train the same network on the same batches, a thousand steps in each turn, one bare, the others
watched by one set each, with the options that the hooks have by default; log points every hundred epochs. Ratios to the bare loop come from turns that follow each other.
"""

import argparse, statistics, tempfile, time
import torch
from loop import CASES, bare  # the script beside this one
from lal.core.config import make_config, with_values
from lal.core.device import device_name, resolve_device
from lal.core.experiment import find_experiment
from lal.core.recorder import Recorder
from lal.core.run import create_run
from lal.core.state import POST_EPOCH, POST_STEP, PRE_EPOCH, take_rows, train_step
from lal.core.trainer import epoch_loop
from lal.hooks.guard import fingerprint
from lal.hooks.hook import Needs, events_of
from lal.hooks.registry import REGISTRY, SETS, create_hooks
from lal.hooks.runner import Hooks

BLOCK = 1000  # steps in a turn of the second part: one burst of the Hessian hook


def timed(work, wait) -> float:
    wait()
    began = time.perf_counter()
    work()
    wait()
    return time.perf_counter() - began


def firings(config, device, rounds, wait) -> None:
    "Milliseconds and gradients for one firing of each hook."
    state = find_experiment(config.experiment).build(config, device)
    for _ in range(50): train_step(state, state.batches.of_epoch(), config.grad_clip)
    while not state.batches.at_start: train_step(state, state.batches.of_epoch(), config.grad_clip)
    batch = take_rows(state.batches.data, torch.arange(config.batch_size or state.batches.n, device=device))

    def one_gradient():
        state.model.zero_grad()
        state.loss_fn(state.model, batch).backward()

    works = {}
    for name, cls in REGISTRY.items():
        always = {k: 1 for k in ("every_n_steps", "every_n_epochs") if k in cls().__dict__}
        variants = {name: always}
        if name == "hessian": variants = {f"hessian, {s}, no check": {**always, "scheme": s, "check_every": None} for s in ("forward", "central", "exact")}
        for label, options in variants.items():
            works[label] = one_firing(cls(**options), state, config)
    works["quick check"] = lambda: (fingerprint(state, False), fingerprint(state, False))
    works["complete check"] = lambda: (fingerprint(state), fingerprint(state))
    seconds, base = {label: [] for label in works}, {label: [] for label in works}
    for turn in range(rounds + 3):
        for label, work in works.items():
            gradient, found = timed(one_gradient, wait), timed(work, wait)
            if turn > 2: base[label].append(gradient); seconds[label].append(found)
    print(f"\n{'':26s}       ms  gradients (quartiles)")
    for label, found in seconds.items():
        ratios = [t / b for t, b in zip(found, base[label])]
        low, middle, high = statistics.quantiles(ratios)
        print(f"{label:26s} {1e3 * statistics.median(found):8.3f}  {middle:.3f} ({low:.3f} – {high:.3f})")


def one_firing(hook, state, config):
    "A call at all points of one step or epoch, with what it needs at hand."
    watching = Hooks([hook])
    watching.check(config, state)
    for _ in range(3):  # so that a comparison has something to compare with
        state.epoch += 1
        watching.fire(PRE_EPOCH, state)
        whole = False
        while not whole:
            train_step(state, state.batches.of_epoch(), config.grad_clip, watching.fire)
            watching.fire(POST_STEP, state)
            whole = state.batches.at_start
        watching.fire(POST_EPOCH, state)
    view, kept = watching.view, watching.view.unclipped()
    memory = dict(vars(hook))

    def work():
        vars(hook).update(memory)
        if "at" in memory: hook.at, hook.last_at = state.step - 1, state.step - 1  # the Hessian hook: the last step was the one before
        mean = view.unclipped() if hook.needs & Needs.EPOCH_GRAD else None
        view.show(previous_grad=kept, epoch_grad=mean)
        for point in events_of(hook): getattr(hook, point)(view)

    return work


class Silent(Recorder):
    "A recorder that saves no checkpoints."

    def save(self, file=None): self.flush()


def loop(config, device, hooks):
    "A block of the package's loop, watched."
    state = find_experiment(config.experiment).build(config, device)
    folder = create_run(tempfile.mkdtemp(), config, {})
    if hooks is not None:
        hooks.check(config, state)
        hooks.open(folder)
    recorder = Silent(config, state, folder, hooks)

    def block():
        recorder.config = with_values(config, epochs=recorder.now + BLOCK // 4)
        epoch_loop(recorder, [])

    return block


def sets(config, device, rounds, wait) -> None:
    "Overhead of each set, in turns of a thousand steps."
    works = {"bare": bare(config, device, BLOCK)}
    for name in SETS: works[name] = loop(config, device, create_hooks(with_values(config, hooks=name)))
    seconds = {label: [] for label in works}
    for turn in range(rounds + 1):
        for label, work in works.items():
            found = timed(work, wait)
            if turn: seconds[label].append(found)
    print(f"\n{'':26s} µs per step  ratio to bare (quartiles)")
    for label, found in seconds.items():
        ratios = [t / b for t, b in zip(found, seconds["bare"])]
        low, middle, high = statistics.quantiles(ratios) if rounds > 1 else ratios * 3
        print(f"{label:26s} {1e6 * statistics.median(found) / BLOCK:11.0f}  {middle:.3f} ({low:.3f} – {high:.3f})")


def main() -> None:
    words = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    words.add_argument("--threads", type=int, default=1)
    words.add_argument("--rounds", type=int, default=12)
    words.add_argument("--device", default="auto")
    chosen = words.parse_args()
    torch.set_num_threads(chosen.threads)
    device = resolve_device(chosen.device)
    wait = torch.cuda.synchronize if device.type == "cuda" else lambda: None
    for name, keys in CASES.items():
        config = make_config(**keys, epochs=10**9, log_every=100, checkpoint_every=10**9)
        print(f"\n{name}")
        firings(config, device, 10 * chosen.rounds, wait)
        sets(config, device, chosen.rounds, wait)
    print(f"\nran on {device_name(device)}, torch {torch.__version__}")


if __name__ == "__main__":
    main()
