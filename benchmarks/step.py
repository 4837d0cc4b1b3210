"""One training step of the transformer: by distinct states, by the plain computation, and by `nn.TransformerEncoder`.

    python benchmarks/step.py [--threads 1] [--rounds 30] [--device auto] [--quick]

A step is zero_grad, forward, cross-entropy, backward and AdamW. The three carry the same weights and the same batch and take turns, one step each.
The differences of logits and gradients (each tensor relative to its largest entry, the worst of them) are taken before training, from the plain computation.
"""

import argparse, time
from dataclasses import dataclass
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from lal.core.device import device_name, generator, resolve_device, seeded
from lal.modular.models import GrokTransformer
from lal.modular.task import Examples, Task, encode, examples


@dataclass(frozen=True)
class Case:
    name: str
    p: int
    width: int
    layers: int
    batch: int
    operation: str = "add"


CASES = [
    Case("full batch, train_frac 0.3", p=113, width=128, layers=2, batch=3831),
    Case("quickstart, batch 200", p=47, width=64, layers=1, batch=200),
    Case("validate_transformer, full batch", p=17, width=128, layers=2, batch=144),
    Case("mini-batch below P", p=9973, width=128, layers=2, batch=256),
]


class Fast(GrokTransformer):
    "The package's model as it is."


class Plain(GrokTransformer):
    "The same class by the plain computation."

    def representation(self, x: Tensor) -> Tensor:
        return self.last_state(self.embed(x))


class Ordinary(nn.Module):
    "The same network the ordinary way, from PyTorch's own layers."

    def __init__(self, model: GrokTransformer):
        super().__init__()
        width, heads = model.tokens.embedding_dim, model.blocks[0].attention.n_heads
        self.tokens = nn.Embedding(model.tokens.num_embeddings, width)
        self.positions = nn.Embedding(4, width)
        layer = nn.TransformerEncoderLayer(width, heads, 4 * width, dropout=0.0, activation="gelu", batch_first=True, norm_first=True)
        self.encoder = nn.TransformerEncoder(layer, len(model.blocks), norm=nn.LayerNorm(width), enable_nested_tensor=False)
        self.output = nn.Linear(width, model.p, bias=False)
        self.register_buffer("mask", nn.Transformer.generate_square_subsequent_mask(4))
        self.load_state_dict({**{renamed(k): t for k, t in model.state_dict().items()}, "mask": self.mask})

    def forward(self, x: Tensor) -> Tensor:
        h = self.tokens(x) + self.positions.weight
        return self.output(self.encoder(h, mask=self.mask, is_causal=True)[:, -1])


NAMES = {"blocks.": "encoder.layers.", "attention.qkv.": "self_attn.in_proj_", "attention.out": "self_attn.out_proj", ".up.": ".linear1.", ".down.": ".linear2."}


def renamed(name: str) -> str:
    "What PyTorch's layers call this parameter."
    for ours, theirs in NAMES.items():
        name = name.replace(ours, theirs)
    return f"encoder.{name}" if name.startswith("norm.") else name


def build(case: Case, Model=GrokTransformer) -> GrokTransformer:
    with seeded(0, "init"):
        return Model(Task(case.p, case.operation), case.width, case.layers)


def models(case: Case, device) -> dict[str, nn.Module]:
    found = {"fast": build(case, Fast), "plain": build(case, Plain), "nn.TransformerEncoder": Ordinary(build(case))}
    return {name: model.to(device) for name, model in found.items()}


def draw(case: Case, device) -> Examples:
    task = Task(case.p, case.operation)
    codes = torch.randint(task.n_pairs, (4 * case.batch,), generator=generator(0, "data")).unique()
    keep = torch.randperm(len(codes), generator=generator(0, "order"))[: case.batch]
    return examples(task, codes[keep]).to(device)


def values(model: nn.Module, x: Tensor, y: Tensor) -> dict[str, Tensor]:
    "The logits, and every parameter's gradient under one set of names."
    logits = model(x)
    named = {renamed(name): t for name, t in model.named_parameters()}
    slopes = torch.autograd.grad(F.cross_entropy(logits, y), list(named.values()))
    return {"logits": logits.detach(), **dict(zip(named, slopes))}


def apart(one: dict, two: dict) -> tuple[float, float]:
    "Of the logits, and of the worst gradient."
    each = {k: float((one[k] - t).abs().max() / t.abs().max()) for k, t in two.items()}
    return each.pop("logits"), max(each.values())


def training_step(model: nn.Module, x: Tensor, y: Tensor):
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)

    def step():
        optimizer.zero_grad()
        F.cross_entropy(model(x), y).backward()
        optimizer.step()

    return step


def timed(step, device: torch.device) -> float:
    "Milliseconds of one call, the device's own work included."
    start = time.perf_counter()
    step()
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return 1e3 * (time.perf_counter() - start)


def interleaved(steps: dict, rounds: int, device: torch.device) -> dict[str, Tensor]:
    "Quartiles `[3]` of the milliseconds of each step, over rounds in which every one runs once."
    for step in [*steps.values()] * 3:
        timed(step, device)
    taken = {name: [] for name in steps}
    for _ in range(rounds):
        for name, step in steps.items():
            taken[name].append(timed(step, device))
    quartiles = torch.tensor([0.25, 0.5, 0.75])
    return {name: torch.tensor(ms).quantile(quartiles) for name, ms in taken.items()}


def report(case: Case, rounds: int, device: torch.device):
    chosen = draw(case, device)
    x, y = encode(chosen, "tokens"), chosen.y
    found = models(case, device)
    exact = values(found["plain"], x, y)
    differences = {name: apart(values(model, x, y), exact) for name, model in found.items()}
    ms = interleaved({name: training_step(model, x, y) for name, model in found.items()}, rounds, device)
    print(f"\n{case.name}: p = {case.p}, d = {case.width}, L = {case.layers}, H = 4, N = {len(y)}, {rounds} rounds")
    print(f"  {'':22}{'ms per step':>12}{'quartiles':>18}{'ratio to fast':>15}{'logits differ':>15}{'gradients':>11}")
    for name, (low, median, high) in ms.items():
        spread, ratio = f"{low:.1f} – {high:.1f}", float(median / ms["fast"][1])
        logits, gradients = (f"{d:.0e}" for d in differences[name])
        print(f"  {name:22}{median:12.1f}{spread:>18}{ratio:14.2f}×{logits:>15}{gradients:>11}")


def arguments():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--threads", type=int, help="CPU threads (PyTorch's own choice when absent)")
    parser.add_argument("--rounds", type=int, default=30, help="of the largest case; the small ones take five times as many")
    parser.add_argument("--device", default="auto", help="auto, cuda, mps or cpu")
    parser.add_argument("--quick", action="store_true", help="three rounds, to see that it runs")
    return parser.parse_args()


def main():
    chosen = arguments()
    if chosen.threads:
        torch.set_num_threads(chosen.threads)
    device = resolve_device(chosen.device)
    for case in CASES:
        small = case.batch * case.width < 20_000
        report(case, 3 if chosen.quick else chosen.rounds * (5 if small else 1), device)
    print(f"\nran on {device_name(device)}, torch {torch.__version__}, float32")


if __name__ == "__main__":
    main()
