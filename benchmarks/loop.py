"""What the training loops add to a bare PyTorch loop between log points, when nobody watches.

    python benchmarks/loop.py [--threads 1] [--rounds 30] [--device auto]

Three loops train the same network on the same batches: a bare one, written out; the epoch loop; the step loop. They take turns, a hundred steps each, in
batches that divide the training set, so that all steps are equally long. The network of `quickstart`, and one so small that hardly anything but overhead is left.
"""

import argparse, statistics, tempfile, time
import torch
import torch.nn.functional as F
from lal.core.config import make_config, with_values
from lal.core.device import device_name, resolve_device
from lal.core.experiment import find_experiment
from lal.core.recorder import Recorder
from lal.core.run import RunFolder
from lal.core.trainer import epoch_loop, step_loop

BLOCK = 100  # steps in a turn
CASES = {
    "quickstart": dict(p=47, train_frac=0.4, model_type="transformer", hidden_dim=64, n_layers=1, batch_size=221, grad_clip=1.0, decay_all=True),
    "tiny MLP": dict(p=11, train_frac=0.5, model_type="baseline", hidden_dim=16, n_layers=1, batch_size=15, grad_clip=1.0),
}  # fmt: skip


def bare(config, device, steps=BLOCK):
    "The loop everyone would write, on the state's model, optimizer and batches."
    s = find_experiment(config.experiment).build(config, device)

    def block():
        for _ in range(steps):
            x, y = s.batches.of_epoch()
            s.optimizer.zero_grad()
            F.cross_entropy(s.model(x), y).backward()
            torch.nn.utils.clip_grad_norm_(s.model.parameters(), config.grad_clip)
            s.optimizer.step()

    return block


class Silent(Recorder):
    "A recorder between two log points: it measures nothing and writes nothing."

    def log_if_due(self): self.state.row = None

    def save(self, file=None): pass


def ours(loop, unit, config, device):
    "A block of the package's loop, however many epochs or steps it has made before."
    s = find_experiment(config.experiment).build(config, device)
    recorder = Silent(config, s, RunFolder(tempfile.mkdtemp()))
    passes = -(-s.batches.n // config.batch_size)
    per_block = BLOCK // passes if unit == "epochs" else BLOCK
    if unit == "epochs": assert BLOCK % passes == 0, "a block is whole epochs"

    def block():
        recorder.config = with_values(config, **{unit: recorder.now + per_block})
        loop(recorder, [])

    return block


def main() -> None:
    words = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    words.add_argument("--threads", type=int, default=1)
    words.add_argument("--rounds", type=int, default=30)
    words.add_argument("--device", default="auto")
    chosen = words.parse_args()
    torch.set_num_threads(chosen.threads)
    device = resolve_device(chosen.device)
    wait = torch.cuda.synchronize if device.type == "cuda" else lambda: None
    for name, keys in CASES.items():
        by_epoch = make_config(**keys, epochs=10**9, log_every=10**9, checkpoint_every=10**9)
        by_step = with_values(by_epoch, steps=10**9)
        loops = {"bare": bare(by_epoch, device), "epoch loop": ours(epoch_loop, "epochs", by_epoch, device), "step loop": ours(step_loop, "steps", by_step, device)}
        seconds = {label: [] for label in loops}
        for turn in range(chosen.rounds + 1):
            for label, block in loops.items():
                wait()
                began = time.perf_counter()
                block()
                wait()
                if turn: seconds[label].append(time.perf_counter() - began)  # the first warms up
        print(f"\n{name}: {BLOCK} steps a turn, {chosen.rounds} turns\n{'':12s}  µs per step  ratio to bare (quartiles)")
        for label, found in seconds.items():
            ratios = [t / b for t, b in zip(found, seconds["bare"])]
            low, middle, high = statistics.quantiles(ratios)
            print(f"{label:12s}  {1e6 * statistics.median(found) / BLOCK:11.0f}  {middle:.3f} ({low:.3f} – {high:.3f})")
    print(f"\nran on {device_name(device)}, torch {torch.__version__}")


if __name__ == "__main__":
    main()
