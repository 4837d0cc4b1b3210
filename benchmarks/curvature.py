"""Curvature against PyHessian, curvlinops and hessian-eigenthings: the ten largest eigenvalues, and single products.

    pip install 'lal[bench]'          # the others; the script installs nothing and leaves out what is absent
    python benchmarks/curvature.py [--threads 2] [--rounds 5] [--device auto] [--case mlp] [--without pyhessian] [--quick]

Two networks, trained for a while by full-batch AdamW: the perceptron for p = 23 and the transformer for p = 113. Each package gets its own copy of the model and the same data. They take turns, once a round; a ratio is of medians.
Every result is measured with the same ruler: λ and x against the exact Hessian in float64, ‖Hx − λx‖ / max|λ|, the worst of ten, and the largest error of an eigenvalue against a float64 run to 1e-9.
curvlinops has no eigensolver of its own: its operator goes to scipy's eigsh, once at our tolerance and once at scipy's default (0: machine precision). hessian-eigenthings makes 50 Lanczos steps (its default, 20, is far from converged). PyHessian runs at its defaults (power iteration, at most 100 steps each).
"""

import argparse, contextlib, copy, io, statistics, time, warnings
from dataclasses import dataclass, field
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from lal.core.device import device_name, generator, resolve_device, seeded
from lal.modular.models import BaselineMLP, GrokTransformer
from lal.modular.task import Task, encode, examples
from lal.curvature.lanczos import Search, eigsh
from lal.curvature.hessian_operator import FiniteDifferenceOperator, HessianOperator
from lal.curvature.params import loss_function, params_of

K = 10


@dataclass
class Case:
    name: str
    model: nn.Module
    x: Tensor
    y: Tensor
    steps: int  # of training
    loss: float = field(default=float("nan"))

    def function(self): return loss_function(self.model, self.x, self.y)

    def copy(self): return copy.deepcopy(self.model)


def make(name: str, device, quick: bool) -> Case:
    Model, p, share, steps = {"mlp": (BaselineMLP, 23, 1.0, 600), "transformer": (GrokTransformer, 113, 0.3, 40)}[name]
    task = Task(p)
    with seeded(0, "init"):
        model = Model(task).to(device)
    chosen = examples(task)
    chosen = chosen[torch.randperm(len(chosen), generator=generator(0, "order"))[: int(share * len(chosen))]]
    x, y = encode(chosen, model.encoding).to(device), chosen.y.to(device)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    case = Case(name, model, x, y, 5 if quick else steps)
    for _ in range(case.steps):
        optimizer.zero_grad()
        loss = F.cross_entropy(model(x), y)
        loss.backward()
        optimizer.step()
    case.loss = float(loss.detach())
    return case


def absent(package: str) -> bool:
    try:
        __import__(package)
    except ImportError:
        print(f"  {package} is not installed: left out")
        return True
    return False


def curvlinops_operator(case: Case):
    from curvlinops import HessianLinearOperator

    model = case.copy()
    params = [p for p in model.parameters()]
    return HessianLinearOperator(model, nn.CrossEntropyLoss(), params, [(case.x, case.y)], check_deterministic=False)


def eigenthings_operator(case: Case):
    from hessian_eigenthings import HessianOperator as Theirs

    model = case.copy()
    return Theirs(model, [(case.x, case.y)], lambda m, batch: F.cross_entropy(m(batch[0]), batch[1]))


def quiet(act):
    "Without what other packages print."
    def called():
        with contextlib.redirect_stdout(io.StringIO()), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            return act()
    return called


def solvers(case: Case, tol: float, missing: set) -> dict:
    "Each solver as a function that builds its operator and gives λ [10] and x [n, 10]."

    def ours():
        found = eigsh(HessianOperator(case.function(), params_of(case.model)), K, tol=tol)
        return found.eigenvalues, found.eigenvectors

    def unsure():
        H = HessianOperator(case.function(), params_of(case.model))
        search = Search(H, K, "LA", tol, 1000, max(4 * K, 2 * K + 20), 0)
        search.find()
        return search.found.values[:K], search.found.rows[:K].T

    def by_scipy(scipy_tol):
        def act():
            from scipy.sparse.linalg import eigsh as arpack

            op = curvlinops_operator(case).to_scipy()
            start = torch.randn(op.shape[0], generator=generator(0, "probe")).numpy()
            values, X = arpack(op, k=K, which="LA", tol=scipy_tol, v0=start)
            return torch.from_numpy(values.copy()), torch.from_numpy(X.copy())

        return act

    def eigenthings():
        from hessian_eigenthings import lanczos

        found = lanczos(eigenthings_operator(case), k=K, max_iter=50, which="LA", seed=0)
        return found.eigenvalues, found.eigenvectors.T

    def pyhessian():
        from pyhessian import hessian

        with seeded(0, "probe"):
            found = hessian(case.copy(), nn.CrossEntropyLoss(), data=(case.x, case.y), cuda=case.x.is_cuda)
            values, X = found.eigenvalues(top_n=K)
        return torch.tensor(values), torch.stack([torch.cat([t.flatten() for t in x]) for x in X], 1)

    found = {"lal": ours, "lal, without the look for missed ones": unsure}
    if "curvlinops" not in missing:
        found |= {f"curvlinops + scipy, tol {tol:.0e}": by_scipy(tol), "curvlinops + scipy, its default tol": by_scipy(0)}
    if "hessian_eigenthings" not in missing: found["hessian-eigenthings, 50 steps"] = eigenthings
    if "pyhessian" not in missing: found["PyHessian"] = pyhessian
    return {name: quiet(act) for name, act in found.items()}


def timed(act, device):
    if device.type == "cuda": torch.cuda.synchronize(device)
    began = time.perf_counter()
    out = act()
    if device.type == "cuda": torch.cuda.synchronize(device)
    return time.perf_counter() - began, out


def interleaved(actions: dict, rounds: int, device, once: tuple = ()) -> tuple[dict, dict]:
    "Median seconds of each, and its last result; those named in `once` run in the first round only."
    seconds, results = {name: [] for name in actions}, {}
    for i in range(rounds):
        for name, act in actions.items():
            if i and name in once: continue
            taken, results[name] = timed(act, device)
            seconds[name].append(taken)
    return {name: statistics.median(s) for name, s in seconds.items()}, results


def measured(case: Case, results: dict) -> dict:
    "The worst residual and the worst error of each, over max|λ|, by the exact Hessian in float64."
    H = HessianOperator(case.function(), params_of(case.model, torch.float64))
    true = eigsh(H, K, tol=1e-9, max_products=3000).eigenvalues
    scale, found = float(true.abs().max()), {}
    for name, (values, X) in results.items():
        X = X.detach().to(H.device, torch.float64)
        X = X / X.norm(dim=0)
        values = values.detach().cpu().double()
        R = torch.stack([H @ x for x in X.T.contiguous()], 1) - X * values.to(X)
        error = (values.sort().values - true.sort().values).abs().max()
        found[name] = float(R.norm(dim=0).max()) / scale, float(error) / scale
    return found


def eigenvalues(case: Case, rounds: int, tol: float, missing: set, device):
    seconds, results = interleaved(solvers(case, tol, missing), rounds, device, once=("PyHessian",))
    quality = measured(case, results)
    print(f"\n  the {K} largest eigenvalues, tol = {tol:.0e}, {rounds} rounds (PyHessian: one)")
    print(f"  {'':42}{'seconds':>9}{'ratio to lal':>14}{'residual':>11}{'error':>9}")
    for name, s in seconds.items():
        residual, error = quality[name]
        print(f"  {name:42}{s:9.3f}{s / seconds['lal']:13.2f}×{residual:11.0e}{error:9.0e}")
    found = eigsh(HessianOperator(case.function(), params_of(case.model)), K, tol=tol)
    return seconds["lal"], found.products


def products(case: Case, rounds: int, missing: set, device) -> float:
    f, params = case.function(), params_of(case.model)
    H = HessianOperator(f, params)
    n, rng = H.shape[0], generator(0, "probe")
    v, V = (torch.randn(n, *more, generator=rng).to(device) for more in ((), (16,)))
    forward = FiniteDifferenceOperator(f, params, epsilon=1e-3)
    leaves = {k: t.clone().requires_grad_() for k, t in params.items()}

    def bare():
        return torch.autograd.grad(f(leaves), list(leaves.values()))

    actions = {
        "a gradient": bare,
        "exact, graph kept": lambda: H @ v,
        "forward difference, base kept": lambda: forward @ v,
        "block of 16, by singles": lambda: torch.stack([H @ u for u in V.T.contiguous()], 1),
        "block of 16": HessianOperator(f, params, vectorize=True).__matmul__,
    }
    actions["block of 16"] = (lambda act: lambda: act(V))(actions.pop("block of 16"))
    if "curvlinops" not in missing:
        theirs = curvlinops_operator(case)
        actions["curvlinops"] = lambda: theirs @ v
    if "hessian_eigenthings" not in missing:
        eigen = eigenthings_operator(case)
        actions["hessian-eigenthings"] = lambda: eigen.matvec(v)
    for act in actions.values(): act()
    once = ("block of 16",) if case.name == "transformer" and device.type == "cpu" else ()
    seconds, results = interleaved({k: quiet(a) for k, a in actions.items()}, rounds, device, once)
    exact = HessianOperator(f, params_of(case.model, torch.float64)) @ v.double()
    print(f"\n  products, {rounds} rounds: milliseconds, in gradients, relative error against float64")
    for name, s in seconds.items():
        out = results[name]
        wrong = f"{float((out.double() - exact).norm() / exact.norm()):9.0e}" if isinstance(out, Tensor) and out.ndim == 1 else ""
        print(f"  {name:42}{1e3 * s:9.2f}{s / seconds['a gradient']:13.2f} {wrong}")
    return seconds["exact, graph kept"]


def orthogonalisation(n: int, rows: int, device) -> float:
    "Seconds of one step's orthogonalisation against half a full buffer."
    V, w = torch.randn(rows // 2, n, device=device), torch.randn(n, device=device)

    def act():
        u = w
        for _ in range(2):
            u = torch.addmv(u, V.T, V @ u, alpha=-1)
        return u

    return statistics.median(timed(act, device)[0] for _ in range(20))


def report(name: str, arguments, missing: set, device):
    case = make(name, device, arguments.quick)
    n = sum(p.numel() for p in case.model.parameters())
    print(f"\n{name}: n = {n:,}, N = {len(case.y):,} examples, {case.steps} steps of AdamW, loss {case.loss:.3g}")
    small = name == "mlp"
    one = products(case, (3 if arguments.quick else arguments.rounds) * (10 if small else 1), missing, device)
    rounds = 1 if arguments.quick else arguments.rounds if small else max(1, arguments.rounds // 2)
    whole, made = eigenvalues(case, rounds, arguments.tol, missing, device)
    rest = orthogonalisation(n, 4 * K, device)
    print(f"  where lal's time goes: {made} products {made * one / whole:.0%}, orthogonalisation {made * rest / whole:.0%}, the rest building the graph, small matrices and waiting")


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--threads", type=int, help="CPU threads (PyTorch's own choice when absent)")
    parser.add_argument("--rounds", type=int, default=5, help="of the small case; the large one takes half as many")
    parser.add_argument("--device", default="auto", help="auto, cuda, mps or cpu")
    parser.add_argument("--tol", type=float, default=1e-4, help="of lal's eigsh, and of scipy's in its first row")
    parser.add_argument("--case", choices=["mlp", "transformer"], help="only this one")
    parser.add_argument("--without", nargs="*", default=[], help="packages to leave out: curvlinops, hessian_eigenthings, pyhessian")
    parser.add_argument("--quick", action="store_true", help="one round on barely trained networks, to see that it runs")
    arguments = parser.parse_args()
    if arguments.threads: torch.set_num_threads(arguments.threads)
    device = resolve_device(arguments.device)
    missing = {package for package in ("curvlinops", "hessian_eigenthings", "pyhessian") if package in arguments.without or absent(package)}
    for name in ("mlp", "transformer"):
        if arguments.case in (None, name): report(name, arguments, missing, device)
    print(f"\nran on {device_name(device)}, torch {torch.__version__}, float32")


if __name__ == "__main__":
    main()
