"""EigenTracker beside a new eigsh at each log point, along one training run: products, time, residuals.

    python benchmarks/tracker.py [--epochs 1000] [--every 10] [--k 1 3 5 10] [--which LA] [--tol 1e-4] [--threads 1] [--device auto]

Trains the network of `validate_transformer` and builds its Hessian every few epochs, in float32 on all training pairs. On that one operator the tracker and eigsh, at the same tolerance,
take turns at being the first. Building the operator is not counted, since both need it.
A log point of the tracker is smooth, or a look for missed values, or a new solve, where what the start had cost is counted too. The first log point, a solve for both, is left out.
Both are measured with the same ruler: ‖Hx − λx‖ / max|λ| by further products, the worst of all log points.
Interrupted (Ctrl-C), it prints what it has by then.
"""

import argparse, contextlib, statistics, time
import torch
from curvature import timed  # the script beside this one
from lal.core.config import load_config
from lal.core.device import device_name, resolve_device
from lal.core.experiment import find_experiment
from lal.core.state import train_step
from lal.curvature.hessian_operator import HessianOperator
from lal.curvature.lanczos import eigsh
from lal.curvature.tracker import EigenTracker

CONFIG = "validate_transformer"
KINDS = "smooth", "look", "new solve"


def along(every: int, epochs: int, device):
    "Epoch, loss and Hessian, from the first log point on."
    config = load_config(CONFIG)
    s = find_experiment(config.experiment).build(config, device)
    for epoch in range(epochs + 1):
        batch = s.batches.of_epoch()
        if epoch % every == 0: yield epoch, float(s.loss_fn(s.model, batch).detach()), HessianOperator.of(s.model, s.loss_fn, batch)
        train_step(s, batch, config.grad_clip)
        s.scheduler.step()


def anew(H, k: int, which: str, tol: float):
    "By eigsh, at one end or both."
    return [eigsh(H, k, end, tol, on_fail="return") for end in (("LA", "SA") if which == "both" else (which,))]


def residual(H, found: list) -> float:
    "The worst, over the largest |λ| found."
    scale = max(float(f.eigenvalues.abs().max()) for f in found)
    pairs = [(x, float(value)) for f in found for x, value in zip(f.eigenvectors.T.contiguous(), f.eigenvalues)]
    return max(float((H @ x - value * x).norm()) for x, value in pairs) / scale


def update(tracker: EigenTracker, H) -> tuple:
    "What kind of update it was, and what it found."
    looked = tracker.updates % tracker.look_every == 0
    found = tracker.update(H, on_fail="return")
    return KINDS[2 if not tracker.past else looked], [found]  # after a solve there is no past


def compare(tracker: EigenTracker, H, turn: int, device) -> tuple:
    "Kind, products, seconds, residuals and convergence of the tracker and of eigsh."
    actions = [lambda: update(tracker, H), lambda: ("", anew(H, tracker.k, tracker.which, tracker.tol))]
    measured = {i: timed(actions[i], device) for i in ((0, 1) if turn % 2 else (1, 0))}
    (ours, (kind, warm)), (theirs, (_, cold)) = measured[0], measured[1]
    made = [sum(f.products for f in found) for found in (warm, cold)]
    failed = [not all(f.converged for f in found) for found in (warm, cold)]
    return kind, made, (ours, theirs), [residual(H, found) for found in (warm, cold)], failed


def report(k: int, which: str, rows: list) -> None:
    "One k: products by kind, then both in all."
    print(f"\nk = {k}, {which}, {len(rows)} log points: products a log point, mean (median); milliseconds a log point, mean (median)")
    print(f"  {'':12}{'points':>7}{'tracker':>15}{'eigsh':>15}{'ratio':>7}{'tracker':>19}{'eigsh':>19}{'ratio':>7}")
    for kind in (*KINDS, "all"):
        chosen = [row for row in rows if kind in (row[0], "all")]
        if not chosen: continue
        cells = ""
        for at, unit, places in ((1, 1, 1), (2, 1e3, 0)):
            pair = [[unit * row[at][i] for row in chosen] for i in (0, 1)]
            width = 15 if at == 1 else 19
            for values in pair: cells += f"{statistics.mean(values):.{places}f} ({statistics.median(values):.0f})".rjust(width)
            cells += f"{sum(pair[0]) / sum(pair[1]):7.2f}"
        print(f"  {kind:12}{len(chosen):7}{cells}")
    for i, name in enumerate(("tracker", "eigsh")):
        print(f"  {name}: worst residual {max(row[3][i] for row in rows):.1e} of max|λ|, not converged at {sum(row[4][i] for row in rows)} log points", flush=True)


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--epochs", type=int, default=1000)
    parser.add_argument("--every", type=int, default=10, help="epochs from one log point to the next")
    parser.add_argument("--k", type=int, nargs="+", default=[1, 3, 5, 10])
    parser.add_argument("--which", choices=["LA", "SA", "LM", "both"], default="LA")
    parser.add_argument("--tol", type=float, default=1e-4)
    parser.add_argument("--threads", type=int, help="CPU threads (PyTorch's own choice when absent)")
    parser.add_argument("--device", default="auto", help="auto, cuda, mps or cpu")
    arguments = parser.parse_args()
    if arguments.threads: torch.set_num_threads(arguments.threads)
    device = resolve_device(arguments.device)
    trackers = {k: EigenTracker(k, arguments.which, arguments.tol) for k in arguments.k}
    rows, losses, began = {k: [] for k in trackers}, [], time.perf_counter()
    with contextlib.suppress(KeyboardInterrupt):
        for turn, (epoch, loss, H) in enumerate(along(arguments.every, arguments.epochs, device)):
            losses.append(f"{loss:.2g}")
            for k, tracker in trackers.items():
                row = compare(tracker, H, turn, device)
                if turn: rows[k].append(row)
    print(f"{CONFIG}, n = {H.shape[0]:,}, epochs 0 to {epoch} every {arguments.every}, tol = {arguments.tol:.0e}; loss at ten of them: {', '.join(losses[:: max(1, len(losses) // 10)])}")
    for k in trackers: report(k, arguments.which, rows[k])
    print(f"\nran on {device_name(device)}, torch {torch.__version__}, float32, {time.perf_counter() - began:.0f} s")


if __name__ == "__main__":
    main()
