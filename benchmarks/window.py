"""Memory and time of subspace_gradient_info, over its window and the parameters; and a watched GPT-2 against the bound it states.

    python benchmarks/window.py [--threads 1] [--rounds 5] [--device auto] [--windows 10 20 40 80] [--sizes 100000 1000000 10000000] [--skip-gpt2]

First part: the hook's own method, on random gradients, with a full window: what it remembers, and the seconds of one firing (a row of the Gram matrix, its eigenvalues, the metrics, without a reference).
The windows take turns, one firing each. Memory should be proportional to window × parameters, and so should the row: the last columns are the ratios to the window or the model before, beside the ratio of the entries.
A firing also makes one new vector, whatever the window, which costs some ten inner products; so the time rises from there. `ns/further` is the slope: nanoseconds for each entry that the window has more than the one before.
The largest case holds the gradients of all windows at once: 80 of ten million parameters are 3.2 GB in float32.

Second part: a GPT-2 of ten million parameters (extra `transformers`) on a loop of its own. At its default window it is over the default bound, and is refused before a step is made;
with a window that fits, what the hook remembers after more steps than the window holds is compared with the bound.
"""

import argparse, statistics, time
from types import SimpleNamespace
import torch
from hooks import timed  # the script beside this one
from lal.core.device import device_name, generator, resolve_device
from lal.core.errors import ConfigError
from lal.hooks.rows import remembered, size_of
from lal.hooks.subspace_gradient_info import SubspaceGradientInfo
from lal.hooks.watch import watch
from lal.hooks.window import slide


def filled(n: int, windows: list[int], device) -> dict[int, SubspaceGradientInfo]:
    "A hook for each window, full; they share the gradients."
    rng, whole, found = generator(0, "gradients"), None, {}
    for k in range(1, max(windows) + 1):
        whole = slide(whole, {"a": torch.randn(n, generator=rng).to(device)}, max(windows))
        if k in windows:
            found[k] = SubspaceGradientInfo(window=k)
            found[k].kept = whole
    return found


def measure(n: int, windows: list[int], rounds: int, device, wait) -> dict[int, tuple[int, float]]:
    "Bytes remembered and median seconds of a firing, for each window."
    hooks, seconds = filled(n, windows, device), {w: [] for w in windows}
    state = SimpleNamespace(epoch_grad={"a": torch.randn(n, generator=generator(0, "next")).to(device)}, to_solution=lambda: None)
    for turn in range(rounds + 1):
        for w, hook in hooks.items():
            taken = timed(lambda: hook.post_epoch(state), wait)
            if turn: seconds[w].append(taken)
    return {w: (size_of(remembered(hooks[w])), statistics.median(seconds[w])) for w in windows}


def scaling(windows: list[int], sizes: list[int], rounds: int, device, wait) -> None:
    "The table of the first part."
    print(f"{'parameters':>12}{'window':>8}{'MB':>10}{'ms':>10}{'ns/entry':>10}{'ns/further':>12}   {'against the smaller window':30}against the smaller model")
    print(f"{'':62}   {'entries  memory  time':30}entries  memory  time")
    before = {}
    for n in sizes:
        found = measure(n, windows, rounds, device, wait)
        for i, w in enumerate(windows):
            (size, seconds), told = found[w], ["", ""]
            slope = ""
            if i:
                smaller = n * windows[i - 1], *found[windows[i - 1]]
                told[0] = ratios((n * w, size, seconds), smaller)
                slope = f"{1e9 * (seconds - smaller[2]) / (n * w - smaller[0]):.2f}"
            if before: told[1] = ratios((n * w, size, seconds), (before["n"] * w, *before[w]))
            print(f"{n:12,}{w:8}{size / 1e6:10.1f}{1e3 * seconds:10.2f}{1e9 * seconds / n / w:10.2f}{slope:>12}   {told[0]:30}{told[1]}")
        before = {"n": n, **found}


def ratios(ours, theirs) -> str:
    return "".join(f"{a / b:7.2f}" for a, b in zip(ours, theirs))


def gpt2(device) -> None:
    "The second part."
    from transformers import GPT2Config, GPT2LMHeadModel

    torch.manual_seed(0)
    model = GPT2LMHeadModel(GPT2Config(vocab_size=8192, n_positions=64, n_embd=256, n_layer=10, n_head=4)).to(device)
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-4)
    n = sum(p.numel() for p in model.parameters())
    print(f"\nGPT-2 with {n:,} parameters, one gradient {4 * n / 1e6:.1f} MB")

    def loss_fn(model, batch): return model(batch, labels=batch).loss

    def train(steps: int, options: dict):
        made, hooks = 0, {"subspace_gradient_info": {"every_n_epochs": 1, **options}}
        model.eval()  # without dropout
        with watch(model, optimizer, loss_fn, hooks) as run:
            try:
                for _ in range(steps):
                    batch = torch.randint(8192, (2, 32), generator=generator(made, "batch")).to(device)
                    with run.step(batch):
                        optimizer.zero_grad()
                        loss_fn(model, batch).backward()
                        optimizer.step()
                    made += 1
            except ConfigError as error:
                return made, str(error), None
        return made, run.table("subspace_gradient_info"), run.hooks.sizes()["subspace_gradient_info"]

    made, said, _ = train(1, {})
    print(f"default options: {made} steps made; {said}")
    fits = int(1e9 // (4 * n))
    made, rows, size = train(fits + 5, {"window": fits})
    print(f"window {fits}: {made} steps made, {len(rows)} rows, {rows.n_gradients.iloc[-1]:.0f} gradients in the window; {size / 1e9:.3f} GB remembered, bound 1 GB, window × parameters × 4 bytes {4 * fits * n / 1e9:.3f} GB")


def main() -> None:
    words = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    words.add_argument("--threads", type=int, default=1)
    words.add_argument("--rounds", type=int, default=5)
    words.add_argument("--device", default="auto")
    words.add_argument("--windows", type=int, nargs="+", default=[10, 20, 40, 80])
    words.add_argument("--sizes", type=int, nargs="+", default=[10**5, 10**6, 10**7])
    words.add_argument("--skip-gpt2", action="store_true")
    chosen = words.parse_args()
    torch.set_num_threads(chosen.threads)
    device = resolve_device(chosen.device)
    wait = torch.cuda.synchronize if device.type == "cuda" else lambda: None
    scaling(chosen.windows, chosen.sizes, chosen.rounds, device, wait)
    if not chosen.skip_gpt2: gpt2(device)
    print(f"\nran on {device_name(device)}, torch {torch.__version__}, float32")


if __name__ == "__main__":
    main()
